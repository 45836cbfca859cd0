"""Channel groups of any model: which indices of which parameters must be cut together.

`network` traces a function, reads its operations (`jaxfm.search.trace.rules`) and collects the units
that may be cut. A unit is one channel, head or dimension with everything that belongs to it,
wherever it occurs; a group holds the units of one role, among which a search chooses. Source: Fang
et al. 2023 (DepGraph, arXiv 2301.12900) for the idea of groups by dependency; here they follow from
the jaxpr alone.

>>> import jax, jax.numpy as jnp
>>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
>>> f = lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"]
>>> [(g.name, g.size) for g in network(f, params, jnp.ones((3, 4))).groups]
[('up:1', 8)]
"""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfm.model import PyTree
from jaxfm.search.trace.graph import Graph, Values, flatten, numbers
from jaxfm.search.trace.labels import Axis, Labels
from jaxfm.search.trace.rules import Divisor, Reading, read, reading

Kept = tuple[np.ndarray, ...]
"""Which units stay: a group's bool[size], or bool[layers, size] where layers choose their own."""


class Member(NamedTuple):
    """One axis of one parameter in which units of a group occur."""

    leaf: int
    path: str
    axis: int


IGNORED = "it is ignored, as asked"


class Group(NamedTuple):
    """Units of one role.

    Attributes:
      name: "path:axis" of the first parameter that makes its units (they are its last axis).
      size: number of units.
      layers: None, or the layers of a loop, each of which keeps as many units, but its own.
      first: number of its first unit; units are numbered from 1, group after group.
      members: where its units occur.
    """

    name: str
    size: int
    layers: int | None
    first: int
    members: tuple[Member, ...]


class Leaf(NamedTuple):
    """One array of the parameters.

    Attributes:
      path: its names, joined by "/".
      shape, dtype: of the dense model.
      axes: of units.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[Axis, ...]


class AxisPlan(NamedTuple):
    """A function at given input shapes, with the units of every value.

    Attributes:
      graph, values: its operations.
      axes: of units, by value.
      divisors: quotients by the size of a sum over units, by output value.
      data: values that depend on more than the parameters.
    """

    graph: Graph
    values: Values
    axes: dict[int, tuple[Axis, ...]]
    divisors: dict[int, Divisor]
    data: set[int]


class Network(NamedTuple):
    """A function of parameters and inputs whose parameters can be cut.

    Attributes:
      functions: what was traced: the first one is the model, further ones share its parameters.
      treedef: of the parameters.
      leaves: of the parameters.
      groups: G of them.
      frozen: by "path:axis", why an axis of a parameter cannot be cut.
      unknown: primitives without a rule; what they touch is frozen.
      example: shapes of the inputs of the first function.
      plan: `(function's number, *inputs) -> AxisPlan`, remembered by the shapes of the inputs.
    """

    functions: tuple[Callable, ...]
    treedef: Any
    leaves: tuple[Leaf, ...]
    groups: tuple[Group, ...]
    frozen: dict[str, str]
    unknown: dict[str, int]
    example: tuple[PyTree, ...]
    plan: Callable[..., AxisPlan]

    @property
    def sizes(self) -> np.ndarray:
        """i32[G], units of each group."""
        return np.array([g.size for g in self.groups], np.int32)


def network(
    function: Callable,
    params: PyTree,
    *inputs: PyTree,
    also: Sequence[Callable] = (),
    ignore: Sequence[str] = (),
    ties: Sequence[tuple[str, str]] = (),
) -> Network:
    """Reads a function and finds its groups.

    Args:
      function: `(params, *inputs) -> output`, traceable; no axis of its output is cut.
      params: arrays or shapes, any pytree.
      inputs: example arrays or shapes; graphs for other shapes are made as they are needed.
      also: further functions of the same arguments, such as the model in training mode; outputs of
        theirs may be cut (statistics of batch norm).
      ignore: patterns as of `fnmatch` over "path" or "path:axis" of what must not be cut.
      ties: pairs of "path:axis" that are cut together though nothing in the function says so.
    Raises:
      ValueError: a pattern that matches nothing, two parameters of one path, or nothing can be cut
        (it says why not).
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = ["/".join(map(key_name, path)) for path, _ in flat]
    if twice := sorted(path for path, times in Counter(paths).items() if times > 1):
        raise ValueError(f"More than one parameter has the path {twice[0]!r}; rename one of them.")
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in flat]
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), _dtype(x)), inputs)
    functions = (function, *also)
    notes, leaf_axes = _first_reading(functions, treedef, shapes, inputs, paths, ignore, ties)
    labels = notes.labels
    units, groups = _groups(notes, leaf_axes, paths)
    frozen = _frozen(labels, leaf_axes, paths, units)
    if not groups:
        few = "; ".join(f"{name}: {why}" for name, why in list(frozen.items())[:5])
        raise ValueError(f"No axis of the parameters can be cut ({few}).")
    numbered = [[_renumber(labels.resolve(a), units) for a in axes] for axes in leaf_axes]
    leaves = tuple(
        Leaf(path, shape.shape, shape.dtype, tuple(axes))
        for path, shape, axes in zip(paths, shapes, numbered, strict=True)
    )
    plan = _planner(functions, treedef, leaves, len(units))
    return Network(functions, treedef, leaves, groups, frozen, dict(notes.unknown), inputs, plan)


