"""Roles: which units are chosen among, and which cannot be, from the axes in which they occur."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from jaxfm.search.trace.labels import Axis
from jaxfm.search.trace.reading import Reading


class Member(NamedTuple):
    """One axis of one parameter in which units of a group occur.

    Attributes:
      leaf: number of the parameter.
      path: its path.
      axis: number of the axis.
    """

    leaf: int
    path: str
    axis: int


class Group(NamedTuple):
    """Units of one role.

    Attributes:
      name: "path:axis" of the first parameter that produces its units (on its last axis).
      size: number of units.
      layers: number of layers of a loop, each of which keeps equally many units of its own choice;
        None outside of loops.
      first: number of its first unit; units are numbered from 1, group after group.
      members: where its units occur.
    """

    name: str
    size: int
    layers: int | None
    first: int
    members: tuple[Member, ...]


def find_groups(notes: Reading, leaf_axes, paths) -> tuple[dict[int, int], tuple[Group, ...]]:
    """Returns the units by id, numbered from 1, and the groups in the order of the parameters.

    Args:
      notes: what was read of all functions; ids that cannot be in a group are frozen in it.
      leaf_axes: the axes of every parameter.
      paths: the names of the parameters.
    """
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
        labels.freeze(bad, "its units are not evenly combined with those of other axes")
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
        name = (
            f"{name}#{again + 1}" if again else name
        )  # such as heads and the dimensions of a head
        groups.append(Group(name, len(ids), layers, len(units) + 1, members))
        units.update((i, len(units) + 1) for i in ids)
    return units, tuple(groups)


def _balance(notes: Reading) -> None:
    """Keeps equal blocks equal; what is joined for one axis can be uneven in another one."""
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
    """Returns, by id, the number of layers of the one loop that it occurs in."""
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
    """Returns ids that occur equally often in every axis, by their layers and that signature."""
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
    """Returns ids whose combinations with other groups do not occur equally often in an axis."""
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
