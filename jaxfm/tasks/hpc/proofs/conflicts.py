"""Whether two iterations of a loop may reach one element, for all sizes, by integer sets (isl).

Two accesses conflict where their iterations, the equality of their subscripts and "another
iteration of the parallel loop" have a common integer point. Without one, no size whatever has a
conflict. With one, there is a race if both accesses surely happen there; it need not be one where
the loop only might reach them, or where it depends on an unknown offset.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from jaxfm.tasks.hpc.program import Conflict, For, affine
from jaxfm.tasks.hpc.proofs.accesses import Names, Place, places
from jaxfm.tasks.hpc.proofs.integer_points import TooLong, sets

_MOST_PAIRS = 3000


class Found(NamedTuple):
    """What a search for conflicts has found.

    Attributes:
        kind: "none", "race", or "doubt", with `reason` as its sentence.
        values: Example values of the program's sizes at the conflict.
        sizes_free: Whether the conflict is there whatever the sizes are.
    """

    kind: str
    reason: str = ""
    conflict: Conflict | None = None
    values: tuple[tuple[str, int], ...] = ()
    sizes_free: bool = True


def parallel_loops(loop: For, collapse: int) -> list[For] | None:
    """The loops that a directive distributes; None if they are not as `collapse` demands."""
    found = [loop]
    while len(found) < collapse:
        inner = found[-1].body
        if len(inner) != 1 or not isinstance(inner[0], For):
            return None
        found.append(inner[0])
    variables = {x.var for x in found}
    for inner_loop in found[1:]:
        for bound in (inner_loop.lower, inner_loop.upper):
            linear = affine(bound)
            if linear is None or variables & set(linear[0]):
                return None
    return found


def search(loop: For, shared: frozenset[str], *, collapse: int = 1, deadline: float = 0.0) -> Found:
    """Looks for two iterations that conflict.

    Args:
        loop: The loop, whose iterations any threads run in any order.
        shared: The names that all threads share.
        collapse: How many nested loops are distributed.
        deadline: When to give up, as `time.monotonic` counts; 0 for never.
    """
    spread = parallel_loops(loop, collapse)
    if spread is None:
        return Found("doubt", "The loops under collapse are not nested as it demands.")
    reached = [p for p in places(loop) if p.access.name in shared]
    doubt = Found("none")
    pairs = 0
    for one in reached:
        if not one.access.write:
            continue
        for other in reached:
            if other.access.name != one.access.name or (one.held and one.held == other.held):
                continue
            if other.access.write and _later(one, other):
                continue
            pairs += 1
            if pairs > _MOST_PAIRS or (deadline and time.monotonic() > deadline):
                return Found("doubt", "The loop has more accesses than there is time for.")
            found = _pair(one, other, len(spread))
            if found.kind == "race":
                return found
            if found.kind == "doubt" and doubt.kind == "none":
                doubt = found
    return doubt


def _later(one: Place, other: Place) -> bool:
    """Whether a pair of writes is met in its other order as well."""
    return one.access.path > other.access.path


def _pair(one: Place, other: Place, spread: int) -> Found:
    """Whether two accesses conflict in two iterations."""
    names = Names()
    first, x, exact_one = names.domain(one, "i")
    second, y, exact_other = names.domain(other, "j")
    exact = exact_one and exact_other
    same = []
    for a, b in zip(one.access.subscripts, other.access.subscripts):
        left, right = names.linear(a, x), names.linear(b, y)
        if left is None or right is None:
            exact = False
        else:
            same.append(f"{left} = {right}")
    apart = " or ".join(f"i{k} != j{k}" for k in range(spread))
    dims = [f"i{k}" for k in range(len(one.loops))] + [f"j{k}" for k in range(len(other.loops))]
    body = " and ".join(f"({part})" for part in (first, second, *same, apart))
    head = f"[{', '.join(names.parameters.values())}] -> {{ [{', '.join(dims)}] : "
    try:
        with sets() as isl:
            meeting = isl.Set(f"{head}{body} }}").coalesce()
            if meeting.is_empty():
                return Found("none")
            told = _told(one, other, names, meeting.sample_point(), isl)
            if not exact:
                return _unsure(one, other, told)
            return told._replace(sizes_free=_whatever(meeting, names, one, other, isl))
    except TooLong:
        return Found("doubt", "The proof by integer sets takes too long for this loop.")


def _unsure(one: Place, other: Place, told: Found) -> Found:
    name = one.access.name
    linear = all(affine(s) is not None for s in (*one.access.subscripts, *other.access.subscripts))
    if not linear:
        reason = f"The subscripts of {name} are not linear, so iterations may meet in one element."
    else:
        reason = f"Whether iterations meet in {name} depends on values that are not known."
    return told._replace(kind="doubt", reason=reason)


def _whatever(meeting: Any, names: Names, one: Place, other: Place, isl: Any) -> bool:
    """Whether the conflict is there for each value of what only subscripts depend on."""
    bounds: set[str] = set()
    for loop in (*one.loops, *other.loops):
        for bound in (loop.lower, loop.upper):
            linear = affine(bound)
            bounds |= set(linear[0]) if linear else set()
    offsets = {
        name
        for subscript in (*one.access.subscripts, *other.access.subscripts)
        for name in (affine(subscript) or ({}, 0))[0]
    } - bounds
    wanted = [k for name, k in names.parameters.items() if name in offsets]
    if not wanted:
        return True
    values = meeting.params()
    for name in list(names.parameters.values()):
        if name not in wanted:
            at = values.find_dim_by_name(isl.dim_type.param, name)
            if at >= 0:
                values = values.project_out(isl.dim_type.param, at, 1)
    return isl.Set(f"[{', '.join(wanted)}] -> {{ : }}").is_subset(values)


def _told(one: Place, other: Place, names: Names, point: Any, isl: Any) -> Found:
    """The conflict at a point, in the program's own names."""
    value = lambda kind, at: point.get_coordinate_val(kind, at).to_python()
    space = point.get_space()
    parameters = {
        space.get_dim_name(isl.dim_type.param, k): value(isl.dim_type.param, k)
        for k in range(space.dim(isl.dim_type.param))
    }
    values = tuple((name, parameters.get(k, 0)) for name, k in names.parameters.items())
    first = tuple((loop.var, value(isl.dim_type.set, k)) for k, loop in enumerate(one.loops))
    second = tuple(
        (loop.var, value(isl.dim_type.set, len(one.loops) + k))
        for k, loop in enumerate(other.loops)
    )
    conflict = Conflict(one.access, other.access, (first, second))
    return Found("race", conflict=conflict, values=values)
