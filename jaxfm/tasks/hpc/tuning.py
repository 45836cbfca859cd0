"""What a configuration of a parallel loop costs, by counts and never by time.

A configuration is a form of the loop (as given, interchanged, in square tiles), how often its
innermost loop is unrolled, and the schedule of its iterations. The model is plain, and the same on
every machine: `THREADS` threads with a cache of their own (direct mapped, `SETS` lines of 8
elements); each element that is reached costs 1, one that misses the cache `MISS` more; each trip
of the innermost loop `TRIP`, each run of it `SETUP` where it is unrolled, as its rest has a loop of
its own; where the unrolled body reaches more than `REGISTERS` elements, every other one is reached
twice. Each chunk of iterations that is fetched `FETCH`, or `DEAL` where the schedule is static.
The cost of a configuration is that of the thread that ends last. Accesses are those of a serial run
of the form (`interpreter.accesses`), with rows of arrays one after the other, as in C.
"""

from __future__ import annotations

import heapq
import itertools
from typing import NamedTuple

import numpy as np

from jaxfm.tasks.hpc.interpreter import accesses
from jaxfm.tasks.hpc.program import Array, Assign, For, Number, Path, Program, Ref, walk
from jaxfm.tasks.hpc.proofs.clauses import replaced, statement_at, with_pragma
from jaxfm.tasks.hpc.proofs.contents import size_of, sizes_of
from jaxfm.tasks.hpc.transforms import inner_loop, interchanged, tiled_nest

THREADS, SETS = 4, 32
MISS, TRIP, SETUP, FETCH, DEAL, REGISTERS = 10, 3, 6, 30, 2, 16
TILE = 8
MARK = "mark_of_iterations"


class Configuration(NamedTuple):
    """A form, how often the innermost loop is unrolled, and a schedule with its chunk."""

    form: str
    unroll: int
    schedule: str
    chunk: int


GRID = tuple(
    Configuration(form, unroll, *schedule)
    for form, unroll, schedule in itertools.product(
        ("given", "interchanged", "tiled"), (1, 4), (("static", 0), ("static", 1), ("dynamic", 4))
    )
)
"""Configurations; chunk 0 of a static schedule is one even part for each thread. Where a form does
not apply, the loop stays as it is given."""


def fits(program: Program, path: Path) -> bool:
    """Whether the model knows the loop: outermost, step 1, with at most one loop inside it."""
    loop = statement_at(program.body, path)
    assert isinstance(loop, For)
    inside = [s for _, s in walk(loop.body) if isinstance(s, For)]
    return (
        len(path) == 1 and loop.step == 1 and len(inside) <= 1 and all(x.step == 1 for x in inside)
    )


def costs(program: Program, path: Path) -> tuple[float, ...]:
    """The cost of each configuration of `GRID` for a serial loop that is free and fits."""
    forms: dict[str, tuple[list[np.ndarray], list[list[int]]]] = {}
    for form in ("given", "interchanged", "tiled"):
        changed = formed(program, path, form)
        if changed is None:
            forms[form] = forms["given"]
        else:
            forms[form] = (_reached(changed, path), _trips(changed, path))
    return tuple(_makespan(*forms[configuration.form], configuration) for configuration in GRID)


def formed(program: Program, path: Path, form: str) -> Program | None:
    """The program with its loop in a form; None where the form does not apply."""
    serial = with_pragma(program, path, None)
    loop = statement_at(serial.body, path)
    assert isinstance(loop, For)
    if form == "given":
        return serial
    inner = inner_loop(loop)
    if inner is None or loop.step != 1 or inner.step != 1:
        return None
    new = interchanged(loop) if form == "interchanged" else tiled_nest(loop, TILE, ("t0_", "t1_"))
    return serial._replace(body=replaced(serial.body, path, (new,)))


