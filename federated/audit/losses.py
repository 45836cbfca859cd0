"""The loss of each example by itself, on which attacks on a model's privacy rest."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.data.federation import leading_size
from jaxfm.model import Array, Key, Model, Variables
from jaxfm.tasks import Task


def example_losses(
    model: Model,
    variables: Variables,
    task: Task,
    examples: Mapping[str, Array | np.ndarray],
    *,
    batch_size: int = 256,
    key: Key | None = None,
) -> Array:
    """The task's mean loss f32[N] on each example alone, in evaluation mode; traceable.

    Args:
      model, variables, task: whose loss.
      examples: leaves [N, ...]; "weight" is ignored.
      batch_size: rows at a time.
      key: for tasks that draw (masked_lm); the same draws for each example.
    """
    leading_size(examples)
    rows = {name: jnp.asarray(leaf) for name, leaf in examples.items() if name != "weight"}

    def loss(row: dict[str, Array]) -> Array:
        inputs, targets, weight = task.prepare(jax.tree.map(lambda x: x[None], row), key)
        total, count = task.loss(model.apply(variables, inputs)[0], targets, weight)
        return total / jnp.where(count > 0, count, 1)

    return lax.map(loss, rows, batch_size=batch_size)


def confidence(losses: Array) -> Array:
    """log(p / (1 - p)) of p = exp(-loss), which over models is close to normal.

    Source: Carlini et al. 2022 (Membership inference attacks from first principles), section V.A.
    """
    nats = jnp.clip(losses, 1e-6, 80.0)
    return -nats - jnp.log(-jnp.expm1(-nats))
