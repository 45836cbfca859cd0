"""T2: write the directive of a loop; the label is its text, or "none" where none is right."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from jaxfm.tasks.hpc.directives import PLACES, Question, canonical, placed
from jaxfm.tasks.hpc.families import LOOPS
from jaxfm.tasks.hpc.generator import Item, asked
from jaxfm.tasks.hpc.lexer import rename, restore
from jaxfm.tasks.hpc.naming import restyle
from jaxfm.tasks.hpc.pragma_grammar import NONE
from jaxfm.tasks.hpc.proofs.clauses import propose
from jaxfm.tasks.hpc.records.baselines import grams, majority, words
from jaxfm.tasks.hpc.records.contract import Example, Record, register
from jaxfm.tasks.hpc.render import Language, loop_source


def loop(item: Item, rng: random.Random, language: str) -> Iterator[Example]:
    """A loop with a place for its directive; `item.program` has the names of the source."""
    if item.target is None or language not in item.languages:
        return
    program, style = restyle(asked(item), rng)
    proposal = propose(program, item.target)
    if proposal.trace.unknown or proposal.order:
        return
    spoken: Language = language  # type: ignore[assignment]
    source = placed(loop_source(program, spoken, style), item.target, spoken)
    answer = proposal.pragma and canonical(proposal.pragma, program, source, spoken)
    yield Example(source, answer or NONE, (), item.family, item._replace(program=program))


def question(example: Example) -> Question:
    """What an example of this task asks, with what verifiers and the grammar need of it."""
    assert example.item is not None and example.item.target is not None
    language: Language = "fortran" if PLACES["fortran"] in example.source else "c"
    return Question(
        source=example.source, answer=str(example.label), program=example.item.program,
        path=example.item.target, language=language, family=example.family,
    )  # fmt: skip


def exact(labels: Sequence, predictions: Sequence) -> dict[str, float]:
    """The share of directives that are the expected text; of those that are not trivial, too.

    Trivial is a directive without clauses.
    """
    same = np.array([a == b for a, b in zip(labels, predictions)], float)
    rich = np.array([not_trivial(str(a)) for a in labels])
    return {"exact": float(same.mean()), "exact_not_trivial": float(same[rich].mean())}


def not_trivial(answer: str) -> bool:
    """Whether an answer has clauses, or says that there is none."""
    return answer == NONE or answer.endswith(")")


def bare(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """`parallel for` without a clause."""
    return np.array(["#pragma omp parallel for"] * len(test))


def nearest(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """The answer to the most similar loop, by 1- to 3-grams of pieces with names by their order."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    own, others = ([rename(row.source) for row in rows] for rows in (train, test))
    counts = TfidfVectorizer(analyzer=lambda text: grams(words(text), 3), min_df=2)
    known = counts.fit_transform([loop.text for loop in own])
    found = []
    for loop in others:
        place = int((known @ counts.transform([loop.text]).T).toarray().argmax())
        back = {name: short for short, name in own[place].names.items()}
        found.append(restore(restore(str(train[place].label), back), loop.names))
    return np.array(found)


register(Record("pragma", loop, tuple(LOOPS), exact,
                {"majority": majority, "bare": bare, "nearest": nearest},
                "verifiers.verified"))  # fmt: skip
