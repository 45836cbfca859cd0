"""Baselines that several tasks share; none is a network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxfm.tasks.hpc.lexer import lex
from jaxfm.tasks.hpc.records.contract import Example


def majority(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """The label that most training rows have, for all."""
    labels = [row.label for row in train]
    return np.array([max(set(labels), key=labels.count)] * len(test))


def ngrams(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """Logistic regression on 1- to 5-grams of pieces: the probability of label 1."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    counts = CountVectorizer(analyzer=lambda text: grams(words(text)), binary=True, min_df=2)
    rows = counts.fit_transform([row.source for row in train])
    model = LogisticRegression(max_iter=300).fit(rows, [row.label for row in train])
    return model.predict_proba(counts.transform([row.source for row in test]))[:, 1]


def words(text: str) -> list[str]:
    """The pieces of a source but for spaces."""
    return [piece.text for piece in lex(text) if piece.kind != "space"]


def grams(pieces: list[str], most: int = 5) -> list[str]:
    """All runs of one to `most` pieces."""
    return [" ".join(pieces[i : i + n]) for n in range(1, most + 1) for i in range(len(pieces))]
