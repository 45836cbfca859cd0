"""The tasks as records: data, splits, metric, trivial baselines, verifier.

A record says how items become examples and with which trivial baselines every figure must stand;
one without a baseline does not register. Splits are made by the generator's own classes, and rows
that another split holds in the same normal form are left out, so nothing is seen twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxfm.plain_types import suggest
from jaxfm.tasks.hpc.families import LOOPS
from jaxfm.tasks.hpc.generator import Item, asked, generate
from jaxfm.tasks.hpc.lexer import lex, normalized
from jaxfm.tasks.hpc.naming import restyle
from jaxfm.tasks.hpc.proofs.clauses import propose
from jaxfm.tasks.hpc.render import loop_source, pragma_source

UNSEEN_FAMILIES = ("stencil", "guard", "scan", "critical")
SPLITS = (
    "train", "validation", "in distribution", "unseen coefficients", "unseen family",
    "longer bodies", "other language", "renamed",
)  # fmt: skip


class Example(NamedTuple):
    """A source and its answer.

    Attributes:
        source: What a model reads.
        label: The answer: 1 for a race, or the directive's text.
        lines: The lines (from 1) of the racing pair; empty without one.
        family: The generator's.
        item: What the generator knows, for verifiers.
    """

    source: str
    label: int | str
    lines: tuple[int, ...]
    family: str
    item: Item


Baseline = Callable[[Sequence[Example], Sequence[Example]], np.ndarray]


class Record(NamedTuple):
    """A task.

    Attributes:
        name: Of the task, for example "race-detection".
        example: `(item, rng, language) -> Example`, or None if the item has none.
        families: The generator's families that it draws from.
        metric: `(labels, predictions) -> figures by name`.
        baselines: By name, `(train, test) -> predictions` without any network.
        verifier: What confirms an answer: a module of `jaxfm.tasks.hpc`.
    """

    name: str
    example: Callable[[Item, random.Random, str], Example | None]
    families: tuple[str, ...]
    metric: Callable[[Sequence, Sequence], dict[str, float]]
    baselines: dict[str, Baseline]
    verifier: str


_RECORDS: dict[str, Record] = {}


def register(record: Record) -> Record:
    """Adds a task.

    Raises:
        ValueError: It has no baseline, or its name is taken.
    """
    if not record.baselines:
        raise ValueError(
            f"The task {record.name!r} has no baseline; give it a trivial one, such as the "
            "majority, so that its figures say something."
        )
    if record.name in _RECORDS:
        raise ValueError(f"There is a task {record.name!r} already; choose another name.")
    _RECORDS[record.name] = record
    return record


def record(name: str) -> Record:
    """The task of a name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in _RECORDS:
        raise ValueError(f"There is no task {name!r}. {suggest(name, _RECORDS)}")
    return _RECORDS[name]


def splits(
    task: Record, seed: int, train: int, test: int, names: Sequence[str] = SPLITS
) -> dict[str, list[Example]]:
    """Examples of each split, none with the normal form of one in a split before it.

    Args:
        task: Whose examples.
        seed: Decides everything.
        train, test: Items drawn for the training split, and for each other one.
        names: Of `SPLITS`; "train" always comes first. The training split is C and lacks
            `UNSEEN_FAMILIES`, which "unseen family" alone has.
    """
    seen: set[str] = set()
    found: dict = {}
    for place, name in enumerate(SPLITS):
        if name not in names:
            continue
        count = train if name == "train" else test
        hidden = name == "unseen family"
        families = [f for f in task.families if (f in UNSEEN_FAMILIES) == hidden]
        items = generate(
            seed * len(SPLITS) + place, count, families,
            coefficients="unseen" if name == "unseen coefficients" else "usual",
            statements=3 if name == "longer bodies" else 0,
        )  # fmt: skip
        rng = random.Random(f"{seed}/{name}")
        language = "fortran" if name == "other language" else "c"
        made = (task.example(item, rng, language) for item in items)
        rows = [_obscured(row) if name == "renamed" else row for row in made if row is not None]
        keys = [normalized(row.source) for row in rows]
        found[name] = []
        for key, row in zip(keys, rows):
            if key not in seen:
                seen.add(key)
                found[name].append(row)
    return found


