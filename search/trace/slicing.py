"""Sliced runs: arrays hold what is kept; shapes among an operation's parameters are recomputed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import Array
from jaxfm.search.trace.execution import convolve, run_scan
from jaxfm.search.trace.graph import Atom, Op, bind
from jaxfm.search.trace.groups import Kept
from jaxfm.search.trace.labels import Axis, plain
from jaxfm.search.trace.plan import AxisPlan
from jaxfm.search.trace.roles import Group


class Sliced(NamedTuple):
    """Runs on arrays of what is kept; every shape in an operation's parameters is recomputed."""

    plan: AxisPlan
    groups: tuple[Group, ...]
    kept: Kept

    def units(self) -> None:
        return None

    def positions(self, axis: Axis) -> np.ndarray:
        return positions(axis, self.groups, self.kept)

    def axes(self, atom: Atom) -> tuple[Axis, ...]:
        if isinstance(atom, int):
            return self.plan.axes[atom]
        return tuple(map(plain, np.shape(atom.value)))

    def shape(self, number: int) -> tuple[int, ...]:
        return tuple(count_kept(axis, self.groups, self.kept) for axis in self.plan.axes[number])

    def const(self, number: int, value: Any, units: Any) -> Any:
        for d, axis in enumerate(self.plan.axes[number]):
            if axis.shape[1]:
                value = take(jnp.asarray(value), d, self.positions_in_all_layers(axis))
        return value

    def positions_in_all_layers(self, axis: Axis) -> np.ndarray:
        """Returns the kept positions of an axis that all layers must cut alike."""
        rows = np.atleast_2d(self.positions(axis))
        if (rows != rows[0]).any():
            raise ValueError(
                "The layers keep different entries of an axis; they must cut it alike."
            )
        return rows[0]

    def kept_between(self, axis: Axis, start: int, stop: int) -> int:
        """Returns how many entries from start to stop every layer keeps."""
        rows = np.atleast_2d(self.positions(axis))
        counts = ((rows >= start) & (rows < stop)).sum(1)
        if counts.min() != counts.max():
            raise ValueError(
                "The layers keep unequal numbers in a part of an axis; give equal numbers."
            )
        return int(counts[0])

    def step(self, op: Op, inputs: list[Any], units: Any) -> list[Any]:
        if op.body is not None:
            return run_scan(op, inputs, self, None)
        special = _SPECIAL.get(op.name)
        out = special(self, op, inputs) if special else bind(op.primitive, inputs, op.params)
        return [self._divide(x, i) for x, i in zip(out, op.outputs, strict=True)]

    def _divide(self, value: Array, number: int) -> Array:
        divisor = self.plan.divisors.get(number)
        if divisor is None:
            return value
        size = math.prod(map(len, divisor.axes))
        kept = math.prod(count_kept(axis, self.groups, self.kept) for axis in divisor.axes)
        factor = divisor.factor(size, kept)
        return value * jnp.asarray(factor, value.dtype)


def positions(axis: Axis, groups: tuple[Group, ...], kept: Kept) -> np.ndarray:
    """Returns kept positions i64[k] of an axis, i64[layers, k] where layers choose their own."""
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


def count_kept(axis: Axis, groups: tuple[Group, ...], kept: Kept) -> int:
    """Returns how many entries of an axis are kept, per layer."""
    return positions(axis, groups, kept).shape[-1] if axis.shape[1] else len(axis)


def take(value: Any, d: int, index: np.ndarray) -> Any:
    """Takes entries along axis d; an index i64[layers, k] has a row for each layer (axis 0)."""
    value = jnp.asarray(value)
    if index.ndim == 1:
        return jnp.take(value, jnp.asarray(index, jnp.int32), axis=d, unique_indices=True)
    others = [i for i in range(value.ndim) if i not in (0, d)]
    return jnp.take_along_axis(
        value, lax.expand_dims(jnp.asarray(index, jnp.int32), others), axis=d
    )


def _resized(name: str) -> Callable:
    def step(how: Sliced, op: Op, inputs: list[Any]) -> list[Any]:
        return bind(op.primitive, inputs, op.params | {name: how.shape(op.outputs[0])})

    return step


def _iota(how: Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    (value,) = bind(op.primitive, inputs, op.params)
    for d, axis in enumerate(how.plan.axes[op.outputs[0]]):
        value = take(value, d, how.positions_in_all_layers(axis)) if axis.shape[1] else value
    return [value]


def _permute(how: Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    d, index = op.params["axis"], op.params["index"]
    before = how.positions_in_all_layers(how.axes(op.inputs[0])[d])
    after = how.positions_in_all_layers(how.plan.axes[op.outputs[0]][d])
    return [take(inputs[0], d, np.searchsorted(before, index[after]))]


def _slice(how: Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    (value,), p = inputs, op.params
    starts, limits = list(p["start_indices"]), list(p["limit_indices"])
    strides = list(p["strides"] or [1] * value.ndim)
    for d, axis in enumerate(how.axes(op.inputs[0])):
        if strides[d] > 1 and axis.shape[1]:
            chosen = np.isin(
                how.positions_in_all_layers(axis), np.arange(starts[d], limits[d], strides[d])
            )
            value = take(value, d, np.flatnonzero(chosen))
            starts[d], limits[d], strides[d] = 0, value.shape[d], 1
        elif axis.shape[1]:
            low, kept = (
                how.kept_between(axis, 0, starts[d]),
                how.kept_between(axis, starts[d], limits[d]),
            )
            starts[d], limits[d] = low, low + kept
    return [lax.slice(value, starts, limits, strides)]


def _pad(how: Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    config = []
    for axis, (low, high, interior) in zip(
        how.plan.axes[op.outputs[0]], op.params["padding_config"], strict=True
    ):
        if axis.shape[1] and (low or high):
            n = len(axis)
            low, high = how.kept_between(axis, 0, low), how.kept_between(axis, n - high, n)
        config.append((low, high, interior))
    return bind(op.primitive, inputs, op.params | {"padding_config": tuple(config)})


def _split(how: Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    sizes = tuple(how.shape(number)[op.params["axis"]] for number in op.outputs)
    return bind(op.primitive, inputs, op.params | {"sizes": sizes})


def _gather(how: Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    sizes = tuple(
        how.kept_between(axis, 0, len(axis)) if size == len(axis) and size > 1 else size
        for axis, size in zip(how.axes(op.inputs[0]), op.params["slice_sizes"], strict=True)
    )
    return bind(op.primitive, inputs, op.params | {"slice_sizes": sizes})


def _conv(how: Sliced, op: Op, inputs: list[Any]) -> list[Any]:
    p, (x, kernel) = op.params, inputs
    lhs, rhs, _ = p["dimension_numbers"]
    if p["feature_group_count"] > 1 and kernel.shape[rhs[1]] == 1:
        p = p | {"feature_group_count": x.shape[lhs[1]]}
    return convolve(op, inputs, p)


_SPECIAL: dict[str, Callable[[Sliced, Op, list[Any]], list[Any]]] = {
    "broadcast_in_dim": _resized("shape"),
    "reshape": _resized("new_sizes"),
    "dynamic_slice": _resized("slice_sizes"),
    "iota": _iota,
    "random_bits": _iota,  # the dense draw, so that what stays sees the same numbers
    "permute": _permute,
    "slice": _slice,
    "pad": _pad,
    "split": _split,
    "gather": _gather,
    "conv_general_dilated": _conv,
}
