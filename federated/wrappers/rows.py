"""Stacked uploads as rows of numbers: what robust rules judge, and what attacks replace.

A received upload holds `Mean`s, num = w x over den = w. The x of all clients become the rows of one
matrix for each `Mean`; statistics and whatever else is `Exact` in it have a matrix of their own,
since their scale says nothing of the parameters'.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.federated.algorithm import Exact, Mean, exact
from jaxfm.model import Array, PyTree


class Rows(NamedTuple):
    """One matrix of client values.

    Attributes:
      values: f32[n, d], a client each; zeros where it is absent.
      weights: f32[n], by which it counts in a mean; 0 where it is absent.
    """

    values: Array
    weights: Array


def rows_of(received: PyTree, counted: Array) -> list[Rows]:
    """The matrices of stacked uploads.

    A client of whose mean anything is not finite is absent from it.

    Args:
      received: as `Bucket.combine` gets it, leaves [n, ...].
      counted: bool[n].
    Raises:
      ValueError: a leaf that is part of no `Mean`, or weights that differ by coordinate.
    """
    matrices = []
    for mean in _means(received):
        leaves, size = jax.tree.leaves(mean.num), counted.shape[0]
        den = _weights(mean, size)
        weights = jnp.where(counted & (den > 0), den, 0)
        divisor = jnp.where(weights > 0, weights, 1)[:, None]
        flat = [leaf.reshape(size, -1).astype(jnp.float32) / divisor for leaf in leaves]
        finite = [jnp.isfinite(x).all(1) for x in flat]
        present = functools.reduce(jnp.logical_and, finite, weights > 0)
        for places in _groups(mean):
            values = jnp.concatenate([jnp.zeros((size, 0)), *(flat[i] for i in places)], 1)
            masked = jnp.where(present[:, None], values, 0)
            matrices.append(Rows(masked, jnp.where(present, weights, 0)))
    return matrices


def from_rows(received: PyTree, matrices: Sequence[Rows]) -> PyTree:
    """A tree like `received` of other values and weights.

    Args:
      received: of which `rows_of` made the matrices.
      matrices: in the same order: values f32[n, d] and weights f32[n] for uploads; values f32[d]
        and weights f32[] for sums.
    """
    left, new = iter(matrices), []
    for mean in _means(received):
        leaves, tree = jax.tree.flatten(mean.num)
        for places in _groups(mean):
            values, weights = next(left)
            sums, start = values * weights[..., None], 0
            for i in places:
                shape, dtype = leaves[i].shape[1:], leaves[i].dtype
                end = start + math.prod(shape)
                leaves[i] = sums[..., start:end].reshape(weights.shape + shape).astype(dtype)
                start = end
        shaped = lambda x, w=weights: w.reshape(w.shape + x.shape[1:]).astype(x.dtype)
        new.append(Mean(jax.tree.unflatten(tree, leaves), jax.tree.map(shaped, mean.den)))
    return jax.tree.unflatten(jax.tree.structure(received, is_leaf=_is_mean), new)


def _means(received: PyTree) -> list[Mean]:
    """The `Mean`s of stacked uploads, which must be all that there is in them."""
    parts = jax.tree_util.tree_leaves_with_path(received, is_leaf=_is_mean)
    for path, part in parts:
        if not _is_mean(part):
            raise ValueError(
                "A robust rule or an attack takes uploads that are weighted means; this algorithm "
                f"adds up {jax.tree_util.keystr(path)} outside of a mean. Choose an algorithm such "
                "as fed_avg, fed_prox or fed_adam."
            )
    return [part for _, part in parts]


def _groups(mean: Mean) -> list[list[int]]:
    """Which leaves of `num` form a matrix, by position: those that are not `Exact`, and the rest.

    The first may be empty, so that every mean has a matrix and with it a weight.
    """
    is_exact = lambda x: isinstance(x, Exact)
    mark = lambda x: jax.tree.map(lambda _: is_exact(x), x)
    flags = jax.tree.leaves(jax.tree.map(mark, mean.num, is_leaf=is_exact))
    plain, rest = ([i for i, flag in enumerate(flags) if flag == kind] for kind in (False, True))
    return [plain, rest] if rest else [plain]


def _weights(mean: Mean, num_clients: int) -> Array:
    """f32[n], the weight of each client."""
    leaves = jax.tree.leaves(exact(mean.den))
    if len(leaves) != 1 or leaves[0].size != num_clients:
        raise ValueError(
            "A robust rule or an attack takes clients of one weight each; this algorithm weighs "
            "single coordinates, as where clients hold different slices. Choose an algorithm such "
            "as fed_avg, fed_prox or fed_adam."
        )
    return leaves[0].reshape(num_clients).astype(jnp.float32)


def _is_mean(part: Any) -> bool:
    return isinstance(part, Mean)
