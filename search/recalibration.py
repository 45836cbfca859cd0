"""Running statistics of batch norm, estimated again for a network that has been changed."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.model import PyTree, Variables

RunTraining = Callable[[Variables, PyTree], PyTree]
"""`(variables, inputs [B, ...]) -> stats` in training mode."""


def recalibrate(run: RunTraining, variables: Variables, batches: PyTree) -> Variables:
    """Returns the variables with running statistics estimated from `batches` alone.

    One pass moves the statistics by s <- s + m (b - s), whatever the momentum m is. Two passes side
    by side, from zeros and from ones, differ by (1 - m)^n at the end, which is the share of the
    start that is left; without it the end is a weighted mean of the batches. A network that does
    not read its statistics in training mode does its work only once. Jittable, and vmappable over
    candidates; nothing is run where there are no statistics.

    Args:
      run: `(variables, inputs) -> stats`; of a `Model`,
        `lambda v, x: model.apply(v, x, train=True)[1]`.
      variables: whose statistics are replaced.
      batches: inputs [n, B, ...] of n batches.
    """
    if not jax.tree.leaves(variables.stats):
        return variables
    starts = jax.tree.map(
        lambda s: jnp.stack([jnp.zeros_like(s), jnp.ones_like(s)]), variables.stats
    )

    def measure(stats: PyTree, inputs: PyTree):
        return jax.vmap(lambda s: run(variables._replace(stats=s), inputs))(stats), None

    ends, _ = lax.scan(measure, starts, batches)
    return variables._replace(stats=jax.tree.map(lambda s: s[0] / (1 - (s[1] - s[0])), ends))
