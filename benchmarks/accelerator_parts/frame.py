"""The frame of the parts: a clock, a record of finished cases, and one line of JSON a part.

A part is a list of named cases. A case that is done is kept in `FOLDER/<part>.json` and is not run
again by a later call with the same folder; a long case saves its own state in the folder, notes
what it has so far, and raises `OutOfTime` when its clock says so.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Figures = dict[str, Any]
HERE = pathlib.Path(__file__).parent


class OutOfTime(Exception):
    """A case stopped by itself; what it needs to go on is in the folder."""


class Clock:
    """What is left of the time that a part may take."""

    def __init__(self, seconds: float):
        self.began = time.monotonic()
        self.ends = self.began + seconds

    def left(self) -> float:
        """Seconds until the end; negative after it."""
        return self.ends - time.monotonic()

    def taken(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def check(self, seconds: float) -> None:
        """Raises OutOfTime if fewer than so many seconds are left."""
        if self.left() < seconds:
            raise OutOfTime(f"{seconds:.0f} s are needed and {self.left():.0f} s are left")


class Setting(NamedTuple):
    """What every part is given.

    Attributes:
      dry: the miniature that runs on any machine.
      folder: where states are kept between calls.
      clock: of this part.
      images: npz file of CIFAR-10, decoded; None in a dry run without data.
      weights: PyTorch's state dict of a CIFAR ResNet; None in a dry run without it.
      num_rounds: most rounds of federated training.
      rate: learning rate of federated training.
      seed: of weights, partitions and searches.
    """

    dry: bool
    folder: pathlib.Path
    clock: Clock
    images: pathlib.Path | None
    weights: pathlib.Path | None
    num_rounds: int
    rate: float
    seed: int


class Case(NamedTuple):
    """One measurement of a part.

    Attributes:
      run: `(done, note) -> figures`, where `done` holds the figures of the cases before it and
        `note(figures)` keeps what is known so far.
      least_s: seconds without which it is not worth starting.
    """

    run: Callable[[dict[str, Figures], Callable[[Figures], None]], Figures]
    least_s: float = 0.0


class Part(NamedTuple):
    """One part of the benchmark.

    Attributes:
      name: of its line and its file.
      cases: `(setting) -> {name: Case}` in the order in which they are run.
      ratio: `({name: figures}) -> the figure that the part is about`; None where its cases are not
        done.
      ratio_of: what the ratio says.
      cached: whether compiled programs may come from the folder; False where compilation counts.
    """

    name: str
    cases: Callable[[Setting], dict[str, Case]]
    ratio: Callable[[dict[str, Figures]], float | None]
    ratio_of: str
    cached: bool = True


class Record:
    """The cases of a part that are done, and what others have so far, in a JSON file.

    Raises:
      ValueError: the file is of another machine or of another kind of run.
    """

    def __init__(self, path: pathlib.Path, machine: dict[str, Any]):
        self.path = path
        self.cases: dict[str, dict[str, Any]] = {}
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["machine"] != machine:
                raise ValueError(
                    f"{path} was measured on {stored['machine']}, and this is {machine}; give "
                    "another folder."
                )
            self.cases = stored["cases"]
        self.machine = machine

    def put(self, name: str, figures: Figures, *, done: bool, seconds: float, commit: str) -> None:
        """Keeps the figures of a case; the file is replaced in one step."""
        before = self.cases.get(name, {})
        self.cases[name] = {
            "done": done,
            "figures": figures,
            "seconds": round(seconds, 1),
            "commits": sorted({*before.get("commits", []), commit}),
        }
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps({"machine": self.machine, "cases": self.cases}, indent=1))
        scratch.replace(self.path)

    def figures(self, *, done_only: bool = False) -> dict[str, Figures]:
        """The figures of each case."""
        return {n: c["figures"] for n, c in self.cases.items() if c["done"] or not done_only}


def run_part(part: Part, setting: Setting, commit: str) -> dict[str, Any]:
    """Runs the cases that are not done, as far as time allows, and returns the part's line."""
    machine = {"card": card(), "dry_run": setting.dry}
    record = Record(setting.folder / f"{part.name}.json", machine)
    failed: dict[str, str] = {}
    cases = part.cases(setting)
    cache = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", cache and part.cached)
    for name, case in cases.items():
        before = record.cases.get(name, {"done": False, "seconds": 0.0})
        if before["done"]:
            continue
        began = time.monotonic()
        spent = lambda s=before["seconds"], b=began: s + time.monotonic() - b
        note = lambda figures, n=name, t=spent: record.put(
            n, figures, done=False, seconds=t(), commit=commit
        )
        try:
            setting.clock.check(0.0 if setting.dry else case.least_s)
            figures = case.run(record.figures(done_only=True), note)
        except OutOfTime as reason:
            print(f"{part.name}: {name} stops: {reason}", flush=True)
            break
        except Exception as error:  # the other cases are still worth their time
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        record.put(name, figures, done=True, seconds=spent(), commit=commit)
        print(f"{part.name}: {name} {json.dumps(figures)} ({spent():.0f} s)", flush=True)
    jax.config.update("jax_enable_compilation_cache", cache)
    return line_of(part, record, list(cases), failed, setting.clock.taken(), commit)


def line_of(
    part: Part, record: Record, names: list[str], failed: dict[str, str], seconds: float,
    commit: str,
) -> dict[str, Any]:  # fmt: skip
    """The part's JSON object."""
    done = record.figures(done_only=True)
    ratio = part.ratio(record.figures())
    return {
        "name": f"accelerator_{part.name}",
        "complete": all(name in done for name in names),
        "ratio": None if ratio is None else round(ratio, 3),
        "ratio_of": part.ratio_of,
        "figures": record.figures(),
        "left": [name for name in names if name not in done],
        "failed": failed,
        "card": record.machine["card"],
        "dry_run": record.machine["dry_run"],
        "jax": jax.__version__,
        "commit": commit,
        "seconds": round(seconds, 1),
        "seconds_all": round(sum(case["seconds"] for case in record.cases.values()), 1),
    }


def card() -> str:
    """What the first device is, and how many of them there are."""
    devices = jax.devices()
    return f"{devices[0].device_kind} x{len(devices)}"


def commit_of(given: str) -> str:
    """The commit measured: as given, or what git says of this file's folder."""
    if given:
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        found = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median wall-clock seconds of a call whose result is waited for, after one to warm up."""
    jax.block_until_ready(run())
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def fastest(seconds: dict[int, float]) -> int:
    """The key of the smallest number of seconds."""
    return min(seconds, key=lambda key: seconds[key])


def digits(x: float, count: int = 4) -> float:
    """x with so many significant digits."""
    return float(f"{x:.{count}g}")
