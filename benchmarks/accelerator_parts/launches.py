"""How many kernels a compiled loop launches, read from its optimised HLO, or from a profile.

In an optimised program for a GPU nearly every instruction of a loop's body is one kernel: a fusion,
a library call, a copy. Counting them says what a token costs besides its bytes.
"""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

# Instructions that only name, group or wait for what others made.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
    "add-dependency", "opt-barrier", "partition-id", "replica-id", "copy-done", "all-reduce-done",
    "async-done", "async-update", "domain",
}  # fmt: skip
_OPENING = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s.*\{\s*$")
_OPERATION = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)')
_CALLED = re.compile(
    r"(condition|body|to_apply|calls|called_computations|branch_computations|true_computation"
    r"|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation by its name, and the name of the entry."""
    found: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in hlo.splitlines():
        opening = _OPENING.match(line)
        if opening and not line.startswith("HloModule"):
            name = opening[2]
            found[name] = []
            entry = name if opening[1] else entry
        elif line.startswith("}"):
            name = ""
        elif name and " = " in line:
            found[name].append(line.split(" = ", 1)[1])
    return found, entry


def _called(text: str, *kinds: str) -> list[str]:
    """The computations that an instruction's text names in attributes of some kinds."""
    return [
        part.strip().lstrip("%")
        for kind, names in _CALLED.findall(text)
        if kind in kinds
        for part in names.strip("{}").split(",")
    ]


def kernels(hlo: str) -> dict[str, int]:
    """Kernels by kind in one turn of the outermost loop whose number of turns is not known.

    Loops inside it are counted as often as they turn ("unknown_loops" where the program does not
    say how often, counted once). Without such a loop, the whole program is counted.
    """
    parts, entry = computations(hlo)
    total: collections.Counter[str] = collections.Counter()

    def add(name: str, times: int) -> None:
        for text in parts.get(name, []):
            operation = _OPERATION.search(text)
            if operation is None or operation[1] in _FREE:
                continue
            kind = operation[1]
            if kind == "while":
                turns = _TRIPS.search(text)
                if turns is None:
                    total["unknown_loops"] += times
                for inner in _called(text, "body") + ([] if turns else _called(text, "condition")):
                    add(inner, times * (int(turns[1]) if turns else 1))
            elif kind == "conditional":
                add(_largest(_called(text, "branch_computations", "true_computation")), times)
            elif kind in ("call", "async-start"):
                for inner in _called(text, "to_apply", "calls", "called_computations"):
                    add(inner, times)
            else:
                total[kind] += times

    def _largest(names: list[str]) -> str:
        return max(names, key=lambda name: len(parts.get(name, [])), default="")

    loops = [text for text in parts.get(entry, []) if " while(" in text and not _TRIPS.search(text)]
    if loops:
        for inner in _called(loops[0], "body", "condition"):
            add(inner, 1)
    else:
        add(entry, 1)
    return dict(total)


def launched(hlo: str) -> int:
    """The number of kernels of `kernels`."""
    return sum(count for kind, count in kernels(hlo).items() if kind != "unknown_loops")


def profiled(run: Callable[[], Any]) -> dict[str, float] | None:
    """Kernels that a call launched on the first GPU, and their seconds, by the profiler.

    None where there is no GPU, or the profiler recorded none.
    """
    if jax.default_backend() != "gpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
        if not files:
            return None
        data = jax.profiler.ProfileData.from_file(str(files[-1]))
        count, nanoseconds = 0, 0.0
        for plane in data.planes:
            if not plane.name.startswith("/device:GPU:0"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        count, nanoseconds = count + 1, nanoseconds + event.duration_ns
    return {"kernels": count, "busy_s": nanoseconds / 1e9} if count else None
