"""An exact judgement of a program for its sizes, by running its integer side once.

Every access of the run belongs to a segment (see `machine`). Two accesses of one element race if
at least one of them writes, no critical section or atomic holds both, and their segments are in no
order. Which thread runs an iteration, a section, a task or a `single` is arbitrary, as OpenMP says,
except that equal iterations of two loops of one region with equal `schedule(static)` share a
thread. Code that every thread of a region runs is run for two threads, enough for a pair.

The judgement holds for the sizes and index arrays given, and for any values of the other arrays: a
condition on values may be true in any iteration. One run suffices because a program without a race
in it computes the same integers in every order, apart from what critical sections let differ.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxfm.tasks.hpc.program import Conflict, For, Judgement, Program, walk
from jaxfm.tasks.hpc.proofs.machine import Race, Unknown
from jaxfm.tasks.hpc.proofs.team import Team

TOOL = "enumeration 1"
_LARGER = {False: (80, 81), True: (24, 25)}
"""What sizes grow by, of programs without and with a loop in a loop."""


class Trace(NamedTuple):
    """What an enumeration found.

    Attributes:
        conflict: The racing pair, or None.
        unknown: What could not be decided; empty if all was.
        undefined: Names that some iteration reads, private to it, before it has written them.
        last_defined: Private names that the last iteration of a shared loop certainly writes.
    """

    conflict: Conflict | None
    unknown: str
    undefined: frozenset[str]
    last_defined: frozenset[str]


def judge(program: Program) -> Judgement:
    """Whether a program has a data race, for its sizes; see the module.

    Returns:
        "refuted" with the racing pair, "confirmed", or "cannot tell" with the reason, for example a
        subscript that depends on an unknown value, one outside its array, or a directive that the
        enumeration does not know.
    """
    found = trace(program)
    if found.conflict:
        names = found.conflict.first.name, found.conflict.second.name
        reason = f"Two threads may access {names[0]} at once, and one of them writes."
        return Judgement("refuted", reason, TOOL, found.conflict)
    if found.unknown:
        return Judgement("cannot tell", found.unknown, TOOL)
    return Judgement("confirmed", "No two unordered accesses meet, for these sizes.", TOOL)


def at_any_size(program: Program) -> Trace:
    """The trace of a program, or of the same with larger sizes where only those have a race.

    A size that is a symbol in the source may be anything. Sizes grow by an even and by an odd
    number, farther than any subscript reaches: a loop that is race-free because it has fewer
    iterations than its distance, or because its size is even, is not so for these.
    """
    found = trace(program)
    if found.conflict or found.unknown or not program.sizes:
        return found
    loops = (path for path, s in walk(program.body) if isinstance(s, For))
    nested = any(len(path) > 1 for path in loops)
    for more in _LARGER[nested]:
        sizes = tuple(size._replace(value=size.value + more) for size in program.sizes)
        larger = trace(program._replace(sizes=sizes))
        if larger.conflict:
            return larger
    return found


def trace(program: Program, *, static: bool = False) -> Trace:
    """Runs the enumeration, up to the first race.

    Args:
        program: The program.
        static: Whether a loop without a schedule counts as `schedule(static)`, as most compilers
            have it; the standard leaves it open.
    """
    machine = None
    conflict, unknown = None, ""
    try:
        team = Team(program, static)
        machine = team.steps.machine()
        team.steps.block(program.body, (), ())(machine)
        unknown = machine.unknown
    except Race as race:
        conflict = race.conflict
    except (Unknown, ValueError) as reason:
        unknown = str(reason)
    except KeyError as name:
        unknown = f"The name {name} is not declared."
    except RecursionError:
        unknown = "The program is nested too deeply."
    return Trace(
        conflict,
        unknown,
        frozenset(machine.undefined if machine else ()),
        frozenset(machine.last_defined if machine else ()),
    )
