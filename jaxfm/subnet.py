"""Subnets: which indices of which logical axis are kept.

The same object is what a weak client trains, what a search proposes, what a device deploys and
what drafts tokens for the full model. Four operations, on any tree with named axes:

    extract   full -> small: physically sliced, real speed and real bytes
    mask      full -> full, zeroed outside: many candidates under one vmap, one compilation
    embed     small -> full: where a small tree's values belong (the adjoint of extract)
    cover     0/1: which coordinates the subnet speaks for

Laws: apply(mask(v)) == apply(extract(v)); extract(embed(s)) == s; cover == embed of ones;
mask == embed of extract.

>>> import numpy as np
>>> tree, axes = {"up": np.arange(8.0).reshape(2, 4)}, {"up": ("embed", "mlp")}
>>> subnet = Subnet({"mlp": np.array([0, 2])})
>>> extract(tree, axes, subnet)["up"].shape
(2, 2)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import PyTree, is_axes

# An index array of n axes may differ along the first n - 1 of these.
_LEADING = ("layer", "kv_heads")
# Axes whose indices carry meaning of their own, so that cutting them changes the function.
_FIXED = {"rotary_dim": "its pairs turn at frequencies of their own; cut kv_heads or q_per_kv"}


class Subnet(NamedTuple):
    """The kept indices of each cut axis; an axis that is not named is kept whole.

    Attributes:
      keep: by logical axis name, one of
        i32[kept]: the same for all layers ("embed", "layer", "conv1");
        i32[layer, kept]: per layer ("mlp", "kv_heads");
        i32[layer, kv_heads, kept]: per layer and head ("qk_dim", "v_dim");
        a list of one i32[kept_l] a layer: layers of unequal width, which `extract` returns as a
        dict of layers.
        Indices within one axis are distinct. For `mask` and `cover`, indices equal to the size
        of the axis are padding, so that candidates of different widths share one shape.
    """

    keep: Mapping[str, Any]


def axis_sizes(tree: PyTree, axes: PyTree) -> dict[str, int]:
    """The size of every named axis of `tree`.

    Raises:
      ValueError: an axis has two sizes, or the trees differ.
    """
    sizes: dict[str, int] = {}
    for names, leaf in _pairs(tree, axes):
        if len(names) != len(leaf.shape):
            raise ValueError(f"Axis names {names} given for a leaf of shape {leaf.shape}.")
        for name, size in zip(names, leaf.shape, strict=True):
            if name is not None and sizes.setdefault(name, size) != size:
                raise ValueError(f"Axis {name!r} has sizes {sizes[name]} and {size}.")
    return sizes


def width(sizes: Mapping[str, int], keep: Mapping[str, float | int], offset: int = 0) -> Subnet:
    """Keeps a window of indices of each axis in `keep`: prefix windows by default.

    Args:
      sizes: of `axis_sizes`.
      keep: by axis name, a ratio in (0, 1] (a float: ceil(ratio * size) indices stay) or a count
        (an int).
      offset: where the windows begin; they wrap around.
    Raises:
      ValueError: an unknown axis, or a ratio or count out of range.
    """
    kept = {}
    for name, share in keep.items():
        if name not in sizes:
            raise ValueError(f"The model has no axis {name!r}; it has {sorted(sizes)}.")
        size = sizes[name]
        count = math.ceil(share * size) if isinstance(share, float) else share
        if not 1 <= count <= size:
            raise ValueError(
                f"keep[{name!r}]={share} leaves {count} of {size} indices; give a ratio in (0, 1] "
                f"or a count from 1 to {size}."
            )
        kept[name] = np.sort((np.arange(count) + offset) % size).astype(np.int32)
    return Subnet(kept)


def extract(tree: PyTree, axes: PyTree, subnet: Subnet) -> PyTree:
    """The smaller tree of the kept indices, physically sliced.

    Args:
      tree: arrays; Variables, or any part of them.
      axes: like `tree`, tuples of axis names.
      subnet: what to keep; layers of unequal width come back as a dict "0", "1", ...
    Raises:
      ValueError: the subnet does not fit the tree (unknown axis, index out of range or twice, a
        rotary axis).
    """
    _check(tree, axes, subnet)
    ragged = {name for name, index in subnet.keep.items() if isinstance(index, list | tuple)}
    if not ragged:
        return _map(lambda names, leaf: _extract_leaf(leaf, names, subnet.keep), axes, tree)
    return _extract_ragged(tree, axes, subnet, ragged)


def mask(tree: PyTree, axes: PyTree, subnet: Subnet) -> PyTree:
    """The tree with everything outside the subnet zeroed; indices may be traced (see Subnet)."""
    _check(tree, axes, subnet, padded=True)
    return _map(
        lambda names, leaf: jnp.where(_presence(leaf.shape, names, subnet.keep), leaf, 0),
        axes,
        tree,
    )


def cover(axes: PyTree, subnet: Subnet, like: PyTree) -> PyTree:
    """f32 ones where the subnet has a coordinate, zeros elsewhere; shaped like `like`."""
    _check(like, axes, subnet, padded=True)
    return _map(
        lambda names, leaf: _presence(leaf.shape, names, subnet.keep).astype(jnp.float32),
        axes,
        like,
    )


def embed(sub: PyTree, axes: PyTree, subnet: Subnet, like: PyTree) -> PyTree:
    """A full-shaped tree with the values of `sub` at their indices and zeros elsewhere.

    Args:
      sub: as `extract` returns it.
      axes: of the full tree.
      like: the full tree, or its shapes; gives shapes only: the result has the dtypes of `sub`.
    """
    if jax.tree.leaves(sub):
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(sub)}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
    else:
        dtype = None
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), like)
    (full,) = jax.linear_transpose(lambda tree: extract(tree, axes, subnet), shapes)(sub)
    return full


def _map(f, axes: PyTree, *trees: PyTree) -> PyTree:
    return jax.tree.map(f, axes, *trees, is_leaf=is_axes)


def _pairs(tree: PyTree, axes: PyTree) -> list[tuple[tuple, Any]]:
    return jax.tree.leaves(
        _map(lambda names, leaf: _Pair((names, leaf)), axes, tree),
        is_leaf=lambda x: isinstance(x, _Pair),
    )


class _Pair(tuple):
    """A leaf of its own kind, so that pairs of names and arrays are not flattened further."""


def _index_axes(name: str, index) -> tuple[str, ...]:
    """The names of an index array's own leading axes."""
    return () if name == "layer" else _LEADING[: index.ndim - 1]


