"""What is said of a loop: race-free, a race, or that it cannot be told."""

from __future__ import annotations

import time
from typing import NamedTuple

from jaxfm.tasks.hpc.frontend.loop import Lifted
from jaxfm.tasks.hpc.frontend.pragmas import KNOWN
from jaxfm.tasks.hpc.frontend.rows import flattened, is_written, leaving, with_rows
from jaxfm.tasks.hpc.frontend.sharing import Plan, given, needed
from jaxfm.tasks.hpc.frontend.source import Outside
from jaxfm.tasks.hpc.program import Access, Conflict, For, Judgement, Pragma
from jaxfm.tasks.hpc.proofs.conflicts import Found, search

TOOL = "integer sets of the front end"
WORKSHARING = ("parallel for", "parallel for simd", "for", "for simd")


class Verdict(NamedTuple):
    """A judgement of a loop under a directive.

    Attributes:
        judgement: The judgement.
        pragma: The directive that it is about.
        lines: The lines of the racing pair, where there is one.
        notes: What else is wrong although nothing races, one sentence each.
    """

    judgement: Judgement
    pragma: Pragma | None = None
    lines: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def judge_serial(lifted: Lifted, *, assume: frozenset[str] = frozenset(), limit_s: float = 5.0):
    """Whether a loop without a directive is race-free under the one that it needs, for all sizes.

    Returns:
        A `Verdict` with that directive.
    """
    return _judge(lifted, needed(lifted), assume, limit_s, proposed=True)


def judge_given(
    lifted: Lifted, pragma: Pragma, *, assume: frozenset[str] = frozenset(), limit_s: float = 5.0
) -> Verdict:
    """Whether a loop is race-free under a directive, for all sizes."""
    try:
        _check_directive(pragma)
        plan = given(lifted, pragma)
    except Outside as reason:
        return Verdict(Judgement("cannot tell", str(reason), TOOL), pragma)
    return _judge(lifted, plan, assume, limit_s, proposed=False)


def _check_directive(pragma: Pragma) -> None:
    if pragma.directive not in WORKSHARING:
        raise Outside(f"The directive {pragma.directive} is not one that is judged.")
    for clause in pragma.clauses:
        if clause.name not in KNOWN or clause.name == "nowait":
            raise Outside(f"The clause {clause.name} is not one that is judged.")
    if set(pragma.named("default")) & {"private", "firstprivate"}:
        raise Outside("The clause default(private) is not one that is judged.")
    for value in pragma.named("collapse"):
        if not str(value).isdigit() or int(value) < 1:
            raise Outside("The number of loops of collapse is not a number.")


def _judge(lifted: Lifted, plan: Plan, assume, limit_s: float, *, proposed: bool) -> Verdict:
    deadline = time.monotonic() + limit_s
    program = with_rows(lifted.program)
    flat_before = {a.name for a in lifted.program.arrays if len(a.shape) == 1}
    loop = program.body[0]
    assert isinstance(loop, For)
    collapse = int(next(iter(plan.pragma.named("collapse")), 1))
    tell = lambda found: _refuted(lifted, plan, found)
    found = search(loop, plan.shared, collapse=collapse, deadline=deadline)
    if found.kind == "race" and found.sizes_free:
        return tell(found)
    doubts = list(lifted.doubts)
    if found.kind == "race":
        values = ", ".join(f"{name} = {value}" for name, value in found.values)
        doubts.insert(0, f"Iterations meet for some values, for example {values}.")
    elif found.kind == "doubt":
        doubts.insert(0, found.reason)
    if "in_bounds" not in assume:
        for array in program.arrays:
            if len(array.shape) < 2 or not is_written(loop, array.name):
                continue
            last = not lifted.fortran or array.name in flat_before
            outside, always = leaving(loop, array, last=last)
            if not outside or (not last and "not known" in outside):
                continue
            flat = flattened(program, array.name, last=last)
            if flat is None:
                doubts.append(outside)
                continue
            again = search(flat.body[0], plan.shared, collapse=collapse, deadline=deadline)  # type: ignore[arg-type]
            if again.kind == "race" and (always or not again.values):
                return tell(again)
            if again.kind != "none":
                doubts.append(outside)
    if proposed:
        doubts += plan.doubts
    if doubts:
        judgement = Judgement("cannot tell", doubts[0], TOOL)
        return Verdict(judgement, plan.pragma, notes=tuple(doubts[1:]))
    reason = "No two iterations reach one element, for any sizes."
    notes = () if proposed else plan.doubts
    return Verdict(Judgement("confirmed", reason, TOOL), plan.pragma, notes=notes)


def _refuted(lifted: Lifted, plan: Plan, found: Found) -> Verdict:
    """The verdict of a race, with the lines and the iterations of the pair."""
    conflict = found.conflict
    assert conflict is not None
    lines = (_line(lifted, conflict.first), _line(lifted, conflict.second))
    judgement = Judgement("refuted", _sentence(conflict, lines, found), TOOL, conflict)
    return Verdict(judgement, plan.pragma, lines)


def _line(lifted: Lifted, access: Access) -> int:
    path = access.path
    while path not in lifted.lines and path:
        path = path[:-1]
    return lifted.lines.get(path, 0)


def _sentence(conflict: Conflict, lines: tuple[int, int], found: Found) -> str:
    spots = []
    for access, line, values in zip((conflict.first, conflict.second), lines, conflict.iterations):
        verb = "writes" if access.write else "reads"
        at = ", ".join(f"{name} = {value}" for name, value in values)
        spots.append(f"line {line} {verb} {access.name} at {at}")
    where = ", ".join(f"{name} = {value}" for name, value in found.values)
    example = f" (for example with {where})" if where else ""
    return f"L{spots[0][1:]} while {spots[1]}{example}."
