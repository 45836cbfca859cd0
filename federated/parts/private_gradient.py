"""Gradients that are differentially private by example (DP-SGD).

    g = (sum over i of the batch of clip(grad loss_i, C) + N(0, (z C)^2)) / b

with a batch that holds each of the client's n rows with probability b / n (Poisson sampling), so
that b is its mean size, and the divisor. A row is within C of the zeros that it adds where it is
taken out, which is what `epsilon_of(z, steps, delta, Sampling(n, b, "poisson"))` accounts for; n
and the number of steps count as public. A row whose gradient is not finite adds zeros.
Source: Abadi et al. 2016 (Deep Learning with Differential Privacy), algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.federated.algorithm import ClientData
from jaxfm.federated.parts.clipping import clipped, global_norm, noised
from jaxfm.model import Array, Key, PyTree, Variables

_OVERFLOW = 1e-16  # the probability that a batch has more rows than places


class ExamplePrivacy(NamedTuple):
    """DP-SGD of a client.

    Attributes:
      clip: C, the largest norm of an example's gradient.
      noise_multiplier: z, the noise's standard deviation over C.
      chunk: examples whose gradients are held at the same time.
    """

    clip: float
    noise_multiplier: float
    chunk: int = 8

    def check(self) -> None:
        """Raises ValueError where a value is out of range."""
        if not 0 < self.clip < math.inf:
            raise ValueError(f"clip={self.clip} must be a norm above 0.")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier={self.noise_multiplier} must be a number from 0.")
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1.")


def places(batch_size: int, longest: int, chunk: int) -> int:
    """Rows for which a step has places, whole chunks; a Poisson batch exceeds them with 1e-16.

    A sum of independent draws of mean b has a shorter tail than a Poisson number of mean b.
    """
    from scipy.stats import poisson

    rows = min(longest, int(poisson.isf(_OVERFLOW, batch_size)) + 1)
    return -(-rows // chunk) * chunk


def poisson_batch(data: ClientData, batch_size: int, size: int, key: Key) -> tuple[Array, Array]:
    """Rows of a batch that holds each of a client's by itself, with probability b / n.

    Args:
      data: of the client.
      batch_size: b; all rows of a client that has fewer.
      size: places.
      key: consumed.
    Returns:
      i32[size], numbers of rows, those that were drawn first; and f32[size], 1 for these.
    """
    longest = data.index.shape[0]
    rate = jnp.minimum(1, batch_size / jnp.maximum(data.count, 1).astype(jnp.float32))
    chosen = jax.random.bernoulli(key, rate, (longest,)) & (jnp.arange(longest) < data.count)
    order = jnp.argsort(~chosen, stable=True)[:size]
    order = jnp.pad(order, (0, size - order.shape[0]))
    real = jnp.arange(size) < chosen.sum()
    return data.index[order], real.astype(jnp.float32)


def private_gradient(loss: Callable, private: ExamplePrivacy, batch_size: int) -> Callable:
    """As `jax.value_and_grad(loss, has_aux=True)` of an `Objective`, private by example.

    Args:
      loss: the mean loss of a batch.
      private: norm, noise and chunk; the batch holds whole chunks.
      batch_size: b.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def one(params: PyTree, variables: Variables, row: PyTree, real: Array, key: Key):
        batch = jax.tree.map(lambda x: x[None], row)
        (_, (stats, total, count)), grads = gradient(params, variables, batch, real[None], key)
        if jax.tree.leaves(stats):
            raise ValueError(
                "Statistics of batch norm mix the examples of a batch, so no gradient is one "
                "example's; give a model with group norm or layer norm."
            )
        there = (real > 0) & jnp.isfinite(global_norm(grads))
        kept = jax.tree.map(
            lambda x: jnp.where(there, x, 0), clipped(grads, jnp.float32(private.clip))
        )
        return kept, (jnp.where(there, total, 0), jnp.where(there, count, 0))

    def of_batch(params: PyTree, variables: Variables, batch: PyTree, real: Array, key: Key):
        rows_key, noise_key = jax.random.split(key)
        keys = jax.random.split(rows_key, real.shape[0])
        chunks = jax.tree.map(
            lambda x: x.reshape(-1, private.chunk, *x.shape[1:]), (batch, real, keys)
        )
        start = jax.eval_shape(one, params, variables, *jax.tree.map(lambda x: x[0, 0], chunks))
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), start)

        def add(i: Array, sums: PyTree) -> PyTree:
            rows, real, keys = jax.tree.map(lambda x: x[i], chunks)
            each = jax.vmap(one, in_axes=(None, None, 0, 0, 0))(params, variables, rows, real, keys)
            return jax.tree.map(lambda s, x: s + x.sum(0), sums, each)

        # Rows that were drawn stand first; chunks without any are not computed.
        taken = (real.sum().astype(jnp.int32) + private.chunk - 1) // private.chunk
        grads, (total, count) = lax.fori_loop(0, taken, add, start)
        deviation = jnp.float32(private.noise_multiplier * private.clip)
        grads = jax.tree.map(lambda x: x / batch_size, noised(grads, deviation, noise_key))
        mean = total / jnp.where(count > 0, count, 1)
        return (mean, (variables.stats, total, count)), grads

    return of_batch
