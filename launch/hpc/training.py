"""Training of encoders on a task's rows, and how well they and the baselines do."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfm.federated.foundation.central import TrainState, train_steps
from jaxfm.models import CodeEncoderConfig, code_encoder
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tasks.hpc import encoding
from jaxfm.tasks.hpc.lexer import compact
from jaxfm.tasks.hpc.reader import Reader, Reading, forward, probabilities
from jaxfm.tasks.hpc.records import Example, record, similarity
from jaxfm.tasks.hpc.tuning import GRID
from jaxfm.tasks.task import Task

Rows = Sequence[Example]
SAFE_PRECISION = 0.99
"""Which threshold of "race-free" is chosen on validation rows: other rows are harder."""


class Head(NamedTuple):
    """What an encoder has on top for a task, and what it learns from.

    Attributes:
        head: Of `CodeEncoderConfig`.
        objective: The task that is trained.
        targets: `(rows, arrays of encode, reading) -> further arrays`.
        predict: `outputs -> predictions`, as the record's metric takes them.
        num_classes: Of `CodeEncoderConfig`.
        forms: How many rows belong together and are drawn as one.
    """

    head: Literal["classify", "locate", "embed"]
    objective: Task
    targets: Callable[[Rows, Mapping[str, np.ndarray], Reading], dict[str, np.ndarray]]
    predict: Callable[[Any], np.ndarray]
    num_classes: int = 2
    forms: int = 1


def _labels(rows: Rows, arrays, reading: Reading) -> dict[str, np.ndarray]:
    return {"label": np.array([row.label for row in rows], np.int32)}


def _labels_and_lines(rows: Rows, arrays, reading: Reading) -> dict[str, np.ndarray]:
    sources = [compact(row.source) for row in rows]
    where = encoding.line_targets(
        sources, [row.lines for row in rows], arrays["start"], reading.tokenizer
    )
    return _labels(rows, arrays, reading) | {"where": where}


_LEAST = 20  # batches that a group of rows is worth a program of its own for
_MIDDLE = 4.0  # about the mean of log10 of operations, so that an untrained output is near it


def _values(rows: Rows, arrays, reading: Reading) -> dict[str, np.ndarray]:
    return {"value": np.array([row.label for row in rows], np.float32) - _MIDDLE}


def _regrets(rows: Rows, arrays, reading: Reading) -> dict[str, np.ndarray]:
    costs = np.array([row.label for row in rows], np.float32)
    return {"value": np.log(costs / costs.min(1, keepdims=True))}


def _numbers(rows: Rows, arrays, reading: Reading) -> dict[str, np.ndarray]:
    _, numbers = np.unique([row.label for row in rows], return_inverse=True)
    return {"group": numbers.astype(np.int32)}


HEADS: dict[str, Head] = {
    "race-detection": Head("classify", encoding.classify(2), _labels, probabilities),
    "program-race": Head("locate", encoding.locate(), _labels_and_lines, probabilities),
    "cost": Head("classify", encoding.regress(), _values, lambda y: y[:, 0] + _MIDDLE, 1),
    "tuning": Head("classify", encoding.regress(), _regrets, lambda y: y.argmin(1), len(GRID)),
    "similarity": Head("embed", encoding.contrast(), _numbers, lambda y: y @ y.T,
                       forms=similarity.FORMS + 2),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fit:
    """How an encoder is trained.

    Attributes:
        steps, batch_size: Of the optimizer.
        learning_rate: Its peak; it rises over the first steps and falls as a cosine.
        weight_decay: Of AdamW.
        seed: Of parameters and batches.
        buckets: Rows are put together with others of about their length, in so many groups, each
            with a program of its own; short rows then cost less.
        chunk: Steps in a row on rows of one group, compiled as one.
    """

    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0
    buckets: int = 2
    chunk: int = 10


def arrays_of(task: str, rows: Rows, reading: Reading) -> dict[str, np.ndarray]:
    """The inputs and targets of rows, for `fit` and `jaxfm.tasks.evaluate`.

    Where a head's rows are drawn in `forms` F, leaves are [N, F, ...]; rows of which a form is
    missing are left out.
    """
    head = HEADS[task]
    if head.forms > 1:
        rows = _together(rows, head.forms)
    arrays = reading.arrays([row.source for row in rows])
    arrays |= head.targets(rows, arrays, reading)
    arrays.pop("start")
    if head.forms > 1:
        arrays = {n: leaf.reshape(-1, head.forms, *leaf.shape[1:]) for n, leaf in arrays.items()}
    return arrays


def _together(rows: Rows, forms: int) -> Rows:
    """The rows of which all forms are there, one form behind the other; a near miss is one."""
    found: dict[int, list[Example]] = {}
    for row in rows:
        found.setdefault(abs(int(row.label)), []).append(row)  # type: ignore[arg-type]
    return [row for own in found.values() if len(own) == forms for row in own]


def groups(arrays: Mapping[str, np.ndarray], number: int, least: int) -> list[dict]:
    """Rows by their number of tokens, in groups of equal size, each cut to its longest row.

    Args:
        arrays: Of `arrays_of`.
        number: How many groups; fewer where each would have less than `least` rows.
        least: Rows of a group.
    """
    longest = lambda counts: counts.reshape(len(counts), -1).max(1)
    lengths, edges = longest(arrays["mask"].sum(-1)), arrays.get("edges")
    order = np.argsort(lengths, kind="stable")
    found = []
    for part in np.array_split(order, max(1, min(number, len(order) // least))):
        tokens = -(-int(lengths[part].max()) // 8) * 8
        group = {name: leaf[part] for name, leaf in arrays.items()}
        group |= {n: group[n][..., :tokens] for n in ("tokens", "mask", "where") if n in group}
        if edges is not None:
            count = int((group["edges"][..., 2] > 0).sum(-1).max())
            group["edges"] = group["edges"][..., : max(8, -(-count // 8) * 8), :]
        found.append(group)
    return found


def encoder(task: str, reading: Reading, **shape: int):
    """An untrained encoder for a task: shape names fields of `CodeEncoderConfig`."""
    return code_encoder(
        CodeEncoderConfig(
            vocab_size=reading.tokenizer.vocab_size, max_len=reading.max_len,
            num_relations=encoding.NUM_RELATIONS if reading.max_edges else 0,
            head=HEADS[task].head, num_classes=HEADS[task].num_classes, **shape,
        )
    )  # fmt: skip


def fit(
    task: str,
    rows: Rows,
    validation: Rows,
    reading: Reading,
    shape: Mapping[str, int],
    settings: Fit,
    say: Callable[[str], None] = print,
) -> Reader:
    """Trains an encoder on rows of a task.

    Args:
        task: One of `HEADS`.
        rows, validation: Examples; the second ones choose the threshold of "race-free" alone.
        reading: How sources become arrays.
        shape: Fields of `CodeEncoderConfig`.
        settings: Of the optimizer.
        say: Takes a line a tenth of the way each.

    Returns:
        The trained encoder, with figures on the validation rows in its facts.

    Raises:
        ValueError: There is no head for the task, or there are no rows.
    """
    if task not in HEADS:
        raise ValueError(f"No encoder is trained for {task!r}; there are {', '.join(HEADS)}.")
    if not rows or not validation:
        raise ValueError("There are no rows to train on; draw some items.")
    model, head = encoder(task, reading, **shape), HEADS[task]
    batch = max(1, settings.batch_size // head.forms)
    least = _LEAST * batch
    parts = groups(arrays_of(task, rows, reading), settings.buckets, least)
    warm = max(1, min(200, settings.steps // 10))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, warm, settings.steps, settings.learning_rate / 50
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=settings.weight_decay),
    )
    variables = jax.jit(model.init)(jax.random.key(settings.seed))
    state = TrainState(
        variables, optimizer.init(variables.params), jnp.zeros((), jnp.int32),
        jax.random.key(settings.seed + 1),
    )  # fmt: skip
    chunk = min(settings.chunk, settings.steps)
    run = train_steps(model, head.objective, optimizer, batch, chunk, make_mesh(data=1))
    parts = [jax.device_put(part) for part in parts]
    order = np.random.default_rng(settings.seed).integers(len(parts), size=settings.steps // chunk)
    began, losses = time.perf_counter(), []
    for number, group in enumerate(order, 1):
        state, loss = run(state, parts[group])
        losses.append(float(loss.mean()))
        if number % max(1, len(order) // 10) == 0:
            recent = float(np.mean(losses[-max(1, len(order) // 10) :]))
            seconds = time.perf_counter() - began
            say(f"step {number * chunk}: loss {recent:.4f}, {seconds:.0f} s")
    variables = jax.device_get(state.variables)
    reader = Reader(task, model, variables, reading, {"steps": settings.steps, "rows": len(rows)})
    return dataclasses.replace(reader, facts=reader.facts | _chosen(reader, validation))


def _chosen(reader: Reader, validation: Rows) -> dict[str, Any]:
    """The figures on validation rows, and where "race-free" begins."""
    labels = np.array([row.label for row in validation])
    predictions = predict(reader, validation)
    facts: dict[str, Any] = {
        "validation": record(reader.task).metric(list(labels), list(predictions))
    }
    if reader.task == "race-detection":
        below, precision, recall = safe_below(labels, predictions, SAFE_PRECISION)
        facts |= {"safe_below": below, "safe_precision": precision, "safe_recall": recall}
    return facts


def predict(reader: Reader, rows: Rows) -> np.ndarray:
    """Predictions for rows, as the record's metric takes them."""
    arrays = reader.reading.arrays([row.source for row in rows])
    return HEADS[reader.task].predict(forward(reader.model, reader.variables, arrays))


