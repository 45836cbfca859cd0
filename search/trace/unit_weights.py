"""What the weights of units say of them: norms, averaged over the members of a group."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, PyTree
from jaxfm.search.trace.cost import is_trained
from jaxfm.search.trace.groups import Network, Scores
from jaxfm.search.trace.labels import Axis
from jaxfm.search.trace.plan import Leaf
from jaxfm.search.trace.roles import Group
from jaxfm.search.trace.rules import LOOPED

Term = tuple[Axis, Array, bool]
"""An axis, what each of its entries is worth, and whether each layer has a row of its own."""

UnitNorm = Callable[[Array], Array]
"""`(weights f32[n, ...]) -> f32[n]`: what each of n units is worth by its weights."""

SCALE = re.compile(r"(^|/)(scale|gamma)(/value)?$")


def l2_scores(network: Network, params: PyTree) -> Scores:
    """Returns the importance of every unit by the l2 norm of its weights, 0 without any."""
    return filled(network, params, [None] * len(network.groups))


def weight_terms(
    network: Network, params: PyTree, kind: str | UnitNorm, gradient: PyTree = None
) -> list[Term]:
    """Returns what each axis of each parameter says of its units."""
    flat = jax.tree.leaves(params)
    slopes = jax.tree.leaves(gradient) if gradient is not None else flat
    terms: list[Term] = []
    for leaf, value, slope in zip(network.leaves, flat, slopes, strict=True):
        if not is_trained(leaf):
            continue
        for d, axis in enumerate(leaf.axes):
            layered = bool(axis.shape[1]) and _layered(network, leaf, axis)
            stacked = layered or network.frozen.get(f"{leaf.path}:0") == LOOPED
            if not axis.shape[1] or not _counts(kind, leaf, stacked):
                continue
            terms.append((axis, _rate(kind, value, slope, d, layered), layered))
    return terms


def filled(network: Network, params: PyTree, scores: Sequence[Array | None]) -> Scores:
    """Returns the scores, with those by l2 where there are none."""
    if all(x is not None for x in scores):
        return tuple(x for x in scores if x is not None)
    plain = average(network, weight_terms(network, params, "l2"))
    options = zip(scores, plain, zero_scores(network), strict=True)
    return tuple(next(x for x in option if x is not None) for option in options)


def average(network: Network, terms: Sequence[Term]) -> list[Array | None]:
    """Returns each group's mean over its members; None where it has none."""
    out: list[Array | None] = []
    for group in network.groups:
        total: Any = jnp.zeros((group.layers, group.size) if group.layers else group.size)
        members = 0
        for axis, rate, layered in terms:
            for column in axis.T:
                own = np.isin(column, _units(group))
                if not own.any():
                    continue
                place = jnp.asarray(column[own] - group.first)
                sums = jnp.zeros((*rate.shape[:-1], group.size)).at[..., place].add(rate[..., own])
                sums = sums.sum(0) if layered and not group.layers else sums
                sums = sums / jnp.maximum(sums.mean(-1, keepdims=True), 1e-12)
                total = total + jnp.broadcast_to(sums, total.shape)
                members += 1
        out.append(total / members if members else None)
    return out


def _counts(kind: str | UnitNorm, leaf: Leaf, stacked: bool) -> bool:
    """Whether a parameter is ranked by: norms of weights skip biases, stacked or not."""
    if kind == "scale":
        return bool(SCALE.search(leaf.path))
    return kind == "taylor" or len(leaf.shape) - stacked > 1


def _layered(network: Network, leaf: Leaf, axis: Axis) -> bool:
    """Whether the leaf stacks layers that choose the units of this axis by themselves."""
    own = [g for g in network.groups if g.layers and np.isin(axis, _units(g)).any()]
    return bool(own)


def _units(group: Group) -> np.ndarray:
    return np.arange(group.first, group.first + group.size)


def _rate(kind: str | UnitNorm, value: Array, slope: Array, d: int, layered: bool) -> Array:
    """Returns f32[n], or f32[layers, n], of every entry of axis d."""
    value = jnp.asarray(value).astype(jnp.float32)
    others = tuple(i for i in range(value.ndim) if i != d and not (layered and i == 0))
    if callable(kind):
        units_first = jnp.moveaxis(value, d, 1 if layered else 0)
        return jax.vmap(kind)(units_first) if layered else kind(units_first)
    if kind == "l2":
        return jnp.sqrt(jnp.square(value).sum(others))
    if kind == "taylor":
        return jnp.abs((value * jnp.asarray(slope).astype(jnp.float32)).sum(others))
    return jnp.abs(value).sum(others)


def zero_scores(network: Network) -> Scores:
    """Returns zeros, f32[size] or f32[layers, size] of each group."""
    shape = lambda g: (g.layers, g.size) if g.layers else (g.size,)
    return tuple(jnp.zeros(shape(group), jnp.float32) for group in network.groups)
