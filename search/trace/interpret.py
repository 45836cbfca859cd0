"""Runs a network's operations dense, masked or sliced: one interpreter, three readings.

masked   dense shapes, dense weights; activations are zeroed where a cut axis is contracted or
         summed. Masks may be traced: hundreds of candidates run under one `vmap`, and since no
         weight is batched, candidates fold into the batch (no grouped convolutions).
sliced   smaller parameters, smaller activations: an ordinary function to jit, differentiate,
         export and deploy.

Laws: masked == sliced; with everything kept both are the function itself. Where a mean runs over a
cut axis, its divisor is the number that is left: of a sum, or of a product of a value with itself
(`einsum("nc,nc->n", h, h) / C`). Every other constant stays what it was (a pruned head keeps the
temperature that it was trained with), a number made of the size in another way, too: C - 1, or the
square root of C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.conv import conv2d
from jaxfm.model import Array, PyTree
from jaxfm.search.trace.graph import Atom, Constant, Graph, Op, bind
from jaxfm.search.trace.groups import AxisPlan, Group, Kept, Network
from jaxfm.search.trace.labels import Axis


def full(network: Network) -> Kept:
    """Everything kept."""
    return tuple(np.ones(_mask_shape(group), bool) for group in network.groups)


def _mask_shape(group: Group) -> tuple[int, ...]:
    return (group.size,) if group.layers is None else (group.layers, group.size)


def masked(network: Network, number: int = 0) -> Callable[..., PyTree]:
    """Returns `run(params, masks, *inputs) -> output` at dense shapes.

    `masks` holds a group's bool[size] or bool[layers, size], traced or not; None instead runs the
    dense function. `number` picks one of the network's functions.
    """

    def run(params: PyTree, masks: Sequence[Array] | None, *inputs: PyTree) -> PyTree:
        plan = network.plan(number, *inputs)
        leaves = _leaves(network, params, None)
        how = _Dense() if masks is None else _Masked(plan, network.groups, tuple(masks))
        return _call(network, number, plan, how, leaves, inputs)

    return run


def sliced(network: Network, kept: Kept, number: int = 0) -> Callable[..., PyTree]:
    """Returns `run(small_params, *inputs) -> output`, with parameters as `cut` makes them."""
    kept = check(network, kept)

    def run(params: PyTree, *inputs: PyTree) -> PyTree:
        plan = network.plan(number, *inputs)
        leaves = _leaves(network, params, kept)
        return _call(network, number, plan, _Sliced(plan, network.groups, kept), leaves, inputs)

    return run


def cut(network: Network, params: PyTree, kept: Kept) -> PyTree:
    """The parameters of the kept units only, each array physically sliced."""
    kept = check(network, kept)
    leaves = _leaves(network, params, None)
    small = []
    for leaf, value in zip(network.leaves, leaves, strict=True):
        for d, axis in enumerate(leaf.axes):
            if axis.shape[1]:
                value = _take(value, d, positions(axis, network.groups, kept))
        small.append(value)
    return jax.tree.unflatten(network.treedef, small)


def place(network: Network, small: PyTree, kept: Kept) -> PyTree:
    """The adjoint of `cut`: parameters of dense shapes, small values at their places, else 0."""
    dense = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in network.leaves]
    like = jax.tree.unflatten(network.treedef, dense)
    (out,) = jax.linear_transpose(lambda tree: cut(network, tree, kept), like)(small)
    return out


def coverage(network: Network, chosen: Sequence[Array]) -> PyTree:
    """bool, like the parameters: which values have all their units; masks may be traced."""
    covered = []
    for leaf in network.leaves:
        out = jnp.ones(leaf.shape, bool)
        for d, axis in enumerate(leaf.axes):
            if not axis.shape[1]:
                continue
            used = np.unique(axis)
            own = [
                g for g in network.groups if ((used >= g.first) & (used < g.first + g.size)).any()
            ]
            depth = next((g.layers for g in own if g.layers), None)
            there = group_units(network.groups, chosen, depth)[..., axis].all(-1)
            here = (0, d) if depth else (d,)
            out &= lax.expand_dims(there, [i for i in range(out.ndim) if i not in here])
        covered.append(out)
    return jax.tree.unflatten(network.treedef, covered)


def check(network: Network, kept: Kept) -> Kept:
    """`kept` as NumPy masks.

    Raises:
      ValueError: the wrong number of groups, a mask of the wrong shape, an empty group, or layers
        of one group that keep unequal numbers.
    """
    if len(kept) != len(network.groups):
        raise ValueError(f"{len(kept)} masks for {len(network.groups)} groups.")
    out = []
    for group, mask in zip(network.groups, kept, strict=True):
        mask, shape = np.asarray(mask, bool), _mask_shape(group)
        if mask.shape != shape:
            raise ValueError(f"The mask of {group.name!r} has shape {mask.shape}, not {shape}.")
        counts = np.atleast_1d(mask.sum(-1))
        if counts.min() == 0:
            raise ValueError(f"Nothing of {group.name!r} is kept; at least one unit must stay.")
        if counts.min() != counts.max():
            raise ValueError(
                f"The layers of {group.name!r} keep {counts.tolist()} units; give equal numbers."
            )
        out.append(mask)
    return tuple(out)


def record(
    network: Network, params: PyTree, tap: Callable[[Op, list[Array]], PyTree], *inputs: PyTree
) -> list[tuple[Op, PyTree]]:
    """Runs the dense function and returns what `tap(op, operands)` makes of every operation.

    What is made inside a loop has a leading axis of its steps.
    """
    plan = network.plan(0, *inputs)
    seen: list[tuple[Op, PyTree]] = []
    arguments = [*_leaves(network, params, None), *jax.tree.leaves(inputs)]
    _run(plan.graph, arguments, _Tapped(tap, seen), None)
    return seen


def _leaves(network: Network, params: PyTree, kept: Kept | None) -> list[Any]:
    flat, treedef = jax.tree.flatten(params)
    if treedef != network.treedef:
        raise ValueError(f"The parameters have structure {treedef}, the network {network.treedef}.")
    for leaf, value in zip(network.leaves, flat, strict=True):
        shape = leaf.shape
        if kept is not None:
            shape = tuple(_count(axis, network.groups, kept) for axis in leaf.axes)
        if np.shape(value) != shape:
            raise ValueError(f"{leaf.path} has shape {np.shape(value)}, expected {shape}.")
    return flat


def _call(network, number: int, plan: AxisPlan, how: Any, leaves, inputs: PyTree) -> PyTree:
    units = how.units()
    out = _run(plan.graph, [*leaves, *jax.tree.leaves(inputs)], how, units)
    params = jax.tree.unflatten(
        network.treedef, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in network.leaves]
    )
    shapes = jax.eval_shape(network.functions[number], params, *inputs)
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


def _run(graph: Graph, arguments: Sequence[Any], how: Any, units: Any) -> list[Any]:
    """Runs the operations in order; `units` says which ones are there (in this layer)."""
    env: dict[int, Any] = dict(zip(graph.inputs, arguments, strict=True))
    env.update((i, how.const(i, x, units)) for i, x in graph.consts.items())
    read = lambda atom: atom.value if isinstance(atom, Constant) else env[atom]
    for op in graph.ops:
        env.update(zip(op.outputs, how.step(op, list(map(read, op.inputs)), units), strict=True))
    return list(map(read, graph.outputs))


def _scan(op: Op, inputs: list[Any], how: Any, layered: Any) -> list[Any]:
    """A loop over layers; `layered` holds the units of each layer, a leading axis, or None."""
    assert op.body is not None
    body = op.body
    run = lambda arguments, units: (_run(body, arguments, how, units), ())
    return _loop(op, inputs, layered, run)[0]


def _loop(op: Op, inputs: list[Any], layered: Any, run: Callable) -> tuple[list[Any], PyTree]:
    """`lax.scan` of `run(arguments, units) -> (outputs, more)`; more gets an axis of steps."""
    p = op.params
    start, stop = p["num_consts"], p["num_consts"] + p["num_carry"]
    consts, carry, xs = inputs[:start], inputs[start:stop], inputs[stop:]

    def step(carry, x):
        xs, units = x
        out, more = run([*consts, *carry, *xs], units)
        return tuple(out[: p["num_carry"]]), (tuple(out[p["num_carry"] :]), more)

    last, (ys, more) = lax.scan(
        step, tuple(carry), (tuple(xs), layered),
        length=p["length"], reverse=p["reverse"], unroll=p["unroll"],
    )  # fmt: skip
    return [*last, *ys], more


class _Dense(NamedTuple):
    """The function itself."""

    def units(self) -> None:
        return None

    def const(self, number: int, value: Any, units: Any) -> Any:
        return value

    def step(self, op: Op, inputs: list[Any], units: Any) -> list[Any]:
        if op.name == "permute":
            return [jnp.take(inputs[0], op.params["index"], axis=op.params["axis"])]
        if op.body is not None:
            return _scan(op, inputs, self, None)
        return bind(op.primitive, inputs, op.params)


class _Tapped(NamedTuple):
    """The function itself, looked at on the way."""

    tap: Callable[[Op, list[Array]], PyTree]
    seen: list[tuple[Op, PyTree]]

    def const(self, number: int, value: Any, units: Any) -> Any:
        return value

    def step(self, op: Op, inputs: list[Any], units: Any) -> list[Any]:
        if op.body is None:
            self.seen.append((op, self.tap(op, inputs)))
            return _Dense().step(op, inputs, units)
        ops: list[Op] = []

        def run(arguments: list[Any]) -> tuple[list[Any], list[PyTree]]:
            inner = _Tapped(self.tap, [])
            out = _run(op.body, arguments, inner, None)  # type: ignore[arg-type]
            ops[:] = [seen_op for seen_op, _ in inner.seen]
            return out, [x for _, x in inner.seen]

        out, found = _loop(op, inputs, None, lambda arguments, _: run(arguments))
        self.seen.extend(zip(ops, found, strict=True))
        return out


class _Masked(NamedTuple):
    """Dense shapes; what is cut is zeroed where it would be added up."""

    plan: AxisPlan
    groups: tuple[Group, ...]
    masks: tuple[Array, ...]

    def units(self) -> Array:
        return group_units(self.groups, self.masks, None)

    def const(self, number: int, value: Any, units: Array) -> Any:
        return value

    def step(self, op: Op, inputs: list[Any], units: Array) -> list[Any]:
        if op.name == "permute":
            return [jnp.take(inputs[0], op.params["index"], axis=op.params["axis"])]
        if op.body is not None:
            layers = group_units(self.groups, self.masks, op.params["length"])
            return _scan(op, inputs, self, layers)
        side, dims = summed_axes(op, self.plan)
        if dims and isinstance(op.inputs[side], int):
            inputs[side] = self._zero(inputs[side], op.inputs[side], dims, units)
        if op.name == "conv_general_dilated":
            out = _convolved(op, inputs, op.params)
        else:
            out = bind(op.primitive, inputs, op.params)
        return [self._divide(x, i, units) for x, i in zip(out, op.outputs, strict=True)]

    def _zero(self, value: Array, number: Atom, dims: Sequence[int], units: Array) -> Array:
        for d in dims:
            axis = self.plan.axes[number][d]  # type: ignore[index]
            if axis.shape[1]:
                there = lax.expand_dims(
                    _present(axis, units), [i for i in range(value.ndim) if i != d]
                )
                value = jnp.where(there, value, jnp.zeros((), value.dtype))
        return value

    def _divide(self, value: Array, number: int, units: Array) -> Array:
        divisor = self.plan.divisors.get(number)
        if divisor is None:
            return value
        factor = jnp.ones((), jnp.float32)
        for axis in divisor.axes:
            if axis.shape[1]:
                there = _present(axis, units).sum().astype(jnp.float32)
                factor = factor * len(axis) / jnp.maximum(there, 1)
        return value * factor.astype(value.dtype)


def group_units(groups: tuple[Group, ...], masks: Sequence[Array], layers: int | None) -> Array:
    """bool[1 + units], the first always there; bool[layers, 1 + units] inside a loop over layers.

    Groups that layers choose by themselves are whole outside of their loop.
    """
    parts = [jnp.ones((layers or 1, 1), bool)]
    for group, mask in zip(groups, masks, strict=True):
        own = group.layers is None or group.layers == layers
        there = jnp.asarray(mask, bool) if own else jnp.ones(group.size, bool)
        parts.append(jnp.broadcast_to(there, (layers or 1, group.size)))
    units = jnp.concatenate(parts, axis=1)
    return units if layers else units[0]


def _present(axis: Axis, units: Any) -> Any:
    """bool[n]: whether each index has all its units."""
    return units[axis].all(1)


def summed_axes(op: Op, plan: AxisPlan) -> tuple[int, tuple[int, ...]]:
    """Which operand's axes an operation adds up: the operand to be masked, and its axes.

    Of a product, the operand that depends on data, so that no weight is ever batched over
    candidates; of two such the smaller one.
    """
    if op.name == "reduce_sum":
        return 0, tuple(op.params["axes"])
    if op.name == "conv_general_dilated" and isinstance(op.inputs[0], int):
        lhs, rhs, _ = op.params["dimension_numbers"]
        depthwise = len(plan.axes[op.inputs[1]][rhs[1]]) == 1  # type: ignore[index]
        return 0, () if depthwise else (lhs[1],)
    if op.name == "dot_general":
        contract, _ = op.params["dimension_numbers"]
        sizes = [
            (atom not in plan.data, float(np.prod(plan.values.shapes[atom])))
            if isinstance(atom, int)
            else (True, np.inf)
            for atom in op.inputs
        ]
        side = int(sizes[1] < sizes[0])
        return side, tuple(contract[side])
    return 0, ()


class _Sliced(NamedTuple):
    """Shapes of what is kept; every shape in an operation's parameters is derived anew."""

    plan: AxisPlan
    groups: tuple[Group, ...]
    kept: Kept

    def units(self) -> None:
        return None

    def _where(self, axis: Axis) -> np.ndarray:
        return positions(axis, self.groups, self.kept)

    def _axes(self, atom: Atom) -> tuple[Axis, ...]:
        if isinstance(atom, int):
            return self.plan.axes[atom]
        return tuple(np.zeros((n, 0), np.int64) for n in np.shape(atom.value))

    def _shape(self, number: int) -> tuple[int, ...]:
        return tuple(_count(axis, self.groups, self.kept) for axis in self.plan.axes[number])

    def const(self, number: int, value: Any, units: Any) -> Any:
        for d, axis in enumerate(self.plan.axes[number]):
            if axis.shape[1]:
                value = _take(jnp.asarray(value), d, self._alike(axis))
        return value

    def _alike(self, axis: Axis) -> np.ndarray:
        """Positions that are the same in all layers."""
        rows = np.atleast_2d(self._where(axis))
        if (rows != rows[0]).any():
            raise ValueError("Layers keep different parts of an axis that they must cut alike.")
        return rows[0]

    def _number(self, axis: Axis, start: int, stop: int) -> int:
        """How many of the indices from start to stop are kept, in every layer."""
        rows = np.atleast_2d(self._where(axis))
        counts = ((rows >= start) & (rows < stop)).sum(1)
        if counts.min() != counts.max():
            raise ValueError("Layers keep unequal numbers in a part of an axis.")
        return int(counts[0])

    def step(self, op: Op, inputs: list[Any], units: Any) -> list[Any]:
        if op.body is not None:
            return _scan(op, inputs, self, None)
        special = _SPECIAL.get(op.name)
        out = special(self, op, inputs) if special else bind(op.primitive, inputs, op.params)
        return [self._divide(x, i) for x, i in zip(out, op.outputs, strict=True)]

    def _divide(self, value: Array, number: int) -> Array:
        divisor = self.plan.divisors.get(number)
        if divisor is None:
            return value
        counts = [(len(axis), _count(axis, self.groups, self.kept)) for axis in divisor.axes]
        factor = np.prod([n / k for n, k in counts])
        return value * jnp.asarray(factor, value.dtype)


