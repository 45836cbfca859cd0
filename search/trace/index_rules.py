"""Rules of operations that pick entries of an axis: slices, splits, gathers."""

from __future__ import annotations

import numpy as np

from jaxfm.search.trace.graph import Op
from jaxfm.search.trace.labels import Axis, plain
from jaxfm.search.trace.reading import Context, rule


@rule("slice")
def _slice(c: Context, op: Op) -> list[list[Axis]]:
    p = op.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    at = map(slice, p["start_indices"], p["limit_indices"], strides)
    return [[axis[s] for axis, s in zip(c.axes(op.inputs[0]), at, strict=True)]]


@rule("split")
def _split(c: Context, op: Op) -> list[list[Axis]]:
    axes, d = c.axes(op.inputs[0]), op.params["axis"]
    cuts = np.cumsum(op.params["sizes"])[:-1]
    return [[*axes[:d], part, *axes[d + 1 :]] for part in np.split(axes[d], cuts)]


@rule("dynamic_slice")
def _dynamic_slice(c: Context, op: Op) -> list[list[Axis]]:
    out = []
    for axis, size in zip(c.axes(op.inputs[0]), op.params["slice_sizes"], strict=True):
        whole = size == len(axis)
        out.append(axis if whole else plain(size))
        if not whole:
            c.freeze(axis, "it is sliced at an index computed at run time")
    return [out]


@rule("dynamic_update_slice")
def _dynamic_update(c: Context, op: Op) -> list[list[Axis]]:
    out = c.axes(op.inputs[0])
    for axis, update in zip(out, c.axes(op.inputs[1]), strict=True):
        if len(axis) == len(update):
            c.unify(axis, update, op)
        else:
            c.freeze(axis, "it is written to at an index computed at run time")
            c.freeze(update, "it is written into another array at an index computed at run time")
    return [out]


@rule("gather")
def _gather(c: Context, op: Op) -> list[list[Axis]]:
    where, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    operand, indices = c.axes(op.inputs[0]), c.axes(op.inputs[1])
    gone = (*where.collapsed_slice_dims, *where.operand_batching_dims)
    passing = []
    for d, axis in enumerate(operand):
        whole = sizes[d] == len(axis) and d not in gone
        if not whole:
            c.freeze(axis, "it is gathered by indices computed at run time")
        if d not in gone:
            passing.append(axis if whole else plain(sizes[d]))
    for axis in indices:
        c.freeze(axis, "it enumerates the indices of a gather")
    shape = c.shape_of(op.outputs[0])
    out = [plain(n) for n in shape]
    for d, axis in zip(where.offset_dims, passing, strict=True):
        out[d] = axis
    return [out]