def key_name(key: Any) -> str:
    """The plain name of one step of a path in a pytree."""
    return str(next(getattr(key, n) for n in ("key", "name", "idx") if hasattr(key, n)))


def _dtype(x: Any) -> Any:
    return jax.dtypes.result_type(x) if not hasattr(x, "dtype") else x.dtype


def _first_reading(functions, treedef, shapes, inputs, paths, ignore, ties):
    """Labels after all functions, and the axes of every leaf in them."""
    notes = reading()
    leaf_axes = [[_leaf_axis(n, notes.labels) for n in leaf.shape] for leaf in shapes]
    for path, axes in zip(paths, leaf_axes, strict=True):
        for d, axis in enumerate(axes):
            names = (path, f"{path}:{d}")
            if any(fnmatch.fnmatch(name, p) for name in names for p in ignore):
                notes.labels.freeze(axis, IGNORED)
    _check_patterns(paths, leaf_axes, ignore)
    place = {f"{p}:{d}": axis for p, axes in zip(paths, leaf_axes) for d, axis in enumerate(axes)}
    for one, other in ties:
        if one not in place or other not in place:
            raise ValueError(f"ties={(one, other)}: there is no such axis; give 'path:axis'.")
        notes.labels.unify(place[one], place[other], "it is tied to an axis that cannot be cut")
    for i, function in enumerate(functions):
        graph, values = flatten(function, jax.tree.unflatten(treedef, shapes), *inputs)
        _enter(graph, values, leaf_axes, notes)
        read(graph, values, notes)
        if i == 0:
            for number in numbers(graph.outputs):
                for axis in notes.axes[number]:
                    notes.labels.freeze(axis, "it is an output of the model")
        keep = [axis for axes in notes.axes.values() for axis in axes]
        notes.axes.clear()
        notes.axes[-1 - i] = keep  # only to be grouped by
    return notes, leaf_axes


def _leaf_axis(size: int, labels: Labels) -> Axis:
    return labels.fresh(size) if size > 1 else np.zeros((size, 0), np.int64)


def _enter(graph: Graph, values: Values, leaf_axes: list[list[Axis]], notes: Reading) -> None:
    held = len(leaf_axes)
    notes.axes.update(zip(graph.inputs[:held], leaf_axes, strict=True))
    for number in graph.inputs[held:]:
        notes.axes[number] = [np.zeros((n, 0), np.int64) for n in values.shapes[number]]


