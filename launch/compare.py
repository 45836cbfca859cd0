"""Algorithms side by side: the same data, clients, machines and cohorts, for several seeds.

Each algorithm and seed is a run in a folder of its own, `fed_avg-0`, with its own report; stopped
at any moment, a comparison goes on where it was, and one algorithm or seed more adds to it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxfm.federated.registry import find
from jaxfm.launch.compare_page import COLUMNS, plus_minus
from jaxfm.launch.report import write_report
from jaxfm.log import read_metrics
from jaxfm.report.sections import main_metric
from jaxfm.run_folder import load_results, open_run, save_results

MACHINES = ("pi", "phone", "laptop")  # where no profile is given: time and energy are compared, too
WATCHED = 0.1  # of each client's rows: some algorithms have no global model to watch


def compare(config: Any, run: Callable[[Any], pathlib.Path]) -> pathlib.Path:
    """Runs all of `config.compare` with all seeds; returns the path of the report.

    Args:
      config: a `FederateConfig`.
      run: of one algorithm with one seed, in a folder of its own.
    """
    folder = open_run(config, config.run_dir)
    runs: dict[str, list] = {name: [] for name in config.compare}
    for seed in range(config.seed, config.seed + config.seeds):
        for name in config.compare:
            print(f"-- {name}, seed {seed}", flush=True)
            runs[name].append(_finished(one_of(config, name, seed), run))
        parts = {name: summary(some) for name, some in runs.items()}
        seeds = seed - config.seed + 1
        save_results(folder, "compare", {"seeds": seeds, "algorithms": parts})
    print(text_table(parts))
    return write_report(folder)


def one_of(config: Any, name: str, seed: int) -> Any:
    """The config of one algorithm with one seed."""
    watched = config.data.local_validation or WATCHED
    tiers = {} if find(name).has_tiers else {"tiers": type(config).tiers}  # the default
    return dataclasses.replace(
        config,
        **tiers,
        algorithm=name,
        seed=seed,
        compare=(),
        seeds=1,
        run_dir=str(pathlib.Path(config.run_dir) / f"{name}-{seed}"),
        profile=config.profile or MACHINES,
        data=dataclasses.replace(config.data, local_validation=watched),
    )


def _finished(
    config: Any, run: Callable[[Any], pathlib.Path]
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Results and metrics of a run, which is not run again where it has ended."""
    folder = open_run(config, config.run_dir)
    if load_results(folder).get("federate", {}).get("rounds") != config.rounds:
        run(config)
    return load_results(folder)["federate"], read_metrics(folder)


def summary(
    runs: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, float]]]],
) -> dict[str, Any]:
    """One algorithm as JSON: figures by seed, curves as means over seeds, clients of all seeds.

    Args:
      runs: results and metrics by seed.
    """
    metric = main_metric(list(runs[0][0]["test"]))
    figures: dict[str, list[float]] = {}
    for results, _ in runs:
        totals = results["totals"]
        own = {part: results["test"].get(f"{part}/{metric}") for part in
               ("global", "personal", "worst_decile")}  # fmt: skip
        own |= {
            "megabytes": (totals["bytes_up"] + totals["bytes_down"]) / 1e6,
            "hours": totals["seconds"] / 3600,
            "joules": totals["joules"],
        }
        for name, value in own.items():
            if value is not None:
                figures.setdefault(name, []).append(value)
    curves = {
        whose: _mean_curves([metrics for _, metrics in runs], f"{whose}/{metric}")
        for whose in ("validation", "personal")
    }
    values = [client["test"].get(metric) for results, _ in runs for client in results["clients"]]
    clients = sorted(value for value in values if value is not None)
    return {"metric": metric, "figures": figures, "curves": curves, "clients": clients}


def _mean_curves(
    seeds: Sequence[Sequence[Mapping[str, float]]], name: str
) -> dict[str, list[float]]:
    """ "rounds", "megabytes", "hours" and "values" of one curve, means over seeds."""
    columns: dict[str, list[float]] = {
        key: [] for key in ("rounds", "megabytes", "hours", "values")
    }
    for lines in zip(*([line for line in metrics if name in line] for metrics in seeds)):
        mean = {key: float(np.mean([line.get(key, 0.0) for line in lines])) for key in lines[0]}
        if not np.isfinite(mean[name]):
            continue  # a client's own model has diverged; JSON has no infinity
        wire = sum(mean.get(f"total/bytes_{way}", 0.0) for way in ("up", "down"))
        columns["rounds"].append(mean["step"])
        columns["megabytes"].append(wire / 1e6)
        columns["hours"].append(mean.get("total/seconds", 0.0) / 3600)
        columns["values"].append(mean[name])
    return columns


def text_table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of all algorithms, for a terminal."""
    rows = [["algorithm", *COLUMNS.values()]]
    for name, part in parts.items():
        rows.append([name, *(plus_minus(part["figures"].get(key, [])) for key in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()
        for cells in rows
    )
