"""Rules of elementwise operations and of those that move, join or split axes."""

from __future__ import annotations

from jaxfm.search.trace.graph import Op
from jaxfm.search.trace.labels import Axis, columns, merge, plain
from jaxfm.search.trace.reading import Context, rule


@rule(
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma",
    "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min",
    "mul", "name", "ne", "neg", "nextafter", "not", "or", "population_count", "pow", "real", "imag",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor",
)  # fmt: skip
def _elementwise(c: Context, op: Op) -> list[list[Axis]]:
    shape = c.shape_of(op.outputs[0])
    out: list[Axis | None] = [None] * len(shape)
    for atom in op.inputs:
        axes = c.axes(atom)
        if len(axes) != len(shape):
            continue  # a scalar
        for d, axis in enumerate(axes):
            if len(axis) != shape[d]:
                continue  # one entry is broadcast against many
            known = out[d]
            if known is None:
                out[d] = axis
            else:
                c.unify(known, axis, op)
    return [[plain(n) if axis is None else axis for axis, n in zip(out, shape, strict=True)]]


@rule("bitcast_convert_type")
def _bitcast(c: Context, op: Op) -> list[list[Axis]]:
    (atom,), (output,) = op.inputs, op.outputs
    if len(c.axes(atom)) == len(c.shape_of(output)):
        return _elementwise(c, op)
    return c.freeze_all(op)


@rule("optimization_barrier", "device_put")
def _each(c: Context, op: Op) -> list[list[Axis]]:
    return [c.axes(atom) for atom in op.inputs]


@rule("broadcast_in_dim")
def _broadcast(c: Context, op: Op) -> list[list[Axis]]:
    shape = op.params["shape"]
    out = [c.fresh(n) for n in shape]
    places = op.params["broadcast_dimensions"]
    for axis, d in zip(c.axes(op.inputs[0]), places, strict=True):
        if len(axis) == shape[d]:
            out[d] = axis
    return [out]


@rule("iota", "random_bits")
def _iota(c: Context, op: Op) -> list[list[Axis]]:
    out = [c.fresh(n) for n in op.params["shape"]]
    c.alike_everywhere(out)  # its entries differ, so all layers must cut it alike
    return [out]


@rule("random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split")
def _keys(c: Context, op: Op) -> list[list[Axis]]:
    return [[plain(n) for n in c.shape_of(number)] for number in op.outputs]


@rule("transpose")
def _transpose(c: Context, op: Op) -> list[list[Axis]]:
    axes = c.axes(op.inputs[0])
    return [[axes[i] for i in op.params["permutation"]]]


@rule("rev")
def _rev(c: Context, op: Op) -> list[list[Axis]]:
    turned = op.params["dimensions"]
    return [[x[::-1] if d in turned else x for d, x in enumerate(c.axes(op.inputs[0]))]]


@rule("squeeze")
def _squeeze(c: Context, op: Op) -> list[list[Axis]]:
    gone = op.params["dimensions"]
    axes = c.axes(op.inputs[0])
    for d in gone:
        c.freeze(axes[d], "a size-1 axis is squeezed")
    return [[axis for d, axis in enumerate(axes) if d not in gone]]


@rule("permute")
def _permute(c: Context, op: Op) -> list[list[Axis]]:
    out = list(c.axes(op.inputs[0]))
    out[op.params["axis"]] = out[op.params["axis"]][op.params["index"]]
    c.alike_everywhere(out)
    return [out]


@rule("reshape")
def _reshape(c: Context, op: Op) -> list[list[Axis]]:
    axes, shape = c.axes(op.inputs[0]), op.params["new_sizes"]
    if op.params.get("dimensions") is not None:
        return c.freeze_all(op)
    out = [plain(n) for n in shape]
    for ins, outs in segments(tuple(map(len, axes)), tuple(shape)):
        whole = merge([axes[d] for d in ins]) if len(ins) != 1 else axes[ins[0]]
        if not outs:
            c.freeze(whole, "a size-1 axis is squeezed")
        elif len(outs) == 1:
            out[outs[0]] = whole
        else:
            parts = c.to.labels.split(
                whole, [shape[d] for d in outs], "a reshape mixes it with other axes"
            )
            for d, part in zip(outs, parts, strict=True):
                out[d] = part
    return [out]


def segments(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Returns which axes of a reshape turn into which: the finest pairs of equal products.

    >>> segments((2, 5, 16), (10, 4, 4))
    [([0, 1], [0]), ([2], [1, 2])]
    """
    if 0 in source:
        return []
    wide = lambda shape: [d for d, n in enumerate(shape) if n != 1]
    left, right = wide(source), wide(target)
    out, i, j = [], 0, 0
    while i < len(left):
        ins, outs = [left[i]], [right[j]]
        a, b = source[left[i]], target[right[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                ins.append(left[i])
                a, i = a * source[left[i]], i + 1
            else:
                outs.append(right[j])
                b, j = b * target[right[j]], j + 1
        out.append((ins, outs))
    ones = [d for d, n in enumerate(source) if n == 1]
    return out + [([d], []) for d in ones]


@rule("concatenate")
def _concatenate(c: Context, op: Op) -> list[list[Axis]]:
    d = op.params["dimension"]
    parts = [c.axes(atom) for atom in op.inputs]
    out = list(parts[0])
    for other in parts[1:]:
        for i, axis in enumerate(other):
            if i != d:
                c.unify(out[i], axis, op)
    out[d] = columns(*(part[d] for part in parts))
    return [out]


@rule("tile")
def _tile(c: Context, op: Op) -> list[list[Axis]]:
    pairs = zip(c.axes(op.inputs[0]), op.params["reps"], strict=True)
    return [[columns(*[axis] * times) if times > 1 else axis for axis, times in pairs]]


@rule("stack")
def _stack(c: Context, op: Op) -> list[list[Axis]]:
    parts = [c.axes(atom) for atom in op.inputs]
    out = list(parts[0])
    for other in parts[1:]:
        for known, axis in zip(out, other, strict=True):
            c.unify(known, axis, op)
    out.insert(op.params["axis"], plain(len(parts)))
    return [out]


@rule("unstack")
def _unstack(c: Context, op: Op) -> list[list[Axis]]:
    axes, d = c.axes(op.inputs[0]), op.params["axis"]
    c.freeze(axes[d], "its entries are unstacked into separate arrays")
    return [[axis for i, axis in enumerate(axes) if i != d] for _ in op.outputs]


@rule("pad")
def _pad(c: Context, op: Op) -> list[list[Axis]]:
    out = []
    for axis, (low, high, interior) in zip(
        c.axes(op.inputs[0]), op.params["padding_config"], strict=True
    ):
        if low == high == interior == 0:
            out.append(axis)
        elif low < 0 or high < 0 or interior or not axis.shape[1]:
            c.freeze(axis, "it is padded between its entries, or cropped")
            size = len(axis) + low + high + interior * max(len(axis) - 1, 0)
            out.append(plain(size))
        else:
            ends = [c.to.labels.fresh(n) for n in (low, high)]
            c.alike_everywhere(ends)
            out.append(columns(ends[0], axis, ends[1]))
    return [out]
