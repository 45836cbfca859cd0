"""The gradient of a batch, taken a few rows at a time: less memory, the same numbers.

    grad (sum_j t_j / sum_j n_j) = sum_j (n_j / sum_j n_j) grad (t_j / n_j)

for pieces j of a batch with total loss t_j over n_j predictions. Activations are those of a piece.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def in_pieces(gradient: Callable, size: int, rows: int) -> Callable:
    """Returns the gradient of a batch of `size` rows, as `gradient` gives it, in pieces of `rows`.

    A piece counts by its targets, so that an objective which is a mean over these keeps its
    gradient up to rounding. Statistics go from piece to piece; each piece has a key of its own.

    Args:
      gradient: `jax.value_and_grad` of an `Objective`, with its `aux`.
      size: rows of a batch.
      rows: of a piece; divides `size`.
    Raises:
      ValueError: `rows` does not divide `size`.
    """
    if rows < 1 or size % rows:
        raise ValueError(f"microbatch={rows} must divide batch_size={size}.")
    if rows == size:
        return gradient

    def of_batch(params, variables, batch, real, key):
        cut = lambda x: x.reshape(size // rows, rows, *x.shape[1:])

        def piece(carry, own):
            stats, grads, loss, total, count = carry
            number, batch, real = own
            (value, (stats, t, n)), g = gradient(
                params, variables._replace(stats=stats), batch, real,
                jax.random.fold_in(key, number),
            )  # fmt: skip
            add = lambda a, b: a + n * b.astype(a.dtype)
            grads = jax.tree.map(add, grads, g)
            return (stats, grads, loss + n * value, total + t, count + n), None

        zero = jnp.zeros((), jnp.float32)
        wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
        start = variables.stats, jax.tree.map(wide, params), zero, zero, zero
        pieces = jnp.arange(size // rows), jax.tree.map(cut, batch), cut(real)
        (stats, grads, loss, total, count), _ = lax.scan(piece, start, pieces)
        share = lambda x: x / jnp.where(count > 0, count, 1)
        grads = jax.tree.map(lambda g, x: share(g).astype(x.dtype), grads, params)
        return (share(loss), (stats, total, count)), grads

    return of_batch