def _obscured(row: Example) -> Example:
    """The same with identifiers that no other split uses."""
    new: dict[str, str] = {}
    words = [
        new.setdefault(p.text, f"zq{len(new)}_{len(p.text)}") if p.kind == "word" else p.text
        for p in lex(row.source)
    ]
    return row._replace(source="".join(words))


def _race(item: Item, rng: random.Random, language: str) -> Example | None:
    if language not in item.languages:
        return None
    program, style = restyle(item.program, rng)
    shown = loop_source(program, language, style)  # type: ignore[arg-type]
    pair = item.conflict
    paths = (pair.first.path, pair.second.path) if pair else ()
    lines = tuple(sorted({shown.lines[path] for path in paths if path in shown.lines}))
    return Example(shown.text, int(item.racy), lines, item.family, item)


def _pragma(item: Item, rng: random.Random, language: str) -> Example | None:
    if item.target is None or item.pragma is None or language not in item.languages:
        return None
    program, style = restyle(asked(item), rng)
    pragma = propose(program, item.target).pragma
    if pragma is None:
        return None
    shown = loop_source(program, language, style)  # type: ignore[arg-type]
    answer = pragma_source(pragma, program, language)  # type: ignore[arg-type]
    return Example(shown.text, answer, (), item.family, item._replace(program=program))


def race_figures(labels: Sequence, predictions: Sequence) -> dict[str, float]:
    """Accuracy, macro-F1, F1 of races, Matthews' correlation; predictions above 0.5 are races."""
    from sklearn import metrics

    y, p = np.asarray(labels, int), (np.asarray(predictions) > 0.5).astype(int)
    return {
        "accuracy": float((y == p).mean()),
        "macro_f1": float(metrics.f1_score(y, p, average="macro", zero_division=0)),
        "f1": float(metrics.f1_score(y, p, zero_division=0)),
        "mcc": float(metrics.matthews_corrcoef(y, p)),
    }


def exact(labels: Sequence, predictions: Sequence) -> dict[str, float]:
    """The share of directives that are the expected text; of those with clauses, too."""
    same = np.array([a == b for a, b in zip(labels, predictions)], float)
    rich = np.array([str(a).endswith(")") for a in labels])
    return {"exact": float(same.mean()), "exact_with_clauses": float(same[rich].mean())}


def majority(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """The label that most training rows have, for all."""
    labels = [row.label for row in train]
    return np.array([max(set(labels), key=labels.count)] * len(test))


def ngrams(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """Logistic regression on 1- to 5-grams of pieces: the probability of label 1."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = lambda text: [piece.text for piece in lex(text) if piece.kind != "space"]
    counts = CountVectorizer(analyzer=lambda text: _grams(words(text)), binary=True, min_df=2)
    rows = counts.fit_transform([row.source for row in train])
    model = LogisticRegression(max_iter=300).fit(rows, [row.label for row in train])
    return model.predict_proba(counts.transform([row.source for row in test]))[:, 1]


def _grams(words: list[str], most: int = 5) -> list[str]:
    return [" ".join(words[i : i + n]) for n in range(1, most + 1) for i in range(len(words))]


def bare(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """`parallel for` without a clause."""
    return np.array(["#pragma omp parallel for"] * len(test))


register(Record("race-detection", _race, tuple(LOOPS), race_figures,
                {"majority": majority, "1-5-grams": ngrams}, "proofs.enumeration"))  # fmt: skip
register(Record("pragma", _pragma, tuple(LOOPS), exact,
                {"majority": majority, "bare": bare}, "proofs.clauses"))  # fmt: skip
