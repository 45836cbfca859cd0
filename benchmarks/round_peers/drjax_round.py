"""A round in DrJAX: its broadcast, map and weighted mean around a local loop of our own.

DrJAX has no clients or algorithms: a round is a function of arrays with a leading axis of clients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax


def drjax_round(
    step: Callable, images: np.ndarray, labels: np.ndarray, shape: tuple[int, int, int], width: int
) -> Callable:
    """round(params, rows i32[steps, B] of each client's batches, -1 for a filler) -> params.

    Args:
      step: `(params, images, labels, real f32[B]) -> params`, one step.
      images, labels: all examples; they stay on the device.
      shape: clients of a round, their most steps, and the rows of a batch.
      width: clients that DrJAX maps over at a time; groups come one after another.
    """
    import drjax

    logging.set_verbosity(logging.ERROR)  # it warns at each map that there is no mesh
    clients, steps, batch = shape
    images, labels = jax.device_put((images, labels))

    def local(params: Any, batches: jax.Array) -> Any:
        def one(params: Any, rows: jax.Array) -> tuple[Any, None]:
            real = (rows >= 0).astype(jnp.float32)
            place = jnp.maximum(rows, 0)
            after = step(params, images[place], labels[place], real)
            return jax.tree.map(lambda a, b: jnp.where(real.sum() > 0, a, b), after, params), None

        return lax.scan(one, params, batches)[0]

    @drjax.program(clients=width)
    def group(params: Any, batches: jax.Array, counts: jax.Array) -> Any:
        trained = drjax.map_fn(local, (drjax.broadcast(params), batches))
        return drjax.reduce_weighted_mean(trained, jax.tree.map(lambda _: counts, params))

    @jax.jit
    def whole(params: Any, batches: jax.Array, counts: jax.Array) -> Any:
        def add(total: Any, own: tuple) -> tuple[Any, None]:
            part, number = own
            share = number.sum() / counts.sum()
            mean = group(params, part, number)
            return jax.tree.map(lambda t, p: t + share * p, total, mean), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        split = lambda x: x.reshape(-1, width, *x.shape[1:])
        return lax.scan(add, zeros, (split(batches), split(counts)))[0]

    def one_round(params: Any, cohort: list[np.ndarray]) -> Any:
        batches = np.full((clients, steps, batch), -1, np.int32)
        for place, rows in enumerate(cohort):
            batches[place, : len(rows)] = rows
        return whole(params, batches, (batches >= 0).sum((1, 2)).astype(np.float32))

    return one_round
