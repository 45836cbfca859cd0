"""Score a model on examples: one compiled scan over batches."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.data.federation import leading_size
from jaxfm.tasks.task import Array, Ratio, Task


def evaluate(
    apply: Callable,
    variables: Any,
    task: Task,
    examples: Mapping[str, Array | np.ndarray],
    batch_size: int,
    *,
    count: int | None = None,
    key: Array | None = None,
) -> dict[str, float]:
    """Returns every metric of the task over all examples as a plain number.

    Compiled once for each pair of `apply` and `task` (pass the same function objects again) and
    each shape of the examples. The last batch is filled up with rows of weight 0, so the result
    does not depend on `batch_size`; sums over batches are taken in f64 on the host.

    Args:
      apply: (variables, inputs, train=False) -> (outputs, stats): `Model.apply`.
      variables: of the model.
      task: see `Task`.
      examples: leaves [N, ...]; a leaf "weight" f32[N] scales rows.
      batch_size: rows at a time.
      count: only the first `count` rows are real (others pad); not part of what is compiled.
      key: for tasks that draw (masked_lm); batch number i gets fold_in(key, i).
    Returns:
      total / count of each metric; NaN where nothing has weight.
    Raises:
      ValueError: no examples, leaves that disagree on N, a count above N, batch_size below 1, what
        the task refuses.
    """
    size = leading_size(examples)
    if size == 0:
        raise ValueError("There is no example to evaluate on.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    if count is not None and not 0 <= count <= size:
        raise ValueError(f"count must be in 0..{size}; got {count}.")
    count = size if count is None else count
    task.check(examples)
    totals = _compiled(apply, task, batch_size, variables, dict(examples), np.int32(count), key)
    sums = jax.tree.map(lambda leaf: np.sum(np.asarray(leaf), dtype=np.float64), totals)
    return {
        name: float(total / weight) if weight else float("nan")
        for name, (total, weight) in sums.items()
    }


def metric_totals(
    apply: Callable,
    variables: Any,
    task: Task,
    examples: Mapping[str, Array],
    *,
    batch_size: int,
    rows: Array | None = None,
    count: Array | int | None = None,
    key: Array | None = None,
) -> dict[str, Ratio]:
    """Computes the sums of `evaluate`; traceable, for use inside a compiled round.

    Args:
      rows: i32[n], which examples, in this order; all by default. With `count` this is one client
        of a `Federation`: `rows=federation.index.padded(c), count=federation.count[c]`.
      count: how many of the rows are real.
    Returns:
      For each metric (total f32[num_batches], count f32[num_batches]).
    """
    size = leading_size(examples) if rows is None else rows.shape[0]
    num_batches = -(-size // batch_size)
    place = jnp.arange(num_batches * batch_size, dtype=jnp.int32)
    real = place < (size if count is None else count)
    source = jnp.minimum(place, size - 1)
    source = source if rows is None else rows[source]

    def step(_, slot):
        number, source, real = slot
        batch = {name: jnp.asarray(leaf)[source] for name, leaf in examples.items()}
        given = batch.get("weight", jnp.ones(batch_size, jnp.float32))
        batch["weight"] = jnp.where(real, given, 0.0)
        batch_key = None if key is None else jax.random.fold_in(key, number)
        inputs, targets, weight = task.prepare(batch, batch_key)
        outputs, _ = apply(variables, inputs, train=False)
        return None, task.metrics(outputs, targets, weight)

    shape = (num_batches, batch_size)
    slots = (jnp.arange(num_batches), source.reshape(shape), real.reshape(shape))
    return jax.lax.scan(step, None, slots)[1]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _compiled(apply, task, batch_size, variables, examples, count, key):
    return metric_totals(
        apply, variables, task, examples, batch_size=batch_size, count=count, key=key
    )
