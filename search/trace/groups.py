"""Channel groups of any model: which indices of which parameters must be cut together.

`network` traces a function, reads its operations (`jaxfm.search.trace.rules`) and collects the
units that may be cut. A unit is one channel, head or dimension with everything that belongs to it,
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

from jaxfm.model import Array, PyTree
from jaxfm.search.trace.graph import flatten, numbers
from jaxfm.search.trace.labels import Axis, Labels
from jaxfm.search.trace.plan import AxisPlan, Leaf, enter, make_planner, shape_of
from jaxfm.search.trace.reading import fresh_axis, new_reading
from jaxfm.search.trace.roles import Group, find_groups
from jaxfm.search.trace.rules import read

Kept = tuple[np.ndarray, ...]
"""Which units stay: a group's bool[size], or bool[layers, size] where layers choose their own."""

Scores = tuple[Array, ...]
"""How much each unit matters: f32[size] of each group, or f32[layers, size]."""

IGNORED = "it is ignored, as requested"


class Network(NamedTuple):
    """A function of parameters and inputs whose parameters can be cut.

    Attributes:
      functions: what was traced; the first one is the model, further ones share its parameters.
      treedef: structure of the parameters.
      leaves: the parameters in the order of `treedef`.
      groups: the G groups of units.
      frozen: by "path:axis", why an axis of a parameter cannot be cut.
      unknown: primitives without a rule, and how often each occurs; what they touch is frozen.
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
        """Number of units of each group, i32[G]."""
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
      params: any pytree of arrays or shapes.
      inputs: example arrays or shapes; graphs for other shapes are made when they are needed.
      also: further functions of the same arguments, such as the model in training mode; their
        outputs may be cut (statistics of batch norm).
      ignore: `fnmatch` patterns over "path" or "path:axis" that name what must not be cut.
      ties: pairs of "path:axis" that are cut together although nothing in the function says so.
    Raises:
      ValueError: a pattern that matches nothing, two parameters with one path, or a function in
        which nothing can be cut (the message says why).
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = ["/".join(map(key_name, path)) for path, _ in flat]
    if twice := sorted(path for path, times in Counter(paths).items() if times > 1):
        raise ValueError(f"More than one parameter has the path {twice[0]!r}; rename one of them.")
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in flat]
    inputs = jax.tree.map(shape_of, inputs)
    functions = (function, *also)
    notes, leaf_axes = _first_reading(functions, treedef, shapes, inputs, paths, ignore, ties)
    labels = notes.labels
    units, groups = find_groups(notes, leaf_axes, paths)
    frozen = _frozen(labels, leaf_axes, paths, units)
    if not groups:
        few = "; ".join(f"{name}: {why}" for name, why in list(frozen.items())[:5])
        raise ValueError(f"No axis of the parameters can be cut ({few}).")
    numbered = [[_renumber(labels.resolve(a), units) for a in axes] for axes in leaf_axes]
    leaves = tuple(
        Leaf(path, shape.shape, shape.dtype, tuple(axes))
        for path, shape, axes in zip(paths, shapes, numbered, strict=True)
    )
    return Network(
        functions=functions,
        treedef=treedef,
        leaves=leaves,
        groups=groups,
        frozen=frozen,
        unknown=dict(notes.unknown),
        example=inputs,
        plan=make_planner(functions, treedef, leaves, len(units)),
    )


def key_name(key: Any) -> str:
    """Returns the plain name of one step of a path in a pytree."""
    return str(next(getattr(key, n) for n in ("key", "name", "idx") if hasattr(key, n)))


def _first_reading(functions, treedef, shapes, inputs, paths, ignore, ties):
    """Returns the labels after all functions were read, and the axes of every leaf in them."""
    notes = new_reading()
    leaf_axes = [[fresh_axis(n, notes.labels) for n in leaf.shape] for leaf in shapes]
    for path, axes in zip(paths, leaf_axes, strict=True):
        for d, axis in enumerate(axes):
            names = (path, f"{path}:{d}")
            if any(fnmatch.fnmatch(name, p) for name in names for p in ignore):
                notes.labels.freeze(axis, IGNORED)
    _check_patterns(paths, leaf_axes, ignore)
    place = {f"{p}:{d}": axis for p, axes in zip(paths, leaf_axes) for d, axis in enumerate(axes)}
    for one, other in ties:
        if one not in place or other not in place:
            raise ValueError(
                f"ties={(one, other)} names an axis that does not exist; give 'path:axis'."
            )
        notes.labels.unify(place[one], place[other], "it is tied to an axis that cannot be cut")
    for i, function in enumerate(functions):
        graph, values = flatten(function, jax.tree.unflatten(treedef, shapes), *inputs)
        enter(graph, values, leaf_axes, notes)
        read(graph, values, notes)
        if i == 0:
            for number in numbers(graph.outputs):
                for axis in notes.axes[number]:
                    notes.labels.freeze(axis, "it is an output of the model")
        keep = [axis for axes in notes.axes.values() for axis in axes]
        notes.axes.clear()
        notes.axes[-1 - i] = keep  # needed only to find the groups
    return notes, leaf_axes


def _check_patterns(paths: list[str], leaf_axes, ignore: Sequence[str]) -> None:
    if isinstance(ignore, str):
        raise ValueError(
            f"ignore={ignore!r} is a string; give a sequence of patterns, [{ignore!r}]."
        )
    axes = [f"{p}:{d}" for p, own in zip(paths, leaf_axes, strict=True) for d in range(len(own))]
    for pattern in ignore:
        if not any(fnmatch.fnmatch(name, pattern) for name in (*paths, *axes)):
            close = difflib.get_close_matches(pattern.rsplit(":", 1)[0], paths, 1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(
                f"ignore={pattern!r} matches no parameter and no axis of one ('path:0'){hint} "
                f"The parameters are {paths}."
            )


def _frozen(labels: Labels, leaf_axes, paths, units: dict[int, int]) -> dict[str, str]:
    out = {}
    for path, own in zip(paths, leaf_axes, strict=True):
        for d, axis in enumerate(own):
            resolved = labels.resolve(axis)
            if len(axis) > 1 and not any(i in units for i in resolved.reshape(-1).tolist()):
                why = labels.reason(axis)
                out[f"{path}:{d}"] = why or "all of its entries must be kept or cut together"
    return out


def _renumber(axis: Axis, units: dict[int, int]) -> Axis:
    ids = np.unique(axis)
    table = np.array([units.get(i, 0) for i in ids.tolist()], np.int64)
    out = table[np.searchsorted(ids, axis)] if axis.size else axis
    return out[:, out.any(0)]
