"""Pareto dominance: ranks, crowding and fronts. All objectives are minimised.

Source: Deb et al. 2002 (NSGA-II), sections III-A (non-dominated sorting) and III-B (crowding).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import Array


def dominates(objectives: Array) -> Array:
    """Returns bool[N, N]: row i of f32[N, K] is nowhere worse than row j and somewhere better."""
    a, b = objectives[:, None], objectives[None]
    shape = (*objectives.shape[:1], *objectives.shape)
    a, b = jnp.broadcast_to(a, shape), jnp.broadcast_to(b, shape)
    return jnp.all(a <= b, axis=2) & jnp.any(a < b, axis=2)


def fronts(objectives: Array) -> Array:
    """Returns i32[N]: 0 for points that nothing dominates, 1 for those behind them, and so on."""
    num = objectives.shape[0]
    worse_than = dominates(objectives)

    def peel(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rank, level = carry
        left = rank < 0
        beaten = jnp.any(worse_than & left[:, None], axis=0)
        return jnp.where(left & ~beaten, level, rank), level + 1

    start = (jnp.full(num, -1, jnp.int32), jnp.int32(0))
    return lax.while_loop(lambda c: jnp.any(c[0] < 0), peel, start)[0]


def crowding(objectives: Array, rank: Array) -> Array:
    """Returns f32[N], the distance between neighbours in the same front, summed over objectives.

    It is infinite at the ends of a front, which therefore always survive.
    """

    def along(values: Array) -> Array:
        order = jnp.lexsort((values, rank))
        sorted_values, sorted_rank = values[order], rank[order]
        same_low = jnp.concatenate([jnp.array([False]), sorted_rank[1:] == sorted_rank[:-1]])
        same_high = jnp.concatenate([sorted_rank[1:] == sorted_rank[:-1], jnp.array([False])])
        gap = jnp.roll(sorted_values, -1) - jnp.roll(sorted_values, 1)
        span = jnp.maximum(jnp.max(values) - jnp.min(values), 1e-12)
        distance = jnp.where(same_low & same_high, gap / span, jnp.inf)
        return jnp.zeros_like(values).at[order].set(distance)

    return jnp.sum(jax.vmap(along, in_axes=1)(objectives), axis=0)


def pareto_front(objectives: np.ndarray) -> np.ndarray:
    """Returns indices of the non-dominated rows of f32[N, K], ordered by the first objective."""
    objectives = np.asarray(objectives)
    _, first = np.unique(objectives, axis=0, return_index=True)
    points = objectives[first]
    beaten = np.array(
        [np.any((points <= p).all(axis=1) & (points < p).any(axis=1)) for p in points], bool
    )
    return first[~beaten]
