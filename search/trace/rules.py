"""What each primitive does to the axes of its operands: one rule a primitive, none a layer type.

A rule unifies the axes that must be cut together and says what the axes of the result are. A
primitive without a rule freezes all that it touches and is reported. Three things are noted on the
way for those that run the graph: which axes a contraction or a sum runs over, and which numbers
are the sizes of sums (a mean over a cut axis divides by what is left of it).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxfm.search.trace.graph import Atom, Constant, Graph, Op, Values, numbers
from jaxfm.search.trace.labels import Axis, Labels, columns, merge, plain


class Divisor(NamedTuple):
    """A quotient by the size of a sum.

    Attributes:
      axes: that the sum ran over.
    """

    axes: tuple[Axis, ...]


class Reading(NamedTuple):
    """What reading a graph collects; filled by `read`.

    Attributes:
      labels: the union-find.
      axes: by value, the axes of the array.
      summed: by value, the axes that it is a sum over, seen through shape changes.
      divisors: by output value of an operation.
      unknown: primitives without a rule, and how often.
      homes: by id, the loops that it is read layer by layer in; -1 for anywhere else.
      blocks: axes, and into how many equal blocks they must stay divided.
    """

    labels: Labels
    axes: dict[int, list[Axis]]
    summed: dict[int, tuple[Axis, ...]]
    divisors: dict[int, Divisor]
    unknown: Counter
    homes: dict[int, set[int]]
    blocks: list[tuple[Axis, int]]


def reading() -> Reading:
    """An empty one."""
    return Reading(Labels(), {}, {}, {}, Counter(), {}, [])


def read(graph: Graph, values: Values, to: Reading, depth: int = 0) -> None:
    """Reads a graph whose inputs have their axes in `to`."""
    for number in graph.consts:
        to.axes[number] = [_fresh(n, to) for n in values.shapes[number]]
        _outside(to, to.axes[number])
    context = _Context(to, values, _uniform(graph), depth)
    for op in graph.ops:
        rule = _RULES.get(op.name)
        if rule is None:
            to.unknown[op.name] += 1
            _freeze_all(context, op)
        else:
            made = rule(context, op)
            to.axes.update(zip(op.outputs, made, strict=True))
        _note_sums(context, op)


class _Context(NamedTuple):
    to: Reading
    values: Values
    uniform: dict[int, float]
    depth: int

    def axes(self, atom: Atom) -> list[Axis]:
        if isinstance(atom, Constant):
            return [plain(n) for n in np.shape(atom.value)]
        return self.to.axes[atom]

    def shape(self, atom: Atom) -> tuple[int, ...]:
        return tuple(map(len, self.axes(atom)))

    def unify(self, a: Axis, b: Axis, op: Op) -> None:
        self.to.labels.unify(a, b, f"it meets an axis that cannot be cut in {op.name!r}")

    def freeze(self, axis: Axis, why: str) -> Axis:
        self.to.labels.freeze(axis, why)
        return plain(len(axis))


Rule = Callable[[_Context, Op], list[list[Axis]]]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


def _fresh(size: int, to: Reading) -> Axis:
    return to.labels.fresh(size) if size > 1 else plain(size)


def _freeze_all(c: _Context, op: Op) -> None:
    why = f"{op.name!r} has no rule"
    for atom in op.inputs:
        for axis in c.axes(atom):
            c.freeze(axis, why)
    for number in op.outputs:
        c.to.axes[number] = [plain(n) for n in c.values.shapes[number]]


@_rule(
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma",
    "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min",
    "mul", "name", "ne", "neg", "nextafter", "not", "or", "population_count", "pow", "real", "imag",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor",
)  # fmt: skip
def _elementwise(c: _Context, op: Op) -> list[list[Axis]]:
    shape = c.values.shapes[op.outputs[0]]
    out: list[Axis | None] = [None] * len(shape)
    for atom in op.inputs:
        axes = c.axes(atom)
        if len(axes) != len(shape):
            continue  # a scalar
        for d, axis in enumerate(axes):
            if len(axis) != shape[d]:
                continue  # one index against many
            known = out[d]
            if known is None:
                out[d] = axis
            else:
                c.unify(known, axis, op)
    return [[plain(n) if axis is None else axis for axis, n in zip(out, shape, strict=True)]]


@_rule("bitcast_convert_type")
def _bitcast(c: _Context, op: Op) -> list[list[Axis]]:
    (atom,), (output,) = op.inputs, op.outputs
    if len(c.axes(atom)) == len(c.values.shapes[output]):
        return _elementwise(c, op)
    _freeze_all(c, op)
    return [c.to.axes[output]]


@_rule("optimization_barrier", "device_put")
def _each(c: _Context, op: Op) -> list[list[Axis]]:
    return [c.axes(atom) for atom in op.inputs]


@_rule("broadcast_in_dim")
def _broadcast(c: _Context, op: Op) -> list[list[Axis]]:
    shape = op.params["shape"]
    out = [_fresh(n, c.to) for n in shape]
    places = op.params["broadcast_dimensions"]
    for axis, d in zip(c.axes(op.inputs[0]), places, strict=True):
        if len(axis) == shape[d]:
            out[d] = axis
    return [out]


@_rule("iota", "random_bits")
def _iota(c: _Context, op: Op) -> list[list[Axis]]:
    out = [_fresh(n, c.to) for n in op.params["shape"]]
    _outside(c.to, out)  # its values differ along the axis, so all layers cut it alike
    return [out]


@_rule("random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split")
def _keys(c: _Context, op: Op) -> list[list[Axis]]:
    return [[plain(n) for n in c.values.shapes[number]] for number in op.outputs]


@_rule("transpose")
def _transpose(c: _Context, op: Op) -> list[list[Axis]]:
    axes = c.axes(op.inputs[0])
    return [[axes[i] for i in op.params["permutation"]]]


@_rule("rev")
def _rev(c: _Context, op: Op) -> list[list[Axis]]:
    turned = op.params["dimensions"]
    return [[x[::-1] if d in turned else x for d, x in enumerate(c.axes(op.inputs[0]))]]


@_rule("squeeze")
def _squeeze(c: _Context, op: Op) -> list[list[Axis]]:
    gone = op.params["dimensions"]
    axes = c.axes(op.inputs[0])
    for d in gone:
        c.freeze(axes[d], "an axis of one index of it is dropped")
    return [[axis for d, axis in enumerate(axes) if d not in gone]]


@_rule("permute")
def _permute(c: _Context, op: Op) -> list[list[Axis]]:
    out = list(c.axes(op.inputs[0]))
    out[op.params["axis"]] = out[op.params["axis"]][op.params["index"]]
    _outside(c.to, out)
    return [out]


@_rule("reshape")
def _reshape(c: _Context, op: Op) -> list[list[Axis]]:
    axes, shape = c.axes(op.inputs[0]), op.params["new_sizes"]
    if op.params.get("dimensions") is not None:
        _freeze_all(c, op)
        return [c.to.axes[op.outputs[0]]]
    out = [plain(n) for n in shape]
    for ins, outs in segments(tuple(map(len, axes)), tuple(shape)):
        whole = merge([axes[d] for d in ins]) if len(ins) != 1 else axes[ins[0]]
        if not outs:
            c.freeze(whole, "an axis of one index of it is dropped")
        elif len(outs) == 1:
            out[outs[0]] = whole
        else:
            parts = c.to.labels.split(whole, [shape[d] for d in outs], "a reshape mixes it")
            for d, part in zip(outs, parts, strict=True):
                out[d] = part
    return [out]


def segments(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Which axes of a reshape turn into which: the finest pairs of equal products.

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


@_rule("reduce_sum")
def _sum(c: _Context, op: Op) -> list[list[Axis]]:
    return [[x for d, x in enumerate(c.axes(op.inputs[0])) if d not in op.params["axes"]]]


@_rule("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor",
       "argmax", "argmin")  # fmt: skip
def _reduce(c: _Context, op: Op) -> list[list[Axis]]:
    axes = c.axes(op.inputs[0])
    for d in op.params["axes"]:
        c.freeze(axes[d], f"{op.name!r} looks at all of it")
    return _sum(c, op)


@_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(c: _Context, op: Op) -> list[list[Axis]]:
    out = list(c.axes(op.inputs[0]))
    out[op.params["axis"]] = c.freeze(out[op.params["axis"]], f"{op.name!r} runs along it")
    return [out]


@_rule("sort")
def _sort(c: _Context, op: Op) -> list[list[Axis]]:
    axes = list(c.axes(op.inputs[0]))
    for atom in op.inputs[1:]:
        for a, b in zip(axes, c.axes(atom), strict=True):
            c.unify(a, b, op)
    d = op.params["dimension"]
    axes[d] = c.freeze(axes[d], "it is sorted")
    return [axes for _ in op.outputs]


@_rule("top_k")
def _top_k(c: _Context, op: Op) -> list[list[Axis]]:
    axes = c.axes(op.inputs[0])
    c.freeze(axes[-1], "the largest of it are taken")
    last = plain(c.values.shapes[op.outputs[0]][-1])
    return [[*axes[:-1], last] for _ in op.outputs]


@_rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "cumred_reduce_window",
       "reduce_window")  # fmt: skip
def _window(c: _Context, op: Op) -> list[list[Axis]]:
    p, out = op.params, []
    shape = c.values.shapes[op.outputs[0]]
    if len(op.outputs) > 1:  # several arrays reduced as one
        _freeze_all(c, op)
        return [c.to.axes[number] for number in op.outputs]
    for d, axis in enumerate(c.axes(op.inputs[0])):
        still = p["window_dimensions"][d] == 1 and p["window_strides"][d] == 1
        still = still and tuple(p["padding"][d]) == (0, 0) and p["base_dilation"][d] == 1
        if not still:
            c.freeze(axis, "a window moves along it")
        out.append(axis if still else plain(shape[d]))
    return [out]


@_rule("dot_general")
def _dot(c: _Context, op: Op) -> list[list[Axis]]:
    (contract, batch) = op.params["dimension_numbers"]
    left, right = c.axes(op.inputs[0]), c.axes(op.inputs[1])
    for pairs in (contract, batch):
        for i, j in zip(*pairs, strict=True):
            c.unify(left[i], right[j], op)
    free = lambda axes, side: [
        x for d, x in enumerate(axes) if d not in contract[side] and d not in batch[side]
    ]
    return [[left[d] for d in batch[0]] + free(left, 0) + free(right, 1)]


@_rule("conv_general_dilated")
def _conv(c: _Context, op: Op) -> list[list[Axis]]:
    p = op.params
    if p["batch_group_count"] != 1:
        _freeze_all(c, op)
        return [c.to.axes[op.outputs[0]]]
    lhs, rhs, out_spec = p["dimension_numbers"]
    x, kernel = c.axes(op.inputs[0]), c.axes(op.inputs[1])
    for axes, spec in ((x, lhs), (kernel, rhs)):
        for d in spec[2:]:
            c.freeze(axes[d], "a convolution moves along it")
    channels, inputs, outputs = x[lhs[1]], kernel[rhs[1]], kernel[rhs[0]]
    groups = p["feature_group_count"]
    if groups == 1:
        c.unify(channels, inputs, op)
    elif len(inputs) == 1:  # depthwise: a channel and its own outputs live and die together
        c.unify(np.repeat(channels, len(outputs) // groups, 0), outputs, op)
    else:  # groups share the kernel's inputs; of their outputs they only keep equally many
        for block in np.split(channels, groups):
            c.unify(inputs, block, op)
        c.to.blocks.append((outputs, groups))
    shape = c.values.shapes[op.outputs[0]]
    out = [plain(n) for n in shape]
    out[out_spec[0]], out[out_spec[1]] = x[lhs[0]], outputs
    return [out]


@_rule("concatenate")
def _concatenate(c: _Context, op: Op) -> list[list[Axis]]:
    d = op.params["dimension"]
    parts = [c.axes(atom) for atom in op.inputs]
    out = list(parts[0])
    for other in parts[1:]:
        for i, axis in enumerate(other):
            if i != d:
                c.unify(out[i], axis, op)
    out[d] = columns(*(part[d] for part in parts))
    return [out]


@_rule("tile")
def _tile(c: _Context, op: Op) -> list[list[Axis]]:
    pairs = zip(c.axes(op.inputs[0]), op.params["reps"], strict=True)
    return [[columns(*[axis] * times) if times > 1 else axis for axis, times in pairs]]


@_rule("stack")
def _stack(c: _Context, op: Op) -> list[list[Axis]]:
    parts = [c.axes(atom) for atom in op.inputs]
    out = list(parts[0])
    for other in parts[1:]:
        for known, axis in zip(out, other, strict=True):
            c.unify(known, axis, op)
    out.insert(op.params["axis"], plain(len(parts)))
    return [out]


@_rule("unstack")
def _unstack(c: _Context, op: Op) -> list[list[Axis]]:
    axes, d = c.axes(op.inputs[0]), op.params["axis"]
    c.freeze(axes[d], "its indices go separate ways")
    return [[axis for i, axis in enumerate(axes) if i != d] for _ in op.outputs]


@_rule("pad")
def _pad(c: _Context, op: Op) -> list[list[Axis]]:
    out = []
    for axis, (low, high, interior) in zip(
        c.axes(op.inputs[0]), op.params["padding_config"], strict=True
    ):
        if low == high == interior == 0:
            out.append(axis)
        elif low < 0 or high < 0 or interior or not axis.shape[1]:
            c.freeze(axis, "it is padded inside, or cut short")
            size = len(axis) + low + high + interior * max(len(axis) - 1, 0)
            out.append(plain(size))
        else:
            ends = [c.to.labels.fresh(n) for n in (low, high)]
            _outside(c.to, ends)
            out.append(columns(ends[0], axis, ends[1]))
    return [out]


@_rule("slice")
def _slice(c: _Context, op: Op) -> list[list[Axis]]:
    p = op.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    at = map(slice, p["start_indices"], p["limit_indices"], strides)
    return [[axis[s] for axis, s in zip(c.axes(op.inputs[0]), at, strict=True)]]


@_rule("split")
def _split(c: _Context, op: Op) -> list[list[Axis]]:
    axes, d = c.axes(op.inputs[0]), op.params["axis"]
    cuts = np.cumsum(op.params["sizes"])[:-1]
    return [[*axes[:d], part, *axes[d + 1 :]] for part in np.split(axes[d], cuts)]


@_rule("dynamic_slice")
def _dynamic_slice(c: _Context, op: Op) -> list[list[Axis]]:
    out = []
    for axis, size in zip(c.axes(op.inputs[0]), op.params["slice_sizes"], strict=True):
        whole = size == len(axis)
        out.append(axis if whole else plain(size))
        if not whole:
            c.freeze(axis, "a slice of it is taken at an index computed at run time")
    return [out]


@_rule("dynamic_update_slice")
def _dynamic_update(c: _Context, op: Op) -> list[list[Axis]]:
    out = c.axes(op.inputs[0])
    for axis, update in zip(out, c.axes(op.inputs[1]), strict=True):
        if len(axis) == len(update):
            c.unify(axis, update, op)
        else:
            c.freeze(axis, "it is written to at an index computed at run time")
            c.freeze(update, "it is written at an index computed at run time")
    return [out]


@_rule("gather")
def _gather(c: _Context, op: Op) -> list[list[Axis]]:
    numbers_, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    operand, indices = c.axes(op.inputs[0]), c.axes(op.inputs[1])
    gone = (*numbers_.collapsed_slice_dims, *numbers_.operand_batching_dims)
    passing = []
    for d, axis in enumerate(operand):
        whole = sizes[d] == len(axis) and d not in gone
        if not whole:
            c.freeze(axis, "it is looked up by an index computed at run time")
        if d not in gone:
            passing.append(axis if whole else plain(sizes[d]))
    for axis in indices:
        c.freeze(axis, "it numbers indices")
    shape = c.values.shapes[op.outputs[0]]
    out = [plain(n) for n in shape]
    for d, axis in zip(numbers_.offset_dims, passing, strict=True):
        out[d] = axis
    return [out]


LOOPED = "a loop runs along it"


@_rule("scan")
def _scan(c: _Context, op: Op) -> list[list[Axis]]:
    p, body = op.params, op.body
    assert body is not None
    consts, carry = p["num_consts"], p["num_carry"]
    given = [c.axes(atom) for atom in op.inputs]
    for axes in given[: consts + carry]:
        _outside(c.to, axes)
    for axes in given[consts + carry :]:
        c.freeze(axes[0], LOOPED)
        if c.depth:
            _outside(c.to, axes[1:])
        _at_home(c.to, axes[1:], op.outputs[0] if op.outputs else -1)
    inner = given[: consts + carry] + [axes[1:] for axes in given[consts + carry :]]
    c.to.axes.update(zip(body.inputs, inner, strict=True))
    read(body, c.values, c.to, c.depth + 1)
    results = [c.axes(atom) for atom in body.outputs]
    for first, last in zip(given[consts : consts + carry], results[:carry], strict=True):
        for a, b in zip(first, last, strict=True):
            c.unify(a, b, op)
    for axes in results[carry:]:
        _outside(c.to, axes)
    stacked = [[plain(p["length"]), *axes] for axes in results[carry:]]
    return given[consts : consts + carry] + stacked


def _outside(to: Reading, axes: list[Axis]) -> None:
    """The ids of these axes are not a loop's own: all of its layers cut them alike."""
    _at_home(to, axes, -1)


