"""T2: write the directive of a loop; the label is its text."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from jaxfm.tasks.hpc.families import LOOPS
from jaxfm.tasks.hpc.generator import Item, asked
from jaxfm.tasks.hpc.naming import restyle
from jaxfm.tasks.hpc.proofs.clauses import propose
from jaxfm.tasks.hpc.records.baselines import majority
from jaxfm.tasks.hpc.records.contract import Example, Record, register
from jaxfm.tasks.hpc.render import loop_source, pragma_source


def loop(item: Item, rng: random.Random, language: str) -> Iterator[Example]:
    """A loop without its directive; `item.program` has the names of the source."""
    if item.target is None or item.pragma is None or language not in item.languages:
        return
    program, style = restyle(asked(item), rng)
    pragma = propose(program, item.target).pragma
    if pragma is None:
        return
    shown = loop_source(program, language, style)  # type: ignore[arg-type]
    answer = pragma_source(pragma, program, language)  # type: ignore[arg-type]
    yield Example(shown.text, answer, (), item.family, item._replace(program=program))


def exact(labels: Sequence, predictions: Sequence) -> dict[str, float]:
    """The share of directives that are the expected text; of those with clauses, too."""
    same = np.array([a == b for a, b in zip(labels, predictions)], float)
    rich = np.array([str(a).endswith(")") for a in labels])
    return {"exact": float(same.mean()), "exact_with_clauses": float(same[rich].mean())}


def bare(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """`parallel for` without a clause."""
    return np.array(["#pragma omp parallel for"] * len(test))


register(Record("pragma", loop, tuple(LOOPS), exact,
                {"majority": majority, "bare": bare}, "verifiers.verified"))  # fmt: skip
