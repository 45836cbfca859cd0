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

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import PyTree, Variables, is_axes

# An index array of n axes may differ along the first n - 1 of these.
_LEADING = ("layer", "kv_heads")
# Axes whose indices carry meaning of their own, so that cutting them changes the function.
FIXED = {"rotary_dim": "its pairs turn at frequencies of their own; cut kv_heads or q_per_kv"}
# The height and the width of a convolution's kernel share a name with this prefix. Taps are
# positions, not channels: only the centre can be kept, and ratios of widths do not apply to them.
_TAPS = "kernel_"


class Subnet(NamedTuple):
    """The kept indices of each cut axis; an axis that is not named is kept whole.

    Attributes:
      keep: by logical axis name, one of
        i32[kept]: the same for all layers ("embed", "layer", "conv1");
        i32[layer, kept]: per layer ("mlp", "kv_heads");
        i32[layer, kv_heads, kept]: per layer and head ("qk_dim", "v_dim");
        a list of one i32[kept_l] a layer: layers of unequal width, which `extract` returns as a
        dict of layers.
        Of a convolution's kernel ("kernel_conv1", height and width at once) the `centre` stays.
        Indices within one axis are distinct. For `mask` and `cover`, indices equal to the size
        of the axis are padding, so that candidates of different widths share one shape.
    """

    keep: Mapping[str, Any]


def axis_sizes(tree: PyTree, axes: PyTree) -> dict[str, int]:
    """Returns the size of every named axis of `tree`; `kernel_sizes` has those of kernels' taps.

    Raises:
      ValueError: an axis has two sizes, or the trees differ.
    """
    return {name: size for name, size in _sizes(tree, axes).items() if not is_taps(name)}


def kernel_sizes(tree: PyTree, axes: PyTree) -> dict[str, int]:
    """Returns the height, which is the width, of every named kernel: {"kernel_conv1": 5}.

    Raises:
      ValueError: as `axis_sizes`.
    """
    return {name: size for name, size in _sizes(tree, axes).items() if is_taps(name)}


def is_taps(name: str | None) -> bool:
    """Returns whether an axis is the height and width of a kernel."""
    return name is not None and name.startswith(_TAPS)


def centre(size: int, kept: int) -> np.ndarray:
    """Returns i32[kept], the middle of `size` taps: the crop of a kernel keeps its centre.

    Raises:
      ValueError: unequal numbers of taps would be left out on the two sides.
    """
    if not 1 <= kept <= size or (size - kept) % 2:
        raise ValueError(
            f"{kept} of {size} taps have no centre, as equally many go on either side; give one of "
            f"{list(range(2 - size % 2, size + 1, 2))}."
        )
    return np.arange(kept, dtype=np.int32) + (size - kept) // 2


def _sizes(tree: PyTree, axes: PyTree) -> dict[str, int]:
    sizes: dict[str, int] = {}

    def note(names: tuple, leaf) -> None:
        if len(names) != len(leaf.shape):
            raise ValueError(f"Axis names {names} given for a leaf of shape {leaf.shape}.")
        for name, size in zip(names, leaf.shape, strict=True):
            if name is not None and sizes.setdefault(name, size) != size:
                raise ValueError(f"Axis {name!r} has sizes {sizes[name]} and {size}.")

    _map(note, axes, tree)
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
    """Returns the smaller tree of the kept indices, physically sliced.

    Args:
      tree: arrays; Variables, or any part of them.
      axes: like `tree`, tuples of axis names.
      subnet: what to keep; layers of unequal width come back as a dict "0", "1", ...
    Raises:
      ValueError: the subnet does not fit the tree (unknown axis, index out of range or twice, a
        rotary axis).
    """
    keep = _checked(tree, axes, subnet)
    if any(map(_is_ragged, keep.values())):
        return _extract_ragged(tree, axes, keep)
    return _run(_extract, tree, axes, keep)


def mask(tree: PyTree, axes: PyTree, subnet: Subnet) -> PyTree:
    """Returns the tree with everything outside the subnet zeroed; indices may be traced."""
    keep = _checked(tree, axes, subnet, padded=True)
    return _run(_mask, tree, axes, keep)


def cover(axes: PyTree, subnet: Subnet, like: PyTree) -> PyTree:
    """Returns f32 ones where the subnet has a coordinate and zeros elsewhere, like `like`."""
    keep = _checked(like, axes, subnet, padded=True)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), like)
    return _run(_mask, ones, axes, keep)