def _check_patterns(paths: list[str], leaf_axes, ignore: Sequence[str]) -> None:
    if isinstance(ignore, str):
        raise ValueError(f"ignore={ignore!r}: give a sequence of patterns, [{ignore!r}].")
    axes = [f"{p}:{d}" for p, own in zip(paths, leaf_axes, strict=True) for d in range(len(own))]
    for pattern in ignore:
        if not any(fnmatch.fnmatch(name, pattern) for name in (*paths, *axes)):
            close = difflib.get_close_matches(pattern.rsplit(":", 1)[0], paths, 1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(
                f"ignore={pattern!r} matches no parameter, nor an axis of one ('path:0'){hint} "
                f"There are {paths}."
            )


def _groups(notes: Reading, leaf_axes, paths) -> tuple[dict[int, int], tuple[Group, ...]]:
    """Units by id, numbered from 1, and the groups in the order of the parameters."""
    labels = notes.labels
    axes = [axis for kept in notes.axes.values() for axis in kept]
    while True:
        _balance(notes)
        resolved = _distinct([labels.resolve(a) for a in axes])
        leaves = [[labels.resolve(a) for a in own] for own in leaf_axes]
        order = _units_in_order(leaves)
        roles = _roles(order, resolved, _loops(notes, leaf_axes, leaves))
        bad = _irregular(roles, resolved)
        if not len(bad):
            break
        labels.freeze(bad, "its units do not combine with those of other axes alike")
    units: dict[int, int] = {}
    groups: list[Group] = []
    for (layers, _), ids in roles.items():
        members = tuple(
            Member(i, path, d)
            for i, (path, own) in enumerate(zip(paths, leaves, strict=True))
            for d, axis in enumerate(own)
            if np.isin(axis, ids).any()
        )
        named = next((m for m in members if 0 < m.axis == len(leaf_axes[m.leaf]) - 1), members[0])
        name = f"{named.path}:{named.axis}"
        again = sum(other.name.split("#")[0] == name for other in groups)
        name = f"{name}#{again + 1}" if again else name  # heads and what is in a head, say
        groups.append(Group(name, len(ids), layers, len(units) + 1, members))
        units.update((i, len(units) + 1) for i in ids)
    return units, tuple(groups)


def _balance(notes: Reading) -> None:
    """Equal blocks stay equal; what is joined for one axis can be uneven in another one."""
    why = "a group of a convolution would keep fewer channels than others"
    while any(notes.labels.balance(axis, blocks, why) for axis, blocks in notes.blocks):
        pass


def _distinct(axes: list[Axis]) -> list[Axis]:
    found = {(axis.shape, axis.tobytes()): axis for axis in axes if axis.shape[1]}
    return list(found.values())


def _units_in_order(leaves: list[list[Axis]]) -> list[int]:
    seen = dict.fromkeys(i for own in leaves for axis in own for i in axis.reshape(-1).tolist())
    return [i for i in seen if i]


def _loops(notes: Reading, leaf_axes, leaves) -> dict[int, int]:
    """By id: the layers of the loop that has it to itself."""
    homes: dict[int, set[int]] = {}
    for i, own in notes.homes.items():
        for part in notes.labels.resolve(np.array([[i]])).reshape(-1).tolist():
            homes.setdefault(part, set()).update(own)
    layers: dict[int, set[int]] = {}
    for own in leaves:
        for d, axis in enumerate(own):
            for i in np.unique(axis).tolist():
                stacked = d > 0 and not own[0].shape[1]
                layers.setdefault(i, set()).add(len(own[0]) if stacked else -1)
    alone = {i for i, loops in homes.items() if len(loops) == 1 and -1 not in loops}
    return {i: min(layers[i]) for i in alone if len(layers.get(i, ())) == 1 and -1 not in layers[i]}


def _roles(order: list[int], axes: list[Axis], loops: dict[int, int]) -> dict[Any, list[int]]:
    """Ids that occur equally often in every axis, under their layers and that signature."""
    place = {i: n for n, i in enumerate(order)}
    counts = np.zeros((len(order), len(axes)), np.int32)
    lookup = np.full(max(order, default=0) + 1, -1)
    lookup[order] = np.arange(len(order))
    for j, axis in enumerate(axes):
        ids = axis.reshape(-1)
        rows = lookup[ids[ids < len(lookup)]]
        np.add.at(counts[:, j], rows[rows >= 0], 1)
    roles: dict[Any, list[int]] = {}
    for i in order:
        roles.setdefault((loops.get(i), counts[place[i]].tobytes()), []).append(i)
    return {role: ids for role, ids in roles.items() if len(ids) > 1}


def _irregular(roles: dict[Any, list[int]], axes: list[Axis]) -> np.ndarray:
    """Ids whose combinations with other groups in one axis are not all there equally often."""
    group_of = {i: g for g, ids in enumerate(roles.values()) for i in ids}
    sizes = [len(ids) for ids in roles.values()]
    bad: set[int] = set()
    for axis in axes:
        if axis.shape[1] < 2:
            continue
        rows = [tuple(sorted(i for i in row if i in group_of)) for row in axis.tolist()]
        times = Counter(rows)
        by_groups: dict[tuple, list[tuple]] = {}
        for row in times:
            by_groups.setdefault(tuple(sorted(group_of[i] for i in row)), []).append(row)
        for groups, found in by_groups.items():
            full = int(np.prod([sizes[g] for g in groups]))
            equal = len({times[row] for row in found}) == 1
            if len(groups) > 1 and (
                len(set(groups)) < len(groups) or len(found) != full or not equal
            ):
                bad.update(i for row in found for i in row)
    return np.array(sorted(bad), np.int64)


def _frozen(labels: Labels, leaf_axes, paths, units: dict[int, int]) -> dict[str, str]:
    out = {}
    for path, own in zip(paths, leaf_axes, strict=True):
        for d, axis in enumerate(own):
            resolved = labels.resolve(axis)
            if len(axis) > 1 and not any(i in units for i in resolved.reshape(-1).tolist()):
                why = labels.reason(axis)
                out[f"{path}:{d}"] = why or "its indices all live and die together"
    return out


def _renumber(axis: Axis, units: dict[int, int]) -> Axis:
    ids = np.unique(axis)
    table = np.array([units.get(i, 0) for i in ids.tolist()], np.int64)
    out = table[np.searchsorted(ids, axis)] if axis.size else axis
    return out[:, out.any(0)]


def _planner(
    functions, treedef, leaves: tuple[Leaf, ...], num_units: int
) -> Callable[..., AxisPlan]:
    made: dict[Any, AxisPlan] = {}
    params = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])

    def plan(number: int, *inputs: PyTree) -> AxisPlan:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), _dtype(x)), inputs)
        flat, form = jax.tree.flatten(shapes)
        key = (number, form, tuple((x.shape, str(x.dtype)) for x in flat))
        if key not in made:
            made[key] = _plan(functions[number], params, shapes, leaves, num_units)
        return made[key]

    return plan


