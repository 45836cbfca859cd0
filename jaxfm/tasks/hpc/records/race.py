"""T1, T3: has a loop, or an OpenMP program, a data race; and at which lines?

"race-detection" shows a loop with its directive. "program-race" shows a whole function, regions,
sections and tasks among them, and asks for the lines of the racing pair, too. The label is 1 for a
race, 0 for none. Sizes that are symbols in the source may be anything, so it is the race for any of
them that counts; those that are numbers count as they are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from jaxfm.tasks.hpc.families import FAMILIES, LOOPS
from jaxfm.tasks.hpc.generator import Item
from jaxfm.tasks.hpc.naming import restyle
from jaxfm.tasks.hpc.program import Rendered
from jaxfm.tasks.hpc.proofs.enumeration import at_any_size
from jaxfm.tasks.hpc.records.baselines import majority, ngrams
from jaxfm.tasks.hpc.records.contract import Example, Record, register
from jaxfm.tasks.hpc.render import loop_source, to_c, to_fortran


def loop(item: Item, rng: random.Random, language: str) -> Iterator[Example]:
    """The loop with its directive."""
    if language in item.languages:
        program, style = restyle(item.program, rng)
        yield _example(loop_source(program, language, style), item)  # type: ignore[arg-type]


def function(item: Item, rng: random.Random, language: str) -> Iterator[Example]:
    """The whole function."""
    if language in item.languages:
        program, style = restyle(item.program, rng)
        write = to_fortran if language == "fortran" else to_c
        yield _example(write(program, style=style), item)


def _example(shown: Rendered, item: Item) -> Example:
    pair = at_any_size(item.program).conflict
    paths = (pair.first.path, pair.second.path) if pair else ()
    lines = tuple(sorted({shown.lines[path] for path in paths if path in shown.lines}))
    return Example(shown.text, int(pair is not None), lines, item.family, item)


def figures(labels: Sequence, predictions: Sequence) -> dict[str, float]:
    """Accuracy, F1 and others; predictions above 0.5 are races.

    Returns:
        "accuracy", "macro_f1", "f1" of races, "mcc" (Matthews' correlation), "specificity" (the
        share of race-free rows that are called so), "safe_precision" (of the rows that are called
        race-free, the share that is; 0 where none is called so).
    """
    from sklearn import metrics

    y, p = np.asarray(labels, int), (np.asarray(predictions) > 0.5).astype(int)
    safe = {"pos_label": 0, "zero_division": 0}
    return {
        "accuracy": float((y == p).mean()),
        "macro_f1": float(metrics.f1_score(y, p, average="macro", zero_division=0)),
        "f1": float(metrics.f1_score(y, p, zero_division=0)),
        "mcc": float(metrics.matthews_corrcoef(y, p)),
        "specificity": float(metrics.recall_score(y, p, **safe)),
        "safe_precision": float(metrics.precision_score(y, p, **safe)),
    }


def places(rows: Sequence[Example], ranked: Sequence[Sequence[int]]) -> dict[str, float]:
    """How well ranked lines find the racing pair, over the rows that have one.

    Args:
        rows: Examples.
        ranked: Lines of each, the likeliest first; those of race-free rows do not count.

    Returns:
        "pair_hit_at_1": the first lines, as many as the pair has, are the pair's. "line_hit_at_1":
        the first line is one of them. "line_mrr": mean of 1 / rank of the first that is.
    """
    pairs = [(set(row.lines), list(lines)) for row, lines in zip(rows, ranked) if row.lines]
    ranks = [
        next((1 / n for n, line in enumerate(lines, 1) if line in pair), 0) for pair, lines in pairs
    ]
    exact = [set(lines[: len(pair)]) == pair for pair, lines in pairs]
    first = [lines[:1] != [] and lines[0] in pair for pair, lines in pairs]
    mean = lambda values: float(np.mean(values)) if values else float("nan")
    return {"pair_hit_at_1": mean(exact), "line_hit_at_1": mean(first), "line_mrr": mean(ranks)}


def last_writes(train: Sequence[Example], test: Sequence[Example]) -> list[list[int]]:
    """Lines that assign, the last one first."""
    del train
    found = []
    for row in test:
        lines = enumerate(row.source.splitlines(), 1)
        assigned = [n for n, text in lines if "=" in text and _assigns(text)]
        found.append(assigned[::-1])
    return found


def _assigns(text: str) -> bool:
    head = text.split()[0].lower()
    return not head.startswith(("for", "do", "if", "#", "!$", "double", "float", "int", "long"))


register(Record("race-detection", loop, tuple(LOOPS), figures,
                {"majority": majority, "1-5-grams": ngrams}, "proofs.enumeration"))  # fmt: skip
register(Record("program-race", function, tuple(FAMILIES), figures,
                {"majority": majority, "1-5-grams": ngrams}, "proofs.enumeration",
                places, {"last writes": last_writes}))  # fmt: skip
