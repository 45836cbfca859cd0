"""What two uses of a name are to each other over the iterations that run in parallel.

Sources: Goff, Kennedy and Tseng 1991, "Practical dependence testing" (the tests of one subscript).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxfm.tasks.hpc.lexer import Piece
from jaxfm.tasks.hpc.nests import Layout, Loop, Nest
from jaxfm.tasks.hpc.subscripts import Linear, linear


class Access(NamedTuple):
    """A use of a name: which piece it is, what it does, and its subscripts.

    Attributes:
        piece: Its number among the pieces.
        mode: "read", "write", or "update" (both, as of `+=` or `s = s + x`).
        subscripts: The pieces of each subscript; None for a scalar.
        statement: The number of its statement.
    """

    name: str
    piece: int
    mode: Literal["read", "write", "update"]
    subscripts: tuple[tuple[Piece, ...], ...] | None
    statement: int


_LOOKED_AT = 80


def dependences(accesses: Sequence[Access], where: Layout) -> list[tuple[int, int, str]]:
    """The relation of each two accesses of one name, and of a write with itself."""
    by_name: dict[str, list[Access]] = {}
    counted = {loop.var for loop in where.loops}
    for access in accesses:
        if access.name not in counted:
            by_name.setdefault(access.name, []).append(access)
    found = []
    for uses in by_name.values():
        for n, a in enumerate(uses):
            for b in uses[n:]:
                if a is not b or a.mode != "read":
                    found.append((a.piece, b.piece, _relation(a, b, uses, where)))
    return found


def _relation(a: Access, b: Access, uses: list[Access], where: Layout) -> str:
    if a.mode == b.mode == "read":
        return "both read"
    nest = next((n for n in where.nests if n.holds(a.piece) and n.holds(b.piece)), None)
    if nest is None:
        return "elsewhere"
    if _lock(a, where) and _lock(a, where) == _lock(b, where):
        return "protected"
    if a.subscripts is None or b.subscripts is None:
        return _scalar_relation([u for u in uses if nest.holds(u.piece)], where)
    return pair_relation(a, b, nest)


def _lock(access: Access, where: Layout) -> str:
    """The name of what locks an access, "" without any."""
    return next((x.name for x in where.locks if x.first <= access.piece < x.last), "")


def _scalar_relation(uses: list[Access], where: Layout) -> str:
    if uses[0].mode == "update":
        same = all(use.mode == "update" or _with_update(use, uses) for use in uses)
        return "scalar updated" if same else "scalar updated and used"
    first = next(use for use in uses if use.mode != "read")
    if any(use.mode == "read" and use.statement <= first.statement for use in uses):
        return "scalar used first"
    for branch in where.branches:
        if not branch.first <= first.piece < branch.last:
            continue
        if all(branch.first <= use.piece < branch.last for use in uses):
            continue
        kind, number = branch.name.split()
        other = f"{'else' if kind == 'then' else 'then'} {number}"
        if not any(
            x.name == other and x.first <= use.piece < x.last and use.mode != "read"
            for x in where.branches
            for use in uses
        ):
            return "scalar defined at times"
    return "scalar defined first"


def _with_update(use: Access, uses: list[Access]) -> bool:
    """Whether a use is the read of an update, as `s` on the right of `s = s + x`."""
    return any(u.statement == use.statement and u.mode == "update" for u in uses)


def pair_relation(a: Access, b: Access, nest: Nest) -> str:
    """What two accesses of one array are to each other over the iterations of a nest.

    "independent": never the same place in two iterations; "same iteration": the same place in one
    iteration only; "always": in all; "distance d": in iterations d apart; "crossing" and "maybe":
    in some, as far as the tests see.
    """
    assert a.subscripts is not None and b.subscripts is not None
    if len(a.subscripts) != len(b.subscripts):
        return "unknown"
    results: list[str] = []
    apart: dict[str, int] = {}
    for x, y in zip(a.subscripts, b.subscripts):
        result, var, steps = _dimension(linear(x), linear(y), _same(x, y), nest)
        results.append(result)
        if var and apart.setdefault(var, steps) != steps:
            return "independent"
    if "independent" in results:
        return "independent"
    if any(apart.values()):
        return _distance(max(abs(steps) for steps in apart.values()))
    if all(loop.var in apart for loop in nest.parallel):
        return "same iteration"
    for name in ("crossing", "maybe", "unknown", "unknown, same text"):
        if name in results:
            return name
    return "always"


def _same(x: tuple[Piece, ...], y: tuple[Piece, ...]) -> bool:
    return [p.text for p in x] == [p.text for p in y]


def _dimension(
    x: Linear | None, y: Linear | None, same: bool, nest: Nest
) -> tuple[str, str, int]:  # fmt: skip
    """The relation of two subscripts of one dimension; the loop and the distance that it fixes."""
    if x is None or y is None:
        return "unknown, same text" if same else "unknown", "", 0
    steps = {loop.var: loop.step for loop in nest.parallel}
    inner = {loop.var for loop in nest.inner}
    symbols = (name for name in (*x[0], *y[0]) if name not in steps and name not in inner)
    if any(x[0].get(name, 0) != y[0].get(name, 0) for name in symbols):
        return "unknown", "", 0
    pairs = {
        name: (x[0].get(name, 0), y[0].get(name, 0))
        for name in (*steps, *inner)
        if name in x[0] or name in y[0]
    }
    for name, (p, q) in pairs.items():
        if p == q:  # both count from one lower bound, so only its steps tell places apart
            pairs[name] = (p * steps.get(name, 1),) * 2
    distance = y[1] - x[1]
    divisor = math.gcd(*(c for pair in pairs.values() for c in pair))
    if (not divisor and distance) or (divisor and distance % divisor):
        return "independent", "", 0
    shared = [name for name in pairs if name in steps]
    if not shared:
        return "always", "", 0
    name = shared[0]
    p, q = pairs[name]
    if len(pairs) > 1:
        return "maybe", "", 0
    if p == q:
        return _fixed(distance // p, name, nest)
    loop = next(loop for loop in nest.parallel if loop.var == name)
    if not _meets((p, x[1]), (q, y[1]), loop):
        return "independent", "", 0
    return "crossing" if p == -q else "maybe", "", 0


def _meets(a: tuple[int, int], b: tuple[int, int], loop: Loop) -> bool:
    """Whether two forms of one variable are equal in two of a loop's iterations.

    Where its end is no number, it has as many iterations as are looked at.
    """
    lower, most = loop.lower or 0, _LOOKED_AT * loop.step
    upper = lower + (min(loop.trips, most) if loop.trips else most)
    values = range(lower, upper, loop.step)
    places: dict[int, set[int]] = {}
    for i in values:
        places.setdefault(a[0] * i + a[1], set()).add(i)
    return any(places.get(b[0] * i + b[1], set()) - {i} for i in values)


def _fixed(steps: int, name: str, nest: Nest) -> tuple[str, str, int]:
    """A distance in iterations of a loop, unless it has fewer."""
    trips = next(loop.trips for loop in nest.parallel if loop.var == name)
    if trips and abs(steps) >= trips:
        return "independent", "", 0
    return "distance", name, steps


def _distance(steps: int) -> str:
    for most, name in ((1, "1"), (2, "2"), (4, "3-4"), (16, "5-16")):
        if steps <= most:
            return f"distance {name}"
    return "distance 17+"