def _reached(program: Program, path: Path) -> list[np.ndarray]:
    """The places that each iteration of the loop at a path reaches, in order."""
    loop = statement_at(program.body, path)
    assert isinstance(loop, For)
    mark = Assign(Ref(MARK, (Number(0),)), Number(0))
    marked = (loop._replace(body=(mark, *loop.body)), mark)
    arrays = (*program.arrays, Array(MARK, (Number(1),), "int"))
    seen = accesses(program._replace(arrays=arrays, body=replaced(program.body, path, marked)))
    parts = np.split(seen, np.flatnonzero(seen == _place_of_mark(program)))
    return [part[1:] for part in parts[1:-1]]


def _place_of_mark(program: Program) -> int:
    known, place = sizes_of(program), 0
    for array in program.arrays:
        length = int(np.prod([size_of(extent, known) for extent in array.shape], dtype=int))
        place += -(-length // 8) * 8
    return place


def _trips(program: Program, path: Path) -> list[list[int]]:
    """Of each iteration of the loop at a path: the trips of each run of its innermost loop.

    An iteration without an inner loop has none.
    """

    def inside(body, known: dict[str, int]) -> list[int]:
        found: list[int] = []
        for _, loop in walk(body):
            if isinstance(loop, For):
                span = _span(loop, known)
                if not any(isinstance(s, For) for _, s in walk(loop.body)):
                    return [len(span)]
                for i in span:
                    found += inside(loop.body, {**known, loop.var: i})
                return found
        return found

    loop = statement_at(program.body, path)
    assert isinstance(loop, For)
    known = sizes_of(program)
    return [inside(loop.body, {**known, loop.var: i}) for i in _span(loop, known)]


def _span(loop: For, known: dict[str, int]) -> range:
    return range(size_of(loop.lower, known), size_of(loop.upper, known), loop.step)


def _makespan(reached: list[np.ndarray], trips: list[list[int]], how: Configuration) -> float:
    """The cost of the thread that ends last."""
    work = [_work(len(places), runs, how) for places, runs in zip(reached, trips)]
    ends = []
    for chunks in _dealt(work, how):
        mine = [k for chunk in chunks for k in chunk]
        places = np.concatenate([reached[k] for k in mine]) if mine else np.zeros(0, np.int64)
        own = sum(work[k] for k in mine) + MISS * misses(places)
        own += sum(_loop(len(chunk), how) for chunk in chunks if chunk and not trips[chunk[0]])
        ends.append(own + len(chunks) * (FETCH if how.schedule == "dynamic" else DEAL))
    return float(max(ends))


def _work(count: int, runs: list[int], how: Configuration) -> int:
    """The cost of an iteration that reaches `count` elements, without misses."""
    spilled = how.unroll > 1 and count * how.unroll > REGISTERS * max(sum(runs), 1)
    return count + spilled * (count // 2) + TRIP + sum(_loop(trips, how) for trips in runs)


def _loop(trips: int, how: Configuration) -> int:
    """What the counting of an innermost loop costs."""
    if how.unroll == 1:
        return TRIP * trips
    return TRIP * (trips // how.unroll + trips % how.unroll) + SETUP


def _dealt(work: list[int], how: Configuration) -> list[list[range]]:
    """The chunks of iterations that each thread runs."""
    count = len(work)
    size = how.chunk or max(-(-count // THREADS), 1)
    chunks = [range(k, min(k + size, count)) for k in range(0, count, size)]
    threads: list[list[range]] = [[] for _ in range(THREADS)]
    if how.schedule == "static":
        for number, chunk in enumerate(chunks):
            threads[number % THREADS].append(chunk)
        return threads
    free = [(0, thread) for thread in range(THREADS)]
    for chunk in chunks:  # the thread that is free first fetches the next one
        at, thread = heapq.heappop(free)
        threads[thread].append(chunk)
        heapq.heappush(free, (at + FETCH + sum(work[k] for k in chunk), thread))
    return threads


def misses(places: np.ndarray) -> int:
    """How many accesses, [count] places in order, a direct-mapped cache lacks."""
    lines = places // 8
    order = np.argsort(lines % SETS, kind="stable")
    by_set = lines[order]
    kept = (by_set[1:] == by_set[:-1]).sum()  # one line has one set
    return int(len(places) - kept)