def positions(axis: Axis, groups: tuple[Group, ...], kept: Kept) -> np.ndarray:
    """Kept indices i64[k] of an axis, or i64[layers, k] where layers choose their own."""
    if not axis.shape[1]:
        return np.arange(len(axis))
    used = set(np.unique(axis).tolist())
    own = [g for g, group in enumerate(groups) if group.first in used or used.intersection(
        range(group.first, group.first + group.size))]  # fmt: skip
    layers = {groups[g].layers for g in own} - {None}
    depth = layers.pop() if layers else None
    total = max((g.first + g.size for g in groups), default=1)
    units = np.ones((depth or 1, total), bool)
    for g in own:
        first, size = groups[g].first, groups[g].size
        units[:, first : first + size] = kept[g]
    there = np.asarray(units[:, axis].all(2))
    rows = list(map(np.flatnonzero, there))
    return np.stack(rows) if depth else rows[0]


def _count(axis: Axis, groups: tuple[Group, ...], kept: Kept) -> int:
    return positions(axis, groups, kept).shape[-1] if axis.shape[1] else len(axis)


def _take(value: Any, d: int, index: np.ndarray) -> Any:
    """`index` along axis d; i64[layers, k] differs along the first axis, which is the layers'."""
    value = jnp.asarray(value)
    if index.ndim == 1:
        return jnp.take(value, jnp.asarray(index, jnp.int32), axis=d, unique_indices=True)
    others = [i for i in range(value.ndim) if i not in (0, d)]
    return jnp.take_along_axis(
        value, lax.expand_dims(jnp.asarray(index, jnp.int32), others), axis=d
    )


