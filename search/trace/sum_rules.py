"""Rules of reductions, matrix products and convolutions."""

from __future__ import annotations

import numpy as np

from jaxfm.search.trace.graph import Op
from jaxfm.search.trace.labels import Axis, plain
from jaxfm.search.trace.reading import Context, rule


@rule("reduce_sum", "reduce_max", "reduce_min")
def _sum(c: Context, op: Op) -> list[list[Axis]]:
    return [[x for d, x in enumerate(c.axes(op.inputs[0])) if d not in op.params["axes"]]]


@rule("reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin")
def _reduce(c: Context, op: Op) -> list[list[Axis]]:
    axes = c.axes(op.inputs[0])
    for d in op.params["axes"]:
        c.freeze(axes[d], f"{op.name!r} reduces over all of it")
    return _sum(c, op)


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(c: Context, op: Op) -> list[list[Axis]]:
    out = list(c.axes(op.inputs[0]))
    out[op.params["axis"]] = c.freeze(out[op.params["axis"]], f"{op.name!r} runs along it")
    return [out]


@rule("sort")
def _sort(c: Context, op: Op) -> list[list[Axis]]:
    axes = list(c.axes(op.inputs[0]))
    for atom in op.inputs[1:]:
        for a, b in zip(axes, c.axes(atom), strict=True):
            c.unify(a, b, op)
    d = op.params["dimension"]
    axes[d] = c.freeze(axes[d], "it is sorted")
    return [axes for _ in op.outputs]


@rule("top_k")
def _top_k(c: Context, op: Op) -> list[list[Axis]]:
    axes = c.axes(op.inputs[0])
    c.freeze(axes[-1], "top_k selects along it")
    last = plain(c.shape_of(op.outputs[0])[-1])
    return [[*axes[:-1], last] for _ in op.outputs]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "cumred_reduce_window",
       "reduce_window")  # fmt: skip
def _window(c: Context, op: Op) -> list[list[Axis]]:
    p, out = op.params, []
    shape = c.shape_of(op.outputs[0])
    if len(op.outputs) > 1:  # several arrays are reduced as one
        return c.freeze_all(op)
    for d, axis in enumerate(c.axes(op.inputs[0])):
        still = p["window_dimensions"][d] == 1 and p["window_strides"][d] == 1
        still = still and tuple(p["padding"][d]) == (0, 0) and p["base_dilation"][d] == 1
        if not still:
            c.freeze(axis, "a window slides along it")
        out.append(axis if still else plain(shape[d]))
    return [out]


@rule("dot_general")
def _dot(c: Context, op: Op) -> list[list[Axis]]:
    (contract, batch) = op.params["dimension_numbers"]
    left, right = c.axes(op.inputs[0]), c.axes(op.inputs[1])
    for pairs in (contract, batch):
        for i, j in zip(*pairs, strict=True):
            c.unify(left[i], right[j], op)
    free = lambda axes, side: [
        x for d, x in enumerate(axes) if d not in contract[side] and d not in batch[side]
    ]
    return [[left[d] for d in batch[0]] + free(left, 0) + free(right, 1)]


@rule("conv_general_dilated")
def _conv(c: Context, op: Op) -> list[list[Axis]]:
    p = op.params
    if p["batch_group_count"] != 1:
        return c.freeze_all(op)
    lhs, rhs, out_spec = p["dimension_numbers"]
    x, kernel = c.axes(op.inputs[0]), c.axes(op.inputs[1])
    for axes, spec in ((x, lhs), (kernel, rhs)):
        for d in spec[2:]:
            c.freeze(axes[d], "a convolution slides along it")
    channels, inputs, outputs = x[lhs[1]], kernel[rhs[1]], kernel[rhs[0]]
    groups = p["feature_group_count"]
    if groups == 1:
        c.unify(channels, inputs, op)
    elif len(inputs) == 1 and c.to.labels.resolve(channels).shape[1]:
        # Depthwise: a channel and its own outputs are cut together.
        c.unify(np.repeat(channels, len(outputs) // groups, 0), outputs, op)
    else:  # groups share the kernel's inputs, or read what is never cut: equal numbers of outputs
        for block in np.split(channels, groups):
            c.unify(inputs, block, op)
        c.to.blocks.append((outputs, groups))
    shape = c.shape_of(op.outputs[0])
    out = [plain(n) for n in shape]
    out[out_spec[0]], out[out_spec[1]] = x[lhs[0]], outputs
    return [out]