def embed(sub: PyTree, axes: PyTree, subnet: Subnet, like: PyTree) -> PyTree:
    """Returns a full-shaped tree: the values of `sub` at their indices, zeros elsewhere.

    Args:
      sub: as `extract` returns it.
      axes: of the full tree.
      like: the full tree, or its shapes; gives shapes only: the result has the dtypes of `sub`.
    """
    keep = _checked(like, axes, subnet)
    ragged = any(map(_is_ragged, keep.values()))
    dtypes = jax.tree.map(lambda x: x.dtype, _one_layer(sub) if ragged else sub)
    shapes = jax.tree.map(lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype), like, dtypes)
    if ragged:
        return _embed(sub, axes, keep, shapes, _extract_ragged)
    return _run(_embed, sub, axes, keep, shapes)


def _run(f, tree: PyTree, axes: PyTree, keep: Mapping[str, Any], shapes: PyTree = ()) -> PyTree:
    """Calls `f(tree, axes, keep)` within the program being traced, or compiled and cached."""
    more = (shapes,) if shapes else ()
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((tree, keep))):
        return f(tree, axes, keep, *more)
    static = [jax.tree.flatten(part, is_leaf=is_axes) for part in (axes, *more)]
    return _compiled(f, tuple((form, tuple(leaves)) for leaves, form in static), tree, keep)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(f, static: tuple, tree: PyTree, keep: Mapping[str, Any]) -> PyTree:
    axes, *more = (jax.tree.unflatten(form, leaves) for form, leaves in static)
    return f(tree, axes, keep, *more)


def _map(f, axes: PyTree, *trees: PyTree) -> PyTree:
    return jax.tree.map(f, axes, *trees, is_leaf=is_axes)


def _is_ragged(index) -> bool:
    return isinstance(index, list | tuple)


def _index_axes(name: str, index) -> tuple[str, ...]:
    """Returns the names of all axes of an index array, its own last."""
    return (*_LEADING[: index.ndim - 1], name)


def _spread(index, names: tuple, axis: int):
    """Lays an index array along the axes of a leaf that it varies with; 1 along all others."""
    own = _index_axes(names[axis], index)
    at = [names.index(name) for name in own[:-1]] + [axis]
    others = [i for i in range(len(names)) if i not in at]
    return lax.expand_dims(jnp.asarray(index).transpose(np.argsort(at)), others)


def _extract(tree: PyTree, axes: PyTree, keep: Mapping[str, Any]) -> PyTree:
    # Deepest index arrays first, "layer" last: each is indexed by axes that are still whole.
    order = sorted(keep, key=lambda name: (name == "layer", -keep[name].ndim))

    def cut(names: tuple, leaf):
        for name in order:
            for axis in [i for i, own in enumerate(names) if own == name]:
                leaf = _take(leaf, names, axis, keep[name])
        return leaf

    return _map(cut, axes, tree)


def _take(leaf, names: tuple, axis: int, index):
    """Takes `index` along `axis`; it may vary along leading axes."""
    if isinstance(index, np.ndarray):  # known when tracing: a plain slice where it is one
        rows = index.reshape(-1, index.shape[-1])
        if (rows == rows[0]).all():
            index = rows[0]
            if (np.diff(index) == 1).all():
                return lax.slice_in_dim(leaf, int(index[0]), int(index[-1]) + 1, axis=axis)
    if index.ndim == 1:
        return jnp.take(leaf, jnp.asarray(index), axis=axis, unique_indices=True)
    return jnp.take_along_axis(leaf, _spread(index, names, axis), axis=axis)


def _extract_ragged(tree: PyTree, axes: PyTree, keep: Mapping[str, Any]) -> PyTree:
    """Cuts layers of unequal width: "layers" becomes a dict, each layer cut as a stack of one."""
    if isinstance(tree, Variables):
        parts = zip(tree, axes, strict=True)
        return Variables(*(_extract_ragged(part, names, keep) for part, names in parts))
    plain = {name: index for name, index in keep.items() if not _is_ragged(index)}
    out = {name: _extract(tree[name], axes[name], plain) for name in tree if name != "layers"}
    if "layers" not in tree:
        return out
    depth = jax.tree.leaves(tree["layers"])[0].shape[0]
    out["layers"] = {}
    for place, i in enumerate(keep.get("layer", np.arange(depth)).tolist()):
        own = {
            name: np.asarray(index[i])[None] if _is_ragged(index) or index.ndim > 1 else index
            for name, index in keep.items()
            if name != "layer"
        }
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], tree["layers"])
        out["layers"][str(place)] = jax.tree.map(lambda x: x[0], _extract(one, axes["layers"], own))
    return out