# What slicing changes in the parameters of a primitive.


def _resized(name: str) -> Callable:
    def step(how: _Sliced, op: Op, inputs: list[Any]) -> list[Any]:
        return bind(op.primitive, inputs, op.params | {name: how._shape(op.outputs[0])})

    return step


def _iota(how: _Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    (value,) = bind(op.primitive, inputs, op.params)
    for d, axis in enumerate(how.plan.axes[op.outputs[0]]):
        value = _take(value, d, how._alike(axis)) if axis.shape[1] else value
    return [value]


def _permute(how: _Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    d, index = op.params["axis"], op.params["index"]
    before = how._alike(how._axes(op.inputs[0])[d])
    after = how._alike(how.plan.axes[op.outputs[0]][d])
    return [_take(inputs[0], d, np.searchsorted(before, index[after]))]


def _slice(how: _Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    (value,), p = inputs, op.params
    starts, limits = list(p["start_indices"]), list(p["limit_indices"])
    strides = list(p["strides"] or [1] * value.ndim)
    for d, axis in enumerate(how._axes(op.inputs[0])):
        if strides[d] > 1 and axis.shape[1]:
            chosen = np.isin(how._alike(axis), np.arange(starts[d], limits[d], strides[d]))
            value = _take(value, d, np.flatnonzero(chosen))
            starts[d], limits[d], strides[d] = 0, value.shape[d], 1
        elif axis.shape[1]:
            low, kept = how._number(axis, 0, starts[d]), how._number(axis, starts[d], limits[d])
            starts[d], limits[d] = low, low + kept
    return [lax.slice(value, starts, limits, strides)]


def _pad(how: _Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    config = []
    for axis, (low, high, interior) in zip(
        how.plan.axes[op.outputs[0]], op.params["padding_config"], strict=True
    ):
        if axis.shape[1] and (low or high):
            n = len(axis)
            low, high = how._number(axis, 0, low), how._number(axis, n - high, n)
        config.append((low, high, interior))
    return bind(op.primitive, inputs, op.params | {"padding_config": tuple(config)})


def _split(how: _Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    sizes = tuple(how._shape(number)[op.params["axis"]] for number in op.outputs)
    return bind(op.primitive, inputs, op.params | {"sizes": sizes})


def _gather(how: _Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    sizes = tuple(
        how._number(axis, 0, len(axis)) if size == len(axis) and size > 1 else size
        for axis, size in zip(how._axes(op.inputs[0]), op.params["slice_sizes"], strict=True)
    )
    return bind(op.primitive, inputs, op.params | {"slice_sizes": sizes})


def _conv(how: _Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    p, (x, kernel) = op.params, inputs
    lhs, rhs, _ = p["dimension_numbers"]
    if p["feature_group_count"] > 1 and kernel.shape[rhs[1]] == 1:
        p = p | {"feature_group_count": x.shape[lhs[1]]}
    return _convolved(op, inputs, p)


def _convolved(op: Op, inputs: list[Any], p: dict[str, Any]) -> list[Any]:
    """The convolution, with gradients that stay fast inside compiled loops where it has such."""
    x, kernel = inputs
    if _is_plain(p, x, kernel):
        return [conv2d(x, kernel, strides=tuple(p["window_strides"]), padding=p["padding"])]
    return bind(op.primitive, inputs, p)


def _is_plain(p: dict, x: Array, kernel: Array) -> bool:
    layout = tuple(map(tuple, p["dimension_numbers"]))
    ones = tuple(p["lhs_dilation"]) == tuple(p["rhs_dilation"]) == (1, 1)
    nhwc = layout == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    same = x.dtype == kernel.dtype and p["preferred_element_type"] in (None, x.dtype)
    return nhwc and ones and same and p["feature_group_count"] == 1 and p["precision"] is None


_SPECIAL: dict[str, Callable[[_Sliced, Op, list[Any]], list[Any]]] = {
    "broadcast_in_dim": _resized("shape"),
    "reshape": _resized("new_sizes"),
    "dynamic_slice": _resized("slice_sizes"),
    "iota": _iota,
    "random_bits": _iota,  # the dense draw: what stays sees the numbers it saw
    "permute": _permute,
    "slice": _slice,
    "pad": _pad,
    "split": _split,
    "gather": _gather,
    "conv_general_dilated": _conv,
}
