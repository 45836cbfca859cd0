"""The operations of a function at given input shapes, with the units of every value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfm.model import PyTree
from jaxfm.search.trace.graph import Graph, Values, flatten
from jaxfm.search.trace.labels import Axis, plain
from jaxfm.search.trace.reading import Divisor, Reading, new_reading
from jaxfm.search.trace.rules import read


class Leaf(NamedTuple):
    """One array of the parameters.

    Attributes:
      path: its names, joined by "/".
      shape, dtype: those of the dense model.
      axes: the units of each axis.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[Axis, ...]


class AxisPlan(NamedTuple):
    """A function at given input shapes, with the units of every value.

    Attributes:
      graph: its operations.
      values: shapes and dtypes of its values.
      axes: by value, the units of each axis.
      divisors: by output value, quotients by the size of a sum over units.
      data: values that depend on more than the parameters.
    """

    graph: Graph
    values: Values
    axes: dict[int, tuple[Axis, ...]]
    divisors: dict[int, Divisor]
    data: set[int]


def enter(graph: Graph, values: Values, leaf_axes: list[list[Axis]], notes: Reading) -> None:
    """Gives the inputs of a graph their axes: those of the parameters; data are never cut."""
    held = len(leaf_axes)
    notes.axes.update(zip(graph.inputs[:held], leaf_axes, strict=True))
    for number in graph.inputs[held:]:
        notes.axes[number] = [plain(n) for n in values.shapes[number]]


def make_planner(
    functions, treedef, leaves: tuple[Leaf, ...], num_units: int
) -> Callable[..., AxisPlan]:
    """Returns `plan(number, *inputs) -> AxisPlan`, remembered by the shapes of the inputs."""
    made: dict[Any, AxisPlan] = {}
    params = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])

    def plan(number: int, *inputs: PyTree) -> AxisPlan:
        shapes = jax.tree.map(shape_of, inputs)
        flat, form = jax.tree.flatten(shapes)
        key = (number, form, tuple((x.shape, str(x.dtype)) for x in flat))
        if key not in made:
            made[key] = _plan(functions[number], params, shapes, leaves, num_units)
        return made[key]

    return plan


def _plan(function, params, inputs, leaves: tuple[Leaf, ...], num_units: int) -> AxisPlan:
    """Reads the function again, its parameters labelled with units."""
    graph, values = flatten(function, params, *inputs)
    notes = new_reading()
    notes.labels.fresh(num_units)  # ids 1, 2, ... are the units
    enter(graph, values, [list(leaf.axes) for leaf in leaves], notes)
    read(graph, values, notes)
    everyone = np.arange(1, num_units + 1)
    if not np.array_equal(notes.labels.find(everyone), everyone):
        raise ValueError(
            "With inputs of these shapes the function couples parameters that are independent for "
            "the example; trace the network with inputs of these shapes."
        )

    def own(axis: Axis) -> Axis:
        axis = notes.labels.resolve(axis)
        axis = np.where(axis > num_units, 0, axis)
        return axis[:, axis.any(0)]

    axes = {number: tuple(map(own, found)) for number, found in notes.axes.items()}
    divisors = {
        number: d._replace(axes=tuple(map(own, d.axes)))
        for number, d in notes.divisors.items()
        if any(own(axis).shape[1] for axis in d.axes)
    }
    return AxisPlan(graph, values, axes, divisors, _data(graph, len(leaves)))


def _data(graph: Graph, num_leaves: int) -> set[int]:
    """Returns the values that depend on the inputs, those of loop bodies included."""
    found = set(graph.inputs[num_leaves:])

    def visit(graph: Graph) -> None:
        for op in graph.ops:
            ins = [a for a in op.inputs if isinstance(a, int)]
            depends = bool(found.intersection(ins))
            if op.body is not None:
                pairs = zip(op.body.inputs, op.inputs, strict=True)
                found.update(i for i, a in pairs if isinstance(a, int) and a in found)
                carry = op.body.inputs[op.params["num_consts"] :][: op.params["num_carry"]]
                if depends:
                    found.update(carry)
                visit(op.body)
            if depends:
                found.update(op.outputs)

    visit(graph)
    return found


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of an array, of a shape, or of a Python number."""
    dtype = x.dtype if hasattr(x, "dtype") else jax.dtypes.result_type(x)
    return jax.ShapeDtypeStruct(np.shape(x), dtype)
