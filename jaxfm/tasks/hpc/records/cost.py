"""T5: how much does a loop do for its sizes? The label is log10 of the operations of a serial run.

What is counted is exact and needs no tool: assignments, floating-point operations, elements read
and written (see `jaxfm.tasks.hpc.operations`). Sizes are drawn anew over two decades and stand
before the loop, since without them nothing can be said.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence

import numpy as np

from jaxfm.tasks.hpc.families import LOOPS
from jaxfm.tasks.hpc.generator import Item, asked
from jaxfm.tasks.hpc.naming import restyle
from jaxfm.tasks.hpc.operations import Operations, elements, operations, step, work
from jaxfm.tasks.hpc.program import Assign, Expr, For, If, Program, Ref, dtypes, walk
from jaxfm.tasks.hpc.proofs.clauses import statement_at
from jaxfm.tasks.hpc.proofs.contents import size_of, sizes_of
from jaxfm.tasks.hpc.records.baselines import words
from jaxfm.tasks.hpc.records.contract import Example, Record, register
from jaxfm.tasks.hpc.render import loop_source

SMALLEST, LARGEST = 16, 1600
SIZE = re.compile(r"^(?:int )?\w+ = (\d+);?$", re.MULTILINE)


def loop(item: Item, rng: random.Random, language: str) -> Iterator[Example]:
    """The serial loop after its sizes; `item` has the program with the names of the source."""
    if language not in item.languages:
        return
    serial = item.program if item.target is None else asked(item)
    program, style = restyle(resized(serial, rng), rng)
    counts = operations(program)
    shown = loop_source(program, language, style).text  # type: ignore[arg-type]
    head = "".join(
        f"int {size.name} = {size.value};\n" if language == "c" else f"{size.name} = {size.value}\n"
        for size in program.sizes
    )
    known = item._replace(program=program, operations=counts)
    yield Example(head + shown, math.log10(total(counts)), (), item.family, known)


def resized(program: Program, rng: random.Random) -> Program:
    """A program with other sizes, their logarithms drawn evenly."""
    low, high = math.log(SMALLEST), math.log(LARGEST)
    draw = lambda: round(math.exp(rng.uniform(low, high)))
    return program._replace(sizes=tuple(s._replace(value=draw()) for s in program.sizes))


def total(counts: Operations) -> int:
    """All operations together, at least 1."""
    moved = sum(counts.loads.values()) + sum(counts.stores.values())
    return max(counts.statements + counts.flops + moved, 1)


def figures(labels: Sequence, predictions: Sequence) -> dict[str, float]:
    """How well logarithms are predicted.

    Returns:
        "spearman" (0 where all predictions are equal), "pair_accuracy" (of pairs that differ, the
        share put in their order; equal predictions count a half), "log10_error" (mean), "factor"
        (the median of how many times too large or too small).
    """
    from scipy import stats

    y, p = np.asarray(labels, float), np.asarray(predictions, float)
    first, second = np.triu_indices(len(y), 1)
    truth, guess = np.sign(y[first] - y[second]), np.sign(p[first] - p[second])
    apart = truth != 0
    rank = stats.spearmanr(y, p).statistic if np.ptp(p) > 0 and np.ptp(y) > 0 else 0.0
    return {
        "spearman": float(rank),
        "pair_accuracy": float(((1 + truth * guess) / 2)[apart].mean()) if apart.any() else 0.5,
        "log10_error": float(np.abs(y - p).mean()),
        "factor": float(10 ** np.median(np.abs(y - p))),
    }


def mean(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """The mean of the training rows."""
    return np.full(len(test), np.mean([float(row.label) for row in train]))  # type: ignore[arg-type]


def words_and_sizes(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """Least squares on how often each piece occurs, and on the logarithms of the sizes."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import Ridge

    counts = CountVectorizer(analyzer=words, min_df=2)
    sizes = lambda rows: np.array([_sizes(row) for row in rows])
    seen = counts.fit_transform([row.source for row in train]).toarray()
    model = Ridge(1.0).fit(np.hstack([seen, sizes(train)]), [row.label for row in train])
    shown = counts.transform([row.source for row in test]).toarray()
    return model.predict(np.hstack([shown, sizes(test)]))


def _sizes(row: Example) -> list[float]:
    logs = sorted(math.log10(int(value)) for value in SIZE.findall(row.source))
    return [sum(logs), logs[-1] if logs else 0.0]


def linear(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """Least squares on what is read off the program: trips, operations, strides."""
    from sklearn.linear_model import Ridge

    model = Ridge(1e-3).fit(_features(train), [row.label for row in train])
    return model.predict(_features(test))


def nearest(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """The mean of the five nearest training rows by the same features."""
    from sklearn.neighbors import KNeighborsRegressor

    model = KNeighborsRegressor(min(5, len(train)))
    return model.fit(_features(train), [row.label for row in train]).predict(_features(test))


def _features(rows: Sequence[Example]) -> np.ndarray:
    found = [features(row.item.program) for row in rows if row.item is not None]
    if len(found) < len(rows):
        raise ValueError(
            "These rows were read from a file and have no programs, which this baseline reads; "
            "draw them by `records.splits`."
        )
    return np.array(found)


def features(program: Program) -> list[float]:
    """Of a program: log10 of the trips of its longest nest, of operations in its text, and others.

    Bounds that depend on loops around them are taken in the middle of those loops.
    """
    types, known = dtypes(program), sizes_of(program)
    trips, deepest, flops, refs, indirect, branches = 0.0, 0, 0, 0, 0, 0
    for path, statement in walk(program.body):
        around = [statement_at(program.body, path[:k]) for k in range(1, len(path) + 1)]
        loops = [x for x in around if isinstance(x, For)]
        branches += isinstance(statement, If)
        if isinstance(statement, Assign):
            values = dict(known)
            logs = [math.log10(max(_span(x, values), 1)) for x in loops]
            trips, deepest = max(trips, sum(logs)), max(deepest, len(loops))
            flops += work(statement.value, types) + bool(statement.update)
            found = [*elements(statement.value), *_target(statement.target)]
            refs += len(found)
            inner = loops[-1].var if loops else ""
            indirect += sum(step(ref, inner) in ("indirect", "row") for ref in found)
    counted = math.log10(1 + flops + refs)
    return [trips, deepest, counted, float(indirect), float(branches), float(refs)]


def _target(target: Expr) -> Iterator[Ref]:
    yield from elements(target)


def _span(loop: For, values: dict[str, int]) -> int:
    """How often a loop runs; its variable is put in the middle of its range, in `values`."""
    try:
        span = range(size_of(loop.lower, values), size_of(loop.upper, values), loop.step)
    except ValueError:
        span = range(1)
    values[loop.var] = span[len(span) // 2] if span else 0
    return len(span)


register(Record("cost", loop, tuple(LOOPS), figures,
                {"mean": mean, "words and sizes": words_and_sizes, "linear": linear,
                 "nearest": nearest}, "operations"))  # fmt: skip
