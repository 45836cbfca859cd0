"""Rebuilds the report of a run folder.

    python -m jaxfm.launch.report --run_dir=runs/demo
    python -m jaxfm.launch.report --watch  # all runs in runs/, followed while they go on

The page is made from config.json, metrics.jsonl and results.json alone, so a run that is still
going on can be looked at, too. With --watch a local web page shows all runs of a folder, one by one
or side by side (`jaxfm.launch.watch`). How each part of results.json is shown is registered in
`jaxfm.launch.pages` (see `jaxfm.report.sections`).
"""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from collections.abc import Mapping

import jax

import jaxfm.launch.pages  # noqa: F401  registers the sections
from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.launch.pages.training import training, training_figures
from jaxfm.log import read_metrics
from jaxfm.report import Report, cards, heading, json_panel, text_panel, write
from jaxfm.report.sections import page_title, result_cards, result_sections
from jaxfm.run_folder import load_config, load_results


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Which run."""

    run_dir: str = option(
        "", "folder of the run, by default runs/demo; to be watched: a folder of runs, runs"
    )
    watch: bool = option(False, "serve a page over the runs of a folder until interrupted")
    host: str = option("127.0.0.1", "address that is listened on; others than this let others read")
    port: int = option(8765, "where it listens; 0 for any port that is free")

    def __post_init__(self):
        check(self)
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port={self.port} must be in 0..{2**16 - 1}.")
        for name in ("host", "port"):
            value = getattr(self, name)
            if not self.watch and value != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name}={value} changes nothing without --watch.")


def write_report(run_dir: pathlib.Path) -> pathlib.Path:
    """Writes report.html into the run folder and returns its path. Only process 0 writes.

    Raises:
      FileNotFoundError, ValueError: as of `build_report`.
    """
    if jax.process_index() == 0:
        write(build_report(run_dir), run_dir / "report.html")
    return run_dir / "report.html"


def build_report(run_dir: pathlib.Path) -> Report:
    """Returns the report of a run as it is now.

    Raises:
      FileNotFoundError: the folder holds no run.
      ValueError: a file of the run is damaged.
    """
    config = load_config(run_dir)
    metrics, results = read_metrics(run_dir), load_results(run_dir)
    figures = result_cards(results)
    if metrics and "federate" not in results:
        figures = training_figures(metrics) + figures
    parts = [cards(figures)]
    if metrics:
        parts += training(metrics, results)
    parts += result_sections(results)
    parts += [heading("How to get this again"), text_panel([(_command(run_dir, results), "")])]
    parts += [json_panel("config.json", config)]
    title = page_title(results, "A training run")
    return Report(title, f"run {run_dir.name}", tuple(parts))


# By part of results.json, the script that writes it; the first that is there has made the run.
_SCRIPTS = {
    "draft": "demo", "decode": "demo", "compare": "federate", "federate": "federate",
    "stopped": "federate", "search": "search", "supernet": "supernet", "continual": "continual",
}  # fmt: skip


def _command(run_dir: pathlib.Path, results: Mapping) -> str:
    """The command that makes the same run in another folder."""
    script = next((name for part, name in _SCRIPTS.items() if part in results), "pretrain")
    config = shlex.quote(str(run_dir / "config.json"))
    again = shlex.quote(f"{run_dir}-again")
    return f"python -m jaxfm.launch.{script} --config={config} --run_dir={again}"


def main(config: ReportConfig) -> None:
    """Writes the page and says where it is, or serves one."""
    if config.watch:
        from jaxfm.launch.watch import serve

        serve(pathlib.Path(config.run_dir or "runs"), config.host, config.port)
    else:
        print(write_report(pathlib.Path(config.run_dir or "runs/demo")))


if __name__ == "__main__":
    configs.run(main, ReportConfig)