def _in_order(keep: Mapping[str, Any]) -> list[str]:
    """Deepest index arrays first, "layer" last: each is indexed by axes that are still whole."""
    return sorted(keep, key=lambda name: (name == "layer", -np.ndim(keep[name])))


def _extract_leaf(leaf, names: tuple, keep: Mapping[str, Any]):
    for name in _in_order(keep):
        for axis in [i for i, own in enumerate(names) if own == name]:
            leaf = _take(leaf, names, axis, keep[name], _index_axes(name, keep[name]))
    return leaf


def _take(leaf, names: tuple, axis: int, index, leading: tuple[str, ...]):
    """`index` along `axis`, varying along the `leading` axes."""
    if isinstance(index, np.ndarray):  # known when tracing: a plain slice where it is one
        flat = index.reshape(-1, index.shape[-1])
        row = flat[0]
        same = (flat == row).all()
        if same and (np.diff(row) == 1).all():
            return lax.slice_in_dim(leaf, int(row[0]), int(row[-1]) + 1, axis=axis)
        index = row if same else index
        leading = leading if not same else ()
    take = lambda x, i, at: jnp.take(x, i, axis=at, unique_indices=True, indices_are_sorted=False)
    positions = [names.index(name) for name in leading]
    return _map_leading(take, leaf, jnp.asarray(index), positions, axis)


def _map_leading(take, leaf, index, positions: list[int], axis: int):
    """`take`, vmapped over the axes at `positions` of leaf, which are the first ones of index."""
    if not positions:
        return take(leaf, index, axis)
    first, *rest = positions
    drop = lambda i: i - (i > first)
    inner = lambda x, i: _map_leading(take, x, i, [drop(p) for p in rest], drop(axis))
    return jax.vmap(inner, in_axes=(first, 0), out_axes=first)(leaf, index)


