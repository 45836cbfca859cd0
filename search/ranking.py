"""How much each unit of each group matters: what magnitude pruning ranks by.

Every member of a group is one axis of one parameter. Its scores are divided by their mean, so that
no member outvotes the others by its scale, and averaged over members (Fang et al. 2023, DepGraph,
section 3.3). A stacked parameter scores each layer separately.

    l1, l2       norm of the weights of a unit (Li et al. 2017, Pruning filters)
    taylor       |sum of weight * gradient| over a unit's weights (Molchanov et al. 2019, eq. 8)
    scale        |scale| of the norm after a unit (Liu et al. 2017, network slimming)
    l2_scale     their product: a norm divides weights by their size and multiplies by its scale
    activation   variance of a unit's activations where they are added up
    a function   of the weights of units

>>> import jax.numpy as jnp
>>> from jaxfm.search.trace.groups import network
>>> params = {"up": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "down": jnp.ones((2, 1))}
>>> net = network(lambda p, x: (x @ p["up"]) @ p["down"], params, jnp.ones((1, 2)))
>>> [[round(float(v), 2) for v in x] for x in importance(net, params, "l1")]
[[0.9, 1.1]]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, PyTree
from jaxfm.search.activations import summed_statistics, zero_scores
from jaxfm.search.trace.cost import is_trained
from jaxfm.search.trace.groups import Kept, Network, Scores
from jaxfm.search.trace.labels import Axis
from jaxfm.search.trace.plan import Leaf
from jaxfm.search.trace.roles import Group
from jaxfm.search.trace.rules import LOOPED

Term = tuple[Axis, Array, bool]
"""An axis, what each of its entries is worth, and whether each layer has a row of its own."""

UnitNorm = Callable[[Array], Array]
"""`(weights f32[n, ...]) -> f32[n]`: what each of n units is worth by its weights."""

KINDS = ("l1", "l2", "taylor", "scale", "l2_scale", "activation")
_SCALE = re.compile(r"(^|/)(scale|gamma)(/value)?$")


def importance(
    network: Network,
    params: PyTree,
    kind: str | UnitNorm = "l2",
    *,
    gradient: PyTree = None,
    inputs: Sequence[PyTree] = (),
) -> Scores:
    """Returns the importance of every unit; higher matters more.

    A group for which `kind` has no parameter (no norm follows it, for "scale") is ranked by l2.

    Args:
      network: whose units are ranked.
      params: its dense parameters.
      kind: one of `KINDS`, or a function `(weights f32[n, ...]) -> f32[n]` of the weights of n
        units, such as `lambda w: jnp.abs(w).max(tuple(range(1, w.ndim)))`.
      gradient: for "taylor", the gradient of a loss by the parameters.
      inputs: for "activation", a batch of what the function takes.
    Raises:
      ValueError: an unknown kind, a kind whose `gradient` or `inputs` are missing, or "scale" for a
        network without norms.
    """
    if not callable(kind) and kind not in KINDS:
        raise ValueError(
            f"importance={kind!r} is unknown; choose from {KINDS}, or give a function of the "
            "weights of units."
        )
    if kind == "activation":
        if not inputs:
            raise ValueError("importance='activation' needs `inputs`: give a batch of examples.")
        terms = _activation(network, params, inputs)
        return _filled(network, params, _average(network, terms))
    if kind == "taylor" and gradient is None:
        raise ValueError(
            "importance='taylor' needs `gradient`: give that of a loss by the parameters."
        )
    if kind == "l2_scale":
        norms, scales = (_average(network, _weights(network, params, k)) for k in ("l2", "scale"))
        both = [n if s is None or n is None else n * s for n, s in zip(norms, scales, strict=True)]
        return _filled(network, params, both)
    terms = _weights(network, params, kind, gradient)
    if not terms:
        raise ValueError(
            f"importance={kind!r} finds no parameter to rank by in this network; choose 'l2'."
        )
    return _filled(network, params, _average(network, terms))


def _weights(
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


def _filled(network: Network, params: PyTree, scores: Sequence[Array | None]) -> Scores:
    """Returns the scores, with those by l2 where there are none."""
    if all(x is not None for x in scores):
        return tuple(x for x in scores if x is not None)
    plain = _average(network, _weights(network, params, "l2"))
    options = zip(scores, plain, zero_scores(network), strict=True)
    return tuple(next(x for x in option if x is not None) for option in options)


def has_scales(network: Network) -> bool:
    """Whether the scale of a norm follows any unit, so that "scale" can rank by it."""
    scale = lambda leaf: _SCALE.search(leaf.path) and any(a.shape[1] for a in leaf.axes)
    return any(scale(leaf) for leaf in network.leaves)


def ranks(scores: Scores) -> Scores:
    """Returns i32 like the scores: 0 for the most important unit of a group (per layer), then 1."""
    return tuple(jnp.argsort(jnp.argsort(-s, axis=-1), axis=-1).astype(jnp.int32) for s in scores)


def masks(order: Scores, counts: Array) -> tuple[Array, ...]:
    """Returns bool masks of the first counts[g] units by rank; `counts` i32[G] may be traced."""
    return tuple(rank < counts[g] for g, rank in enumerate(order))


def keep(order: Scores, counts: Any) -> Kept:
    """Returns what `masks` does as NumPy arrays, for `cut` and `sliced`."""
    counts = np.asarray(counts)
    return tuple(np.asarray(rank) < counts[g] for g, rank in enumerate(order))


def _counts(kind: str | UnitNorm, leaf: Leaf, stacked: bool) -> bool:
    """Whether a parameter is ranked by: norms of weights skip biases, stacked or not."""
    if kind == "scale":
        return bool(_SCALE.search(leaf.path))
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


def _average(network: Network, terms: Sequence[Term]) -> list[Array | None]:
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


def _activation(network: Network, params: PyTree, inputs: Sequence[PyTree]) -> list[Term]:
    variance = lambda values, axes: jnp.var(values, axis=axes)
    found = summed_statistics(network, params, variance, *inputs)
    return [(axis, rate, rate.ndim > 1) for axis, rate in found]


Score = Callable[[PyTree], Array]


def gradient(score: Score, params: PyTree) -> PyTree:
    """Returns the gradient of a scalar by the trained leaves of `params`; zeros for integers."""
    grads = jax.grad(score, allow_int=True)(params)
    wide = lambda g, p: g if g.dtype == p.dtype else jnp.zeros_like(p)
    return jax.tree.map(wide, grads, params)