def ranked_lines(reader: Reader, rows: Rows) -> list[list[int]]:
    """For each row, its lines by how likely the race is there, the likeliest first."""
    sources = [compact(row.source) for row in rows]
    arrays = reader.reading.arrays(sources)
    scores = forward(reader.model, reader.variables, arrays)["tokens"]
    found = []
    for source, start, score in zip(sources, arrays["start"], scores):
        lines = encoding.line_of(source, start, reader.reading.tokenizer)
        most = {n: score[lines == n].max() for n in np.unique(lines) if n}
        found.append(sorted(most, key=lambda n: -most[n]))
    return found


def safe_below(
    labels: np.ndarray, chances: np.ndarray, precision: float
) -> tuple[float, float, float]:
    """The highest probability of a race up to which rows can be called race-free.

    Args:
        labels: 1 for a race, 0 for none, of validation rows.
        chances: Their probabilities of a race.
        precision: The share of rows called race-free that must be so.

    Returns:
        The threshold (below 0 where none will do), and the precision and recall that it has there.
    """
    order = np.argsort(chances, kind="stable")
    safe = np.cumsum(labels[order] == 0)
    share = safe / np.arange(1, len(order) + 1)
    fits = np.flatnonzero(share >= precision)
    if not len(fits):
        return -1.0, 0.0, 0.0
    last = fits[-1]
    recall = safe[last] / max(1, int((labels == 0).sum()))
    return float(chances[order][last]), float(share[last]), float(recall)


def safe_figures(labels: np.ndarray, chances: np.ndarray, below: float) -> dict[str, float]:
    """Precision and recall of "race-free" at a threshold."""
    called, free = chances <= below, np.asarray(labels) == 0
    return {
        "safe_precision": float(free[called].mean()) if called.any() else float("nan"),
        "safe_recall": float(called[free].mean()) if free.any() else float("nan"),
    }
