"""What a task is: how a batch becomes inputs and targets, and how outputs are scored."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.tasks.direction import higher_is_better

Array = jax.Array
Ratio = tuple[Array, Array]  # (total f32[], count f32[])


def check_weights(examples: Mapping[str, Any]) -> None:
    """Refuses weights that are not f[N], 0 or more and finite; looks at arrays of the host only."""
    weight = examples.get("weight")
    if not isinstance(weight, np.ndarray):
        return
    if weight.ndim != 1:
        raise ValueError(f"The leaf 'weight' must be [N], one for each row; got {weight.shape}.")
    if not (fine := np.isfinite(weight) & (weight >= 0)).all():
        row = int(np.argmin(fine))
        raise ValueError(
            f"The weight of row {row} is {weight[row]}; weights must be finite and 0 or more."
        )


class Task(NamedTuple):
    """Three pure functions and a check. Scores are sums with their counts, never means.

    So a mean over microbatches, clients or devices is the ratio of two sums of sums, and rows of
    weight 0 (padding, rows that fill up a batch) count nowhere. A task of your own:

    >>> def regression():
    ...     def prepare(batch, key=None):
    ...         return batch["inputs"], batch["value"], row_weight(batch, batch["value"])
    ...     def loss(outputs, targets, weight):
    ...         error = jnp.square(outputs.astype(jnp.float32) - targets)
    ...         return jnp.sum(weight * error), jnp.sum(weight)
    ...     return Task(prepare, loss, lambda *args: {"loss": loss(*args)})

    Attributes:
      prepare: (batch, key) -> (inputs, targets, weight). `batch` is a dict of arrays [B, ...]
        ("tokens" i32[B, T + 1], "image" [B, H, W, C], "label" i32[B]; a leaf "weight" f32[B],
        where given, scales whole rows). `key` drives masking and augmentation; None in evaluation.
        `weight` is f32 of the shape of `targets`, 0 to ignore.
      loss: (outputs, targets, weight) -> (total f32[], count f32[]); minimise total / count.
      metrics: (outputs, targets, weight) -> dict of (total, count), each the mean total / count.
      check: (examples) -> None; raises a ValueError for examples that the task cannot take, before
        anything is compiled. What is on a device already is not looked at.
      draws: whether `prepare` needs a key in evaluation, too.
      higher_is_better: (name of a metric) -> bool, or None where it has no better way; of a task
        with metrics of its own `{"recall@5": True}.get`, say.
    """

    prepare: Callable[..., tuple[Any, Array, Array]]
    loss: Callable[[Any, Array, Array], Ratio]
    metrics: Callable[[Any, Array, Array], dict[str, Ratio]]
    check: Callable[[Mapping[str, Any]], None] = check_weights
    higher_is_better: Callable[[str], bool | None] = higher_is_better
    draws: bool = False


def prepare_weighted(
    task: Task, batch: dict[str, Array], real: Array, key: Array | None
) -> tuple[Any, Array, Array]:
    """Returns `task.prepare(batch, key)` with rows that only fill up the batch at weight 0.

    Args:
      task: whose `prepare` is called.
      batch: leaves [B, ...].
      real: f32[B], 1 for rows that count and 0 for rows that fill up the batch.
      key: as of `Task.prepare`.
    """
    inputs, targets, weight = task.prepare(batch, key)
    return inputs, targets, weight * lax.expand_dims(real, range(1, weight.ndim))


def row_weight(batch: dict[str, Array], targets: Array) -> Array:
    """Returns f32 of the shape of `targets`: each row's "weight", 1 if the batch has none."""
    if "weight" not in batch:
        return jnp.ones(targets.shape, jnp.float32)
    rows = batch["weight"].astype(jnp.float32)
    return jnp.broadcast_to(rows.reshape(-1, *[1] * (targets.ndim - 1)), targets.shape)


def leaf(batch: dict[str, Array], name: str) -> Array:
    """Returns a leaf of the batch; if it is missing, the error says which leaves there are."""
    if name not in batch:
        raise ValueError(f"The batch has no leaf {name!r}; it has {sorted(batch)}.")
    return batch[name]


def weighted_sum(values: Array, weight: Array) -> Array:
    """Returns the sum of weight * values in f32; weight 0 also silences NaN and infinity."""
    return jnp.sum(jnp.where(weight > 0, values.astype(jnp.float32) * weight, 0.0))


def count_correct(logits: Array, targets: Array, weight: Array) -> Ratio:
    """Returns (weighted number of targets with the largest logit, sum of weights)."""
    return weighted_sum(jnp.argmax(logits, axis=-1) == targets, weight), jnp.sum(weight)