def _embed(sub: PyTree, axes: PyTree, keep, shapes: PyTree, cut=_extract) -> PyTree:
    (full,) = jax.linear_transpose(lambda tree: cut(tree, axes, keep), shapes)(sub)
    return full


def _one_layer(tree: PyTree) -> PyTree:
    """Returns a tree of unequal layers with the first in the place of all."""
    if isinstance(tree, Variables):
        return Variables(*map(_one_layer, tree))
    return {**tree, "layers": tree["layers"]["0"]} if "layers" in tree else tree


def _mask(tree: PyTree, axes: PyTree, keep: Mapping[str, Any]) -> PyTree:
    return _map(
        lambda names, leaf: jnp.where(_presence(leaf.shape, names, keep), leaf, 0), axes, tree
    )


def _presence(shape: tuple[int, ...], names: tuple, keep: Mapping[str, Any]):
    """Returns bool of `shape`: True where every cut axis keeps the index."""
    present = jnp.ones(shape, bool)
    for axis, name in enumerate(names):
        if name in keep:
            mark = lambda i, size=shape[axis]: jnp.zeros(size, bool).at[i].set(True, mode="drop")
            index = _padded(keep[name], shape[axis])
            for _ in range(index.ndim - 1):
                mark = jax.vmap(mark)
            present &= _spread(mark(index), names, axis)
    return present


def _padded(index, size: int):
    """Returns an index array; ragged rows are padded with `size`, which marks nothing."""
    if not _is_ragged(index):
        return index
    most = max(row.shape[-1] for row in index)
    pad = lambda row: [(0, 0)] * (row.ndim - 1) + [(0, most - row.shape[-1])]
    return jnp.stack([jnp.pad(row, pad(row), constant_values=size) for row in index])


def _checked(tree: PyTree, axes: PyTree, subnet: Subnet, padded: bool = False) -> dict[str, Any]:
    """Returns the index arrays of the axes that `tree` has; traced ones are not checked.

    Raises:
      ValueError: the subnet does not fit the tree.
    """
    sizes = _sizes(tree, axes)
    keep = {}
    for name, index in subnet.keep.items():
        if name in FIXED:
            raise ValueError(f"Axis {name!r} cannot be cut: {FIXED[name]}.")
        if name not in sizes:
            if isinstance(tree, Variables):
                raise ValueError(f"The model has no axis {name!r}; it has {sorted(sizes)}.")
            continue  # a part of a model need not have every axis
        rows = [_concrete(row) for row in (index if _is_ragged(index) else [index])]
        for row in rows:
            _check_row(name, row, sizes[name], padded)
        keep[name] = rows if _is_ragged(index) else rows[0]
        leading = _LEADING[: rows[0].ndim - 1]
        shape = rows[0].shape[:-1]
        if _is_ragged(index):
            leading, shape = ("layer",), (len(rows),)
        expected = tuple(sizes.get(lead, 1) for lead in leading)
        if shape != expected or name in leading or (name == "layer" and leading):
            raise ValueError(
                f"keep[{name!r}] has leading shape {shape}; index arrays of {name!r} are "
                f"[kept] or vary along the first of {_LEADING}, here of sizes {expected}."
            )
    return keep


def _concrete(row):
    """Returns NumPy indices where they are known, so that a plain slice is recognised."""
    return row if isinstance(row, jax.core.Tracer) else np.asarray(row)


def _check_row(name: str, row, size: int, padded: bool) -> None:
    """Raises ValueError if an index array holds no valid indices of an axis of `size`."""
    if row.ndim == 0 or not jnp.issubdtype(row.dtype, jnp.integer):
        raise ValueError(
            f"keep[{name!r}] must hold integer index arrays, got {row.dtype} of shape {row.shape}; "
            "a list means one array per layer."
        )
    if row.size == 0:
        raise ValueError(f"keep[{name!r}] is empty; at least one index must stay.")
    if isinstance(row, jax.core.Tracer):
        return
    if row.min() < 0 or row.max() >= size + padded:
        raise ValueError(
            f"keep[{name!r}] has indices from {row.min()} to {row.max()}; the axis has size {size}."
        )
    ordered = np.sort(row, axis=-1)
    if ((np.diff(ordered, axis=-1) == 0) & (ordered[..., 1:] < size)).any():
        raise ValueError(f"keep[{name!r}] names an index twice: {row.tolist()}.")
    if is_taps(name):
        inside = row[row < size]
        if row.ndim > 1 or not np.array_equal(inside, centre(size, inside.size)):
            raise ValueError(
                f"keep[{name!r}]={row.tolist()} is not the centre of a kernel of {size} taps: its "
                "window would move; see `jaxfm.subnet.centre`."
            )