def _at_home(to: Reading, axes: list[Axis], loop: int) -> None:
    for axis in axes:
        for i in np.unique(axis).tolist():
            to.homes.setdefault(i, set()).add(loop)


_SEEN_THROUGH = ("broadcast_in_dim", "reshape", "convert_element_type", "squeeze", "copy")


def _note_sums(c: _Context, op: Op) -> None:
    """Remembers sums, and the quotients by their sizes."""
    to = c.to
    sources = numbers(op.inputs)
    if op.name == "reduce_sum" and sources:
        axes = c.axes(sources[0])
        earlier = to.summed.get(sources[0], ())
        to.summed[op.outputs[0]] = (*earlier, *(axes[d] for d in op.params["axes"]))
    elif op.name == "dot_general" and len(sources) == 2 and sources[0] == sources[1]:
        (contracted, other), _ = op.params["dimension_numbers"]
        if contracted == other:  # squares, summed
            axes = c.axes(sources[0])
            to.summed[op.outputs[0]] = tuple(axes[d] for d in contracted)
    elif op.name in _SEEN_THROUGH and sources and sources[0] in to.summed:
        to.summed[op.outputs[0]] = to.summed[sources[0]]
    elif op.name in ("div", "mul"):
        for i, atom in enumerate(op.inputs):
            other = op.inputs[1 - i]
            factor = _constant(c, other)
            if not isinstance(atom, int) or atom not in to.summed or factor is None:
                continue
            if op.name == "div" and i == 1:
                continue
            axes_of_sum = to.summed[atom]
            size = math.prod(map(len, axes_of_sum))
            wanted = float(size) if op.name == "div" else 1.0 / size
            if size > 1 and math.isclose(factor, wanted, rel_tol=1e-6):
                to.divisors[op.outputs[0]] = Divisor(axes_of_sum)


def _constant(c: _Context, atom: Atom) -> float | None:
    if isinstance(atom, int):
        return c.uniform.get(atom)
    return _number(atom.value)


def _number(value: Any) -> float | None:
    """A known scalar as a float; None for anything else."""
    real = jnp.issubdtype(jnp.result_type(value), jnp.number)
    return float(value) if np.ndim(value) == 0 and real else None


def _uniform(graph: Graph) -> dict[int, float]:
    """Values that are one known number everywhere."""
    found: dict[int, float] = {}
    for op in graph.ops:
        if op.name in ("broadcast_in_dim", "reshape", "convert_element_type") and op.inputs:
            (atom,) = op.inputs[:1]
            if isinstance(atom, int):
                if atom in found:
                    found[op.outputs[0]] = found[atom]
            elif (number := _number(atom.value)) is not None:
                found[op.outputs[0]] = number
    return found
