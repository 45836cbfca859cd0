"""Splits of a task, drawn once by several processes and kept in a folder.

The name of a file is made of everything that decides its rows: the settings, and the text of the
modules that draw, prove and render, so that a changed generator never reads what an older one drew.
"""

from __future__ import annotations

import concurrent.futures
import functools
import gzip
import hashlib
import json
import multiprocessing
import os
import pathlib
from collections.abc import Sequence

from jaxfm.tasks.hpc.records import SPLITS, Example, Record, drawn, fresh, record

_PART = 1000


@functools.cache
def generator_version() -> str:
    """A digest of the modules that decide what is drawn."""
    here = pathlib.Path(__file__).parent
    parts = ("families", "proofs", "records")
    names = ("directives", "generator", "lexer", "mutations", "naming", "operations",
             "pragma_grammar", "program", "render", "render_fortran")  # fmt: skip
    files = [here / f"{name}.py" for name in names]
    files += [file for part in parts for file in sorted((here / part).glob("*.py"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def stored_splits(
    task: str,
    seed: int,
    train: int,
    test: int,
    names: Sequence[str] = SPLITS,
    *,
    folder: str | os.PathLike = "",
    processes: int = 1,
) -> dict[str, list[Example]]:
    """The splits of `records.splits`, read from a folder if they are there, else drawn.

    Args:
        task: The name of a record.
        seed, train, test, names: See `records.splits`.
        folder: Where splits are kept; it is made. Empty: they are not kept.
        processes: How many draw.

    Returns:
        The splits, the same for any number of processes. Rows carry no `item`.

    Raises:
        ValueError: There is no such task, or the number of processes is below 1.
    """
    if processes < 1:
        raise ValueError(f"Give at least one process, not {processes}.")
    names = [name for name in SPLITS if name in names]
    settings = json.dumps([record(task).name, seed, train, test, names, generator_version()])
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]
    file = pathlib.Path(folder) / f"{task}-{key}.json.gz" if folder else None
    if file is not None and file.exists():
        with gzip.open(file, "rt") as stream:
            kept = json.load(stream)
        return {name: [_row(*values) for values in kept[name]] for name in names}
    found = _drawn_by(record(task), seed, train, test, names, processes)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        with gzip.open(partial, "wt") as stream:
            json.dump({name: [row[:-1] for row in rows] for name, rows in found.items()}, stream)
        partial.replace(file)
    return found


def _row(source: str, label, lines: list[int], family: str) -> Example:
    return Example(source, label, tuple(lines), family)


def _part(task: str, seed: int, name: str, start: int, count: int) -> list[Example]:
    """A part of a split, in a process of its own."""
    return [row._replace(item=None) for row in drawn(record(task), seed, name, start, count)]


def _drawn_by(
    task: Record, seed: int, train: int, test: int, names: Sequence[str], processes: int
) -> dict[str, list[Example]]:
    calls = [
        (task.name, seed, name, start, min(_PART, count - start))
        for name in names
        for count in [train if name == "train" else test]
        for start in range(0, count, _PART)
    ]
    if processes == 1:
        parts = [_part(*call) for call in calls]
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
            parts = list(pool.map(_part, *zip(*calls)))
    seen: set[str] = set()
    found: dict[str, list[Example]] = {name: [] for name in names}
    for (_, _, name, _, _), rows in zip(calls, parts):
        found[name] += fresh(rows, seen)
    return found
