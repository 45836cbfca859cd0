"""T4: which sources do the same? The label is a number that sources have in common if they do.

Of each loop there are three forms: as it was drawn, and two more after legal transformations
(backwards, tiled, unrolled, interchanged, split), in other names and layouts; their results are
equal on the program's inputs. A near miss stands beside them, with a subscript or a number changed
and other results; its label is its own. Predictions are a matrix of similarities.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np

from jaxfm.tasks.hpc.families import LOOPS
from jaxfm.tasks.hpc.generator import Item, asked
from jaxfm.tasks.hpc.interpreter import results
from jaxfm.tasks.hpc.lexer import rename
from jaxfm.tasks.hpc.mutations import longer, shifted
from jaxfm.tasks.hpc.naming import normalized, restyle
from jaxfm.tasks.hpc.program import Assign, Expr, Number, Op, Program, walk
from jaxfm.tasks.hpc.proofs.clauses import replaced, written
from jaxfm.tasks.hpc.records.baselines import words
from jaxfm.tasks.hpc.records.contract import Example, Record, register
from jaxfm.tasks.hpc.render import loop_source
from jaxfm.tasks.hpc.transforms import free, variants
from jaxfm.tasks.hpc.verifiers.same_output import equal

FORMS = 2


def loop(item: Item, rng: random.Random, language: str) -> Iterator[Example]:
    """The forms of a loop and a near miss; none where its iterations need their order."""
    if item.target is None or language not in item.languages:
        return
    program = asked(item)
    if not free(program, item.target):
        return
    others = [form for _, form in variants(program, item.target)]
    wrong = near_miss(program, rng)
    if len(others) < FORMS or wrong is None:
        return
    label = _number(program)
    for form in (program, *rng.sample(others, FORMS)):
        yield _example(form, label, item, rng, language)
    yield _example(wrong, -label, item, rng, language)


def _number(program: Program) -> int:
    """A number of the program's own, the same on every machine."""
    digest = hashlib.sha256(repr(normalized(program)).encode()).digest()
    return int.from_bytes(digest[:6], "big") + 1


def _example(program: Program, label: int, item: Item, rng: random.Random, language: str):
    shown, style = restyle(program, rng)
    text = loop_source(shown, language, style).text  # type: ignore[arg-type]
    return Example(text, label, (), item.family, item._replace(program=shown))


def near_miss(program: Program, rng: random.Random) -> Program | None:
    """A program that differs in one subscript or number and leaves other results."""
    roomy = longer(program)
    before, arrays = results(roomy), written(program.body)
    places = [(path, s) for path, s in walk(roomy.body) if isinstance(s, Assign)]
    for path, assign in rng.sample(places, len(places)):
        for new in (shifted(assign, arrays, rng), assign._replace(value=_other(assign.value))):
            if new is None or new == assign:
                continue
            changed = roomy._replace(body=replaced(roomy.body, path, (new,)))
            try:
                after = results(changed)
            except ValueError:
                continue
            if not all(equal(before[name], after[name]) for name in before):
                return changed
    return None


def _other(expr: Expr) -> Expr:
    """An expression with its first sum a difference, or with 0.5 more."""
    match expr:
        case Op("+" | "-" as sign, args) if len(args) == 2:
            return Op("-" if sign == "+" else "+", args)
    return Op("+", (expr, Number(0.5)))


def figures(labels: Sequence, predictions: Sequence) -> dict[str, float]:
    """How well similarities find the other forms.

    Args:
        labels: Of n rows.
        predictions: Similarities, [n, n], larger for more alike; the diagonal does not count.

    Returns:
        "map_at_r": mean over rows with R other forms of the average precision among the R most
        similar rows (Musgrave et al. 2020, section 3.2). "auc": the share of pairs (a form, another
        row) that are in their order. "near_miss": the share of forms that are more similar to
        another form than its near miss is.
    """
    y, p = np.asarray(labels, np.int64), np.asarray(predictions, float)
    n = len(y)
    same = y[:, None] == y[None, :]
    apart = ~np.eye(n, dtype=bool)
    scores, wins = [], []
    for row in range(n):
        wanted = same[row] & apart[row]
        count = int(wanted.sum())
        if count == 0:
            continue
        order = np.argsort(np.where(apart[row], -p[row], np.inf), kind="stable")[:count]
        hits = wanted[order]
        scores.append(float((hits * np.cumsum(hits) / np.arange(1, count + 1)).sum() / count))
        for miss in np.flatnonzero(y == -y[row]):
            wins += [float(p[row, k] > p[row, miss]) for k in np.flatnonzero(wanted)]
    return {"map_at_r": _mean(scores), "auc": _auc(same[apart], p[apart]), "near_miss": _mean(wins)}


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _auc(same: np.ndarray, scores: np.ndarray) -> float:
    from sklearn import metrics

    return (
        float(metrics.roc_auc_score(same, scores)) if 0 < same.sum() < same.size else float("nan")
    )


def chance(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """Numbers drawn at random."""
    drawn = np.random.default_rng(len(test)).random((len(test), len(test)))
    return drawn + drawn.T


def jaccard(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """What share of the pieces of two sources they have in common, with names by their order."""
    sets = [set(words(rename(row.source).text)) for row in test]
    return np.array([[len(a & b) / max(len(a | b), 1) for b in sets] for a in sets])


def tf_idf(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """Cosine of pieces and pairs of pieces, weighted by their rarity in the training rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    pairs = lambda text: [*(w := words(text)), *map(" ".join, itertools.pairwise(w))]
    model = TfidfVectorizer(analyzer=lambda text: pairs(rename(text).text))
    model.fit([row.source for row in train])
    rows = model.transform([row.source for row in test])
    return (rows @ rows.T).toarray()


register(Record("similarity", loop, tuple(LOOPS), figures,
                {"chance": chance, "pieces in common": jaccard, "tf-idf": tf_idf},
                "interpreter"))  # fmt: skip