def _plan(function, params, inputs, leaves: tuple[Leaf, ...], num_units: int) -> AxisPlan:
    """Reads the function again, its parameters labelled with units."""
    graph, values = flatten(function, params, *inputs)
    notes = reading()
    notes.labels.fresh(num_units)  # ids 1, 2, ... are the units
    _enter(graph, values, [list(leaf.axes) for leaf in leaves], notes)
    read(graph, values, notes)
    everyone = np.arange(1, num_units + 1)
    if not np.array_equal(notes.labels.find(everyone), everyone):
        raise ValueError(
            "With inputs of these shapes the function joins parameters that it keeps apart for "
            "the example; trace the network with inputs of these shapes."
        )

    def own(axis: Axis) -> Axis:
        axis = notes.labels.resolve(axis)
        axis = np.where(axis > num_units, 0, axis)
        return axis[:, axis.any(0)]

    axes = {number: tuple(map(own, found)) for number, found in notes.axes.items()}
    divisors = {
        number: Divisor(tuple(map(own, d.axes)))
        for number, d in notes.divisors.items()
        if any(own(axis).shape[1] for axis in d.axes)
    }
    return AxisPlan(graph, values, axes, divisors, _data(graph, len(leaves)))


def _data(graph: Graph, num_leaves: int) -> set[int]:
    """Values that depend on the inputs, loop bodies included."""
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