def _presence(shape: tuple[int, ...], names: tuple, keep: Mapping[str, Any]):
    """bool of `shape`: True where every cut axis keeps the index."""
    present = jnp.ones(shape, bool)
    for name in keep:
        for axis in [i for i, own in enumerate(names) if own == name]:
            index = _padded(keep[name], shape[axis])
            mark = lambda i, size=shape[axis]: jnp.zeros(size, bool).at[i].set(True, mode="drop")
            for _ in range(index.ndim - 1):
                mark = jax.vmap(mark)
            at = [names.index(lead) for lead in _index_axes(name, index)] + [axis]
            marks = lax.transpose(mark(index), np.argsort(at))
            present &= lax.broadcast_in_dim(marks, shape, sorted(at))
    return present


def _padded(index, size: int):
    """An index array; ragged lists are padded with `size`, which marks nothing."""
    if not isinstance(index, list | tuple):
        return jnp.asarray(index)
    most = max(len(row) for row in index)
    rows = [np.pad(row, (0, most - len(row)), constant_values=size) for row in index]
    return jnp.asarray(np.stack(rows))


def _extract_ragged(tree: PyTree, axes: PyTree, subnet: Subnet, ragged: set[str]) -> PyTree:
    """Layers of unequal width: every "layers" dict in the tree becomes a dict of its layers."""
    plain = Subnet({n: i for n, i in subnet.keep.items() if n not in ragged})
    if isinstance(tree, tuple):  # Variables
        parts = (_extract_ragged(t, a, subnet, ragged) for t, a in zip(tree, axes, strict=True))
        return type(tree)(*parts)
    rest = {name: part for name, part in tree.items() if name != "layers"}
    out = extract(rest, {name: axes[name] for name in rest}, plain)
    if "layers" not in tree:
        return out
    per_layer = lambda index, i: (
        index[i] if isinstance(index, list | tuple) or index.ndim > 1 else index
    )
    kept_layers = subnet.keep.get("layer")
    count = jax.tree.leaves(tree["layers"])[0].shape[0]
    order = range(count) if kept_layers is None else np.asarray(kept_layers).tolist()
    out["layers"] = {}
    for place, i in enumerate(order):
        keep = {n: per_layer(index, i) for n, index in subnet.keep.items() if n != "layer"}
        one = jax.tree.map(lambda x, i=i: x[i], tree["layers"])
        names = _map(lambda own: own[1:], axes["layers"])
        cut = lambda own, leaf, keep=keep: _extract_leaf(leaf, own, keep)
        out["layers"][str(place)] = _map(cut, names, one)
    return out


def _check(tree: PyTree, axes: PyTree, subnet: Subnet, padded: bool = False) -> None:
    """Raises ValueError where the subnet does not fit; traced indices are taken on trust."""
    sizes = axis_sizes(tree, axes)
    for name, index in subnet.keep.items():
        if name in _FIXED:
            raise ValueError(f"Axis {name!r} cannot be cut: {_FIXED[name]}.")
        if name not in sizes:
            continue  # this part of the model has no such axis
        rows: Sequence = index if isinstance(index, list | tuple) else [index]
        for row in rows:
            if isinstance(row, jax.core.Tracer):
                continue
            row = np.asarray(row)
            if row.size == 0:
                raise ValueError(f"keep[{name!r}] is empty; at least one index must stay.")
            limit = sizes[name] + padded
            if row.min() < 0 or row.max() >= limit:
                raise ValueError(
                    f"keep[{name!r}] has indices from {row.min()} to {row.max()}; the axis has "
                    f"size {sizes[name]}."
                )
            ordered = np.sort(row, axis=-1)
            repeats = (np.diff(ordered, axis=-1) == 0) & (ordered[..., 1:] < sizes[name])
            if repeats.any():
                raise ValueError(f"keep[{name!r}] names an index twice: {row.tolist()}.")
        leading = _LEADING[: np.ndim(rows[0]) - 1] if len(rows) == 1 and name != "layer" else ()
        if len(rows) > 1 or isinstance(index, list | tuple):
            leading = ("layer",)
        shape = (len(rows),) if isinstance(index, list | tuple) else np.shape(index)[:-1]
        expected = tuple(sizes.get(lead, 1) for lead in leading)
        if shape != expected:
            raise ValueError(
                f"keep[{name!r}] has leading shape {shape}; axes {leading} have sizes {expected}."
            )
