"""Simulates decoding on a given cluster: its stages, its links and the draft.

    python -m jaxfm.launch.simulate --stages=8 --right=0.66 --draft_s=0.5
    python -m jaxfm.launch.simulate --stages=14 --right=0.66,0.78,0.84,0.88 --width=4

Compares plain pipelined decoding, draft-then-verify (with its best and with a fixed draft length)
and continuous speculation (as published, as a chain, as a tree) on the same text, and writes a
report with plots over stages, acceptance and link time. Times are in units of a stage's time, or in
seconds.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxfm import config as configs
from jaxfm.config import check, check_whole, option
from jaxfm.parallel.pipe.speed import Pipe, choose, continuous_rate, linear_cost, plain_rate
from jaxfm.parallel.simulation.comparison import compare, speed_ups
from jaxfm.parallel.simulation.simulator import Timing
from jaxfm.report import Report, heading, line_plot, row, table, write


@dataclasses.dataclass(frozen=True)
class SimulateConfig:
    """A cluster, and how good its draft is."""

    stages: int = option(8, "nodes that the target is cut over")
    stage_s: float = option(1.0, "time a stage takes for one token")
    draft_s: float = option(0.5, "time the draft takes for one token")
    link_s: float = option(0.05, "time of a hop between stages")
    token_cost: float = option(
        0.0, "share of a stage's time that each further token of a packet adds"
    )
    right: tuple[float, ...] = option(
        (0.66,), "probability that the next token is among the draft's first, first two, ..."
    )
    width: int = option(1, "candidates kept alive at each depth by the tree")
    levels: int = option(1, "tokens of a path drafted at once")
    fixed_length: int = option(8, "draft length of the fixed draft-then-verify")
    tokens: int = option(1000, "tokens of the text")
    slow: tuple[float, ...] = option((), "slowdown factor of each stage; default: 1 for all")
    jitter: float = option(0.0, "standard deviation of the logarithm of all times")
    seed: int = option(0, "seed of the text and the jitter")
    report: str = option("runs/simulate/report.html", "file of the report")

    def __post_init__(self):
        check(self)
        counts = dict.fromkeys(("stages", "width", "levels", "fixed_length", "tokens"), 1)
        check_whole(self, counts | {"seed": 0})
        if self.stage_s == 0:
            raise ValueError("stage_s=0.0: a stage takes some time; give a time above 0.")
        for name in ("stage_s", "draft_s", "link_s", "token_cost", "jitter"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give a time of at least 0.")
        rising = sorted(self.right) == list(self.right)
        if not self.right or not rising or not 0 <= self.right[0] <= self.right[-1] <= 1:
            raise ValueError(f"right={self.right}: give rising probabilities between 0 and 1.")
        if self.width > len(self.right):
            raise ValueError(
                f"width={self.width} candidates are kept, but --right has {len(self.right)} "
                "probabilities only."
            )
        if self.slow and (len(self.slow) != self.stages or not _all_positive(self.slow)):
            raise ValueError(
                f"slow={self.slow}: give one factor above 0 for each of {self.stages} stages."
            )
        if pathlib.Path(self.report).is_dir():
            raise ValueError(f"report={self.report} is a folder; give the name of a file.")


def _all_positive(numbers: Sequence[float]) -> bool:
    return all(0 < number < math.inf for number in numbers)


def pipe_of(config: SimulateConfig) -> Pipe:
    """The cluster's times."""
    return Pipe(
        stages=config.stages,
        stage_s=config.stage_s,
        draft_s=config.draft_s,
        link_s=config.link_s,
        cost=linear_cost(config.token_cost),
    )


def timings(config: SimulateConfig) -> dict[str, Timing]:
    """Every way of decoding the same text on the same cluster."""
    return compare(
        pipe_of(config), config.right, tokens=config.tokens, width=config.width,
        levels=config.levels, fixed_length=config.fixed_length, factors=config.slow or None,
        jitter=config.jitter, seed=config.seed,
    )  # fmt: skip


def _sweep(config: SimulateConfig, name: str, values: Sequence) -> dict[str, tuple[list, list]]:
    """Speed-up over plain decoding by one setting, for the ways that compete."""
    curves: dict[str, tuple[list, list]] = {}
    for value in values:
        changes: dict[str, Any] = {name: value, "tokens": 400}
        if name == "stages":
            changes["slow"] = ()
        for way, gain in speed_ups(timings(dataclasses.replace(config, **changes))).items():
            xs, ys = curves.setdefault(way, ([], []))
            xs.append(value[0] if isinstance(value, tuple) else value)
            ys.append(gain)
    return curves


def main(config: SimulateConfig) -> None:
    """Prints a table and writes the report."""
    ways = timings(config)
    plain = ways["plain"]
    columns = ["way", "speed-up", "tokens a unit", "first token", "between: p50", "p99", "in use",
               "wasted"]  # fmt: skip
    figures = lambda p: (
        p.rate / plain.rate, p.rate, p.first, p.between(50), p.between(99), p.utilisation,
        p.wasted / max(p.busy, 1e-12),
    )  # fmt: skip
    rows = [[name, *map(float, figures(p))] for name, p in ways.items()]
    for cells in rows:
        print(f"{cells[0]:34s} {cells[1]:5.2f}x  in use {cells[6]:4.0%}, wasted {cells[7]:4.0%}")
    pipe = pipe_of(config)
    best = choose(pipe, config.right, levels=config.levels)
    model = continuous_rate(pipe, config.right[0], levels=config.levels) / plain_rate(pipe)
    print(f"by the closed form the chain gives {model:.2f}x; best: width {best.width}, "
          f"levels {best.levels}, {best.rate / plain_rate(pipe):.2f}x")  # fmt: skip
    single = dataclasses.replace(config, width=1, right=config.right[:1])
    plots = row(
        line_plot(_sweep(config, "stages", (2, 4, 8, 16)), x_label="stages", y_label="speed-up"),
        line_plot(
            _sweep(config, "link_s", [config.stage_s * x for x in (0, 0.25, 0.5, 1, 2)]),
            x_label="time of a hop", y_label="speed-up",
        ),
        line_plot(
            _sweep(single, "right", [(x,) for x in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)]),
            x_label="probability that the draft is right", y_label="speed-up",
        ),
    )  # fmt: skip
    parts = (
        heading("On this cluster", "The same text in every way; times in the units given."),
        table(columns, rows, best={"speed-up": max}),
        heading("Elsewhere", "Speed-up over plain decoding through the same pipe."),
        plots,
    )
    path = pathlib.Path(config.report)
    write(Report("Decoding on a cluster", f"{config.stages} stages", parts), path)
    print(f"report: {path}")


if __name__ == "__main__":
    configs.run(main, SimulateConfig)
