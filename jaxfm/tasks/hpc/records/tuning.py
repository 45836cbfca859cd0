"""T6: which configuration of a parallel loop costs least? The label is the cost of each.

Configurations and costs are those of `jaxfm.tasks.hpc.tuning`; a prediction is the number of one in
`tuning.GRID`. Sizes stand before the loop, as in the task "cost".
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import numpy as np

from jaxfm.tasks.hpc.generator import Item, asked
from jaxfm.tasks.hpc.naming import restyle
from jaxfm.tasks.hpc.records.baselines import words
from jaxfm.tasks.hpc.records.contract import Example, Record, register
from jaxfm.tasks.hpc.render import loop_source
from jaxfm.tasks.hpc.transforms import free
from jaxfm.tasks.hpc.tuning import GRID, costs, fits, formed

SMALLEST, LARGEST = 10, 72
FAMILIES = ("nest", "stencil", "triangle", "inner loop", "line", "guard", "indirect")


def loop(item: Item, rng: random.Random, language: str) -> Iterator[Example]:
    """The serial loop after its sizes, where its iterations may run in any order.

    Half of the nests whose loops may change places are shown so.
    """
    if item.target is None or language not in item.languages:
        return
    program = asked(item)
    if not fits(program, item.target) or not free(program, item.target):
        return
    other = formed(program, item.target, "interchanged")
    if other is not None and free(other, item.target) and rng.random() < 0.5:
        program = other
    low, high = math.log(SMALLEST), math.log(LARGEST)
    sizes = [s._replace(value=round(math.exp(rng.uniform(low, high)))) for s in program.sizes]
    program, style = restyle(program._replace(sizes=tuple(sizes)), rng)
    label = costs(program, item.target)
    shown = loop_source(program, language, style).text  # type: ignore[arg-type]
    kind, end = ("int ", ";") if language == "c" else ("", "")
    head = "".join(f"{kind}{size.name} = {size.value}{end}\n" for size in program.sizes)
    yield Example(head + shown, label, (), item.family, item._replace(program=program))


def figures(labels: Sequence, predictions: Sequence) -> dict[str, float]:
    """How much worse than the best are the chosen configurations?

    Args:
        labels: The costs of all configurations, of each row.
        predictions: The number of the chosen one in `tuning.GRID`.

    Returns:
        "regret" (mean of chosen / best - 1), "best" (share of rows where the best was chosen),
        "within_5_percent" (share of rows with a regret of at most 0.05).
    """
    y, p = np.asarray(labels, float), np.asarray(predictions, int)
    regret = y[np.arange(len(y)), p] / y.min(axis=1) - 1
    return {
        "regret": float(regret.mean()),
        "best": float((regret == 0).mean()),
        "within_5_percent": float((regret <= 0.05).mean()),
    }


def default(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """The loop as it is, with a static schedule."""
    return np.zeros(len(test), int)


def best_fixed(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """The configuration with the least mean regret on the training rows, for all."""
    y = np.array([row.label for row in train], float)
    return np.full(len(test), (y / y.min(axis=1, keepdims=True)).mean(axis=0).argmin())


def chance(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """Drawn at random."""
    return np.random.default_rng(len(test)).integers(len(GRID), size=len(test))


def nearest(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """The best configuration of the training row with the most similar pieces."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    model = TfidfVectorizer(analyzer=words)
    known = model.fit_transform([row.source for row in train])
    places = (model.transform([row.source for row in test]) @ known.T).toarray().argmax(axis=1)
    return np.array([int(np.argmin(train[k].label)) for k in places])  # type: ignore[arg-type]


register(Record("tuning", loop, FAMILIES, figures,
                {"default": default, "best fixed": best_fixed, "chance": chance,
                 "nearest": nearest}, "tuning"))  # fmt: skip
