"""What a run writes while it runs: metrics as JSONL and TensorBoard scalars, progress bars.

    with RunLog("runs/demo", resume_step=step) as log:
        for step in progress(range(step + 1, num_steps + 1), "rounds"):
            log.write(step, {"loss": loss, "tier/full/bits": bits})

`metrics.jsonl` holds one object a line, {"step": 3, "time_s": 12.5, "loss": 0.25}, with time_s the
seconds since 1970. JSON has no NaN and no infinities: they are written as the strings "nan", "inf"
and "-inf", which `float` reads, and `read_metrics` gives floats again.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from jaxfm.errors import writing
from jaxfm.trackers import Tracker, open_tracker

T = TypeVar("T")

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Appends metrics to the files of one run folder. Only process 0 writes.

    Args:
      folder: the run folder, created if it does not exist.
      resume_step: the step whose checkpoint the run goes on from. Later lines, which a run that
        died left behind, are dropped, so a curve has each step once. None starts a new log.
      tensorboard: also write `folder/tensorboard`.
      log_to: services that get the metrics, too, of `jaxfm.trackers.SERVICES`.
    Raises:
      ValueError, ModuleNotFoundError: a service that is unknown, not installed or does not answer.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        log_to: Sequence[str] = (),
    ):
        self._file = self._board = None
        self._trackers: list[Tracker] = []
        if jax.process_index() != 0:
            return
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name in log_to:
                self._trackers.append(open_tracker(name, folder, goes_on=resume_step is not None))
        except (ValueError, ModuleNotFoundError):
            self.close()
            raise
        _drop_after(folder / METRICS_FILE, -1 if resume_step is None else resume_step)
        self._file = (folder / METRICS_FILE).open("a")
        if tensorboard:
            purge_step = 0 if resume_step is None else resume_step + 1
            import tensorboardX  # late: it imports PyTorch where that is installed

            self._board = tensorboardX.SummaryWriter(
                str(folder / "tensorboard"), purge_step=purge_step
            )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line to the file, and each metric as one scalar to TensorBoard.

        Args:
          step: of the run; the next is larger.
          metrics: numbers or arrays of one element. Reading an array waits for the device, so
            write every so many steps, not within a compiled loop.
        Raises:
          TypeError: a value is not a number; it names the metric.
        """
        if self._file is None:
            return
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        now = time.time()
        # One write call a line: a kill leaves whole lines and at most one torn one.
        line = json.dumps({"step": int(step), "time_s": round(now, 3)} | numbers)
        with writing(self._file.name):
            self._file.write(line + "\n")
            self._file.flush()
        if self._board is not None:
            for name, number in numbers.items():
                self._board.add_scalar(name, float(number), step, walltime=now)
        for tracker in self._trackers:
            tracker.write(int(step), {name: float(number) for name, number in numbers.items()})

    def close(self) -> None:
        """Flushes and closes the files."""
        for file in (self._file, self._board, *self._trackers):
            if file is not None:
                file.close()
        self._file = self._board = None
        self._trackers = []


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Returns the lines of a run folder's metrics as dicts of numbers, without a torn last line.

    Raises:
      ValueError: a line is damaged; it names the line.
    """
    path = pathlib.Path(folder) / METRICS_FILE
    return [
        {name: float(x) if isinstance(x, str) else x for name, x in line.items()}
        for line in _lines(path)
    ]


def progress(items: Iterable[T], description: str, *, total: int | None = None) -> Iterable[T]:
    """Iterates with a progress bar on stderr; silent where that is not a terminal."""
    silent = not sys.stderr.isatty() or jax.process_index() != 0
    return tqdm.tqdm(items, description, total=total, disable=silent, dynamic_ncols=True)


def say_figures(head: str, line: Mapping[str, Any]) -> None:
    """Says how far a run is, on stderr where that is no terminal and shows no `progress`.

    Args:
      head: how far it is.
      line: metrics. Those of training, of the global model, of clients' own and of privacy are
        said; what smaller models come to is in the log ("validation/bucket1/...").
    """
    if sys.stderr.isatty() or jax.process_index() != 0:
        return
    said = re.compile(r"(train|validation|personal|private)/[^/]+")
    shown = [name for name in line if said.fullmatch(name)]
    sentence = ", ".join([head, *(f"{name} {line[name]:.4g}" for name in shown)])
    print(f"{sentence}.", file=sys.stderr, flush=True)


def _number(name: str, value: Any) -> int | float | str:
    """Returns a JSON value for a number."""
    array = np.asarray(value)
    # JAX's issubdtype, because NumPy's does not know bfloat16.
    is_whole = array.dtype == bool or jnp.issubdtype(array.dtype, jnp.integer)
    if array.size != 1 or not (is_whole or jnp.issubdtype(array.dtype, jnp.floating)):
        raise TypeError(
            f"The metric {name!r} is {type(value).__name__} {value!r}: write a number or an array "
            "of one element."
        )
    if is_whole:
        return int(array.item())
    number = float(array.item())
    return number if math.isfinite(number) else str(number)


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields the whole lines of a file that may end in a torn one, or not exist."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                values = json.loads(line)
                is_whole = isinstance(values["step"], int)
                for value in values.values():
                    float(value)  # "nan" and "inf" are numbers, too
            except (ValueError, KeyError, TypeError, AttributeError):
                is_whole = False
            if not is_whole:
                raise ValueError(
                    f"Line {number} of {path} is damaged: {line[:40].rstrip()!r} is not an object "
                    "with a step and numbers; remove the line, or the run."
                )
            yield values


def _drop_after(path: pathlib.Path, last_step: int) -> None:
    """Rewrites the file, atomically, without torn lines and steps beyond last_step."""
    if not path.exists():
        return
    kept = [line for line in _lines(path) if line["step"] <= last_step]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in kept))
    part.replace(path)
