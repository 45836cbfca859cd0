"""Salience: which units of a network matter by its weights alone, and which axes may be reordered.

`salience` is an `importance` of `jaxfm.search.elastic.supernet.reorder`: per layer, and inside
heads per head. Source: the ranking of queries and keys in Yu et al. 2023 (arXiv 2310.00247),
salient parameter prioritisation, carried over to all axes that lie between two linear maps.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from jaxfm.model import Array, Model, PyTree, is_axes
from jaxfm.subnet import FIXED


def free_axes(model: Model) -> tuple[str, ...]:
    """Axes between two linear maps or more, whose order is ours to choose; in order of name.

    Axes of inputs and outputs belong to one map, and rotary pairs have frequencies of their own.
    Nor has a model with group norms any: what a channel is normalised with depends on its place. A
    model that is not of our families must not have group norms or grouped convolutions over them.
    """
    if getattr(model.config, "norm", None) == "group":
        return ()
    counts: dict[str, int] = {}
    for names, _ in _kernels(model.axes.params, model.axes.params):
        for name in set(names) - {None, "layer", *FIXED}:
            counts[name] = counts.get(name, 0) + 1
    return tuple(sorted(name for name, count in counts.items() if count > 1))


def salience(params: PyTree, axes: PyTree, name: str) -> Array:
    """The product over all linear maps through a unit of the sum of its absolute weights.

    |w_in| |w_out| of an MLP, |q| |k| inside a head, |q| |k| |v| |o| of heads; of the residual
    stream "embed" the mean, since no map that ignores a channel silences it. f32[size], a row for
    each layer, and for each of its key/value heads, where units belong to one; relative.
    """
    relative = jnp.stack([x / (x.mean() + 1e-30) for x in _per_unit(params, axes, name)])
    return relative.mean(0) if name == "embed" else relative.prod(0)


def mean_norm(params: PyTree, axes: PyTree, name: str) -> Array:
    """The mean over maps of the sum of a unit's absolute weights: (|q| + |k|) / 2, as published."""
    return jnp.stack(_per_unit(params, axes, name)).mean(0)


def _kernels(axes: PyTree, tree: PyTree) -> list[tuple[tuple, Any]]:
    """(names, leaf) of every linear map."""
    flat, _ = jax.tree_util.tree_flatten_with_path(axes, is_leaf=is_axes)
    leaves = jax.tree.leaves(tree, is_leaf=is_axes)
    pairs = zip(flat, leaves, strict=True)
    return [(names, leaf) for (path, names), leaf in pairs if path[-1].key == "kernel"]


def _per_unit(params: PyTree, axes: PyTree, name: str) -> list[Array]:
    """f32[..., size] for each map: the sum of absolute weights of each unit, a row for each layer,
    or each head of each layer, where all maps have those axes and units are not the stream's."""
    found = [(names, leaf) for names, leaf in _kernels(axes, params) if name in names]
    rows = lambda own: name not in (own, "embed") and all(own in names for names, _ in found)
    lead = list(itertools.takewhile(rows, ("layer", "kv_heads")))
    out = []
    for names, leaf in found:
        at = [names.index(own) for own in lead]
        size = jnp.abs(leaf.astype(jnp.float32))
        for axis in [i for i, own in enumerate(names) if own == name]:
            others = [i for i in range(leaf.ndim) if i not in (*at, axis)]
            kept = sorted((*at, axis))
            out.append(size.sum(others).transpose([kept.index(i) for i in (*at, axis)]))
    return out
