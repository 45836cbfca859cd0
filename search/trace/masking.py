"""Masked runs: dense shapes and weights; what is cut is neutral where it would be added up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import Array
from jaxfm.search.trace.execution import convolve, run_scan
from jaxfm.search.trace.graph import Atom, Op, bind
from jaxfm.search.trace.labels import Axis
from jaxfm.search.trace.plan import AxisPlan
from jaxfm.search.trace.roles import Group

_EXTREMES = ("reduce_max", "reduce_min")


class Masked(NamedTuple):
    """Runs at dense shapes and zeroes what is cut where it would be added up."""

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
            return run_scan(op, inputs, self, layers)
        side, dims = summed_axes(op, self.plan)
        if op.name in _EXTREMES:
            dims = tuple(op.params["axes"])
        if dims and isinstance(op.inputs[side], int):
            like = inputs[side].dtype
            inputs[side] = self._fill(
                inputs[side], op.inputs[side], dims, units, _neutral(op, like)
            )
        if op.name == "conv_general_dilated":
            out = convolve(op, inputs, op.params)
        else:
            out = bind(op.primitive, inputs, op.params)
        return [self._divide(x, i, units) for x, i in zip(out, op.outputs, strict=True)]

    def _fill(
        self, value: Array, number: Atom, dims: Sequence[int], units: Array, neutral: Array
    ) -> Array:
        for d in dims:
            axis = self.plan.axes[number][d]  # type: ignore[index]
            if axis.shape[1]:
                there = lax.expand_dims(
                    is_present(axis, units), [i for i in range(value.ndim) if i != d]
                )
                value = jnp.where(there, value, neutral)
        return value

    def _divide(self, value: Array, number: int, units: Array) -> Array:
        divisor = self.plan.divisors.get(number)
        if divisor is None:
            return value
        size = math.prod(map(len, divisor.axes))
        kept = jnp.ones((), jnp.float32)
        for axis in divisor.axes:
            there = is_present(axis, units).sum() if axis.shape[1] else jnp.asarray(len(axis))
            kept = kept * there.astype(jnp.float32)
        return value * divisor.factor(size, kept).astype(value.dtype)


def _neutral(op: Op, dtype: Any) -> Array:
    """What changes no sum, or no largest or smallest value."""
    if op.name not in _EXTREMES:
        return jnp.zeros((), dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.asarray(-jnp.inf if op.name == "reduce_max" else jnp.inf, dtype)
    bounds = jnp.iinfo(dtype)
    return jnp.asarray(bounds.min if op.name == "reduce_max" else bounds.max, dtype)


def group_units(groups: tuple[Group, ...], masks: Sequence[Array], layers: int | None) -> Array:
    """Returns which units are present, bool[1 + units]; inside a loop bool[layers, 1 + units].

    The first entry is always True. Groups whose layers choose by themselves are whole outside of
    their loop.
    """
    parts = [jnp.ones((layers or 1, 1), bool)]
    for group, mask in zip(groups, masks, strict=True):
        own = group.layers is None or group.layers == layers
        there = jnp.asarray(mask, bool) if own else jnp.ones(group.size, bool)
        parts.append(jnp.broadcast_to(there, (layers or 1, group.size)))
    units = jnp.concatenate(parts, axis=1)
    return units if layers else units[0]


def is_present(axis: Axis, units: Any) -> Any:
    """Returns bool[n]: whether all units of each entry are present."""
    return units[axis].all(1)


def summed_axes(op: Op, plan: AxisPlan) -> tuple[int, tuple[int, ...]]:
    """Returns the number of the operand that must be masked, and its axes that are added up.

    In a product it is the operand that depends on data, so that no weight is ever batched over
    candidates; if both do, the smaller one.
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
