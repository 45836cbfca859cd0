"""Loops and small OpenMP programs, seeded, each with its proof.

A family draws a program; `proofs.clauses` finds the directive that makes its loop right, or none;
what is shown is that directive, one that lacks something, or the program after a mutation. The
label is always what the enumeration says of the program that is shown, never what a family meant.
Programs are drawn until one has the label that was drawn before it, so that labels are balanced in
each family.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Literal, NamedTuple

from jaxfm.tasks.hpc.families import FAMILIES
from jaxfm.tasks.hpc.families.build import COEFFICIENTS, Sheet
from jaxfm.tasks.hpc.mutations import mutated
from jaxfm.tasks.hpc.operations import Operations, operations
from jaxfm.tasks.hpc.program import Clause, Conflict, For, Path, Pragma, Program, walk
from jaxfm.tasks.hpc.proofs.clauses import propose, statement_at, with_pragma
from jaxfm.tasks.hpc.proofs.enumeration import trace

ATTEMPTS = 60


class Item(NamedTuple):
    """A program and what is known of it.

    Attributes:
        program: The program, with its directives.
        family: What drew it, a name in `families.FAMILIES`.
        coefficients: The class of its strides and offsets, "usual" or "unseen".
        racy: Whether it has a data race, for its sizes and any values.
        conflict: The racing pair, or None.
        target: The loop whose directive is asked for; None where no single loop is.
        pragma: The directive with the fewest clauses that makes the target right; None if there is
            none. It says nothing where there is no target.
        mutation: What was changed, for example "clause dropped"; empty if nothing was.
        operations: What a serial run does.
        label: What kind of proof the label is: it holds for these sizes. For all sizes, ask
            `proofs.integer_sets.for_all_sizes`.
        masked: Whether the race needs a schedule that compilers do not choose by themselves: equal
            iterations of two loops without a schedule, in one thread with gcc and clang, are not so
            by the standard. A dynamic tool cannot see such a race.
        languages: The languages in which it can be written.
    """

    program: Program
    family: str
    coefficients: str
    racy: bool
    conflict: Conflict | None
    target: Path | None
    pragma: Pragma | None
    mutation: str
    operations: Operations
    label: str = "enumerated for these bounds"
    masked: bool = False
    languages: tuple[str, ...] = ("c", "fortran")


def generate(
    seed: int,
    count: int,
    families: Iterable[str] | None = None,
    *,
    coefficients: Literal["usual", "unseen"] = "usual",
    statements: int = 0,
    start: int = 0,
) -> list[Item]:
    """Draws labelled programs; the first ones are the same whatever the count.

    Args:
        seed: Decides everything.
        count: How many.
        families: Names in `families.FAMILIES`; None: all of them. They take turns.
        coefficients: Whether strides and offsets are the usual small ones or others, which no
            program with the usual ones has.
        statements: How many statements without influence on the label each loop gets besides its
            own; 0: none or one, by chance.
        start: How many items to skip, so that several processes can each draw a part of them.

    Raises:
        ValueError: A family or a class of coefficients that there is not, or a negative count.
    """
    names = list(families if families is not None else FAMILIES)
    for name in names:
        if name not in FAMILIES:
            raise ValueError(f"There is no family '{name}'; choose of {', '.join(FAMILIES)}.")
    if not names and count:
        raise ValueError("No family was given; name one, or pass None for all.")
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"Coefficients are {', '.join(COEFFICIENTS)}, not '{coefficients}'.")
    if min(count, statements, start) < 0:
        raise ValueError(f"A count is at least 0, not {min(count, statements, start)}.")
    items = []
    for index in range(start, start + count):
        rng = random.Random(f"{seed}/{index}/{coefficients}/{statements}")
        items.append(item(rng, names[index % len(names)], coefficients, statements))
    return items


def item(rng: random.Random, family: str, coefficients: str, statements: int) -> Item:
    """One item of a family, with a label that is drawn first."""
    wanted = rng.random() < 0.5
    for racy in (wanted, not wanted):
        for _ in range(ATTEMPTS):
            if found := attempt(rng, family, coefficients, statements, racy):
                return found
    raise RuntimeError(f"The family {family} drew no program that can be judged.")


def attempt(
    rng: random.Random, family: str, coefficients: str, statements: int, racy: bool
) -> Item | None:
    """One draw; None if it cannot be judged or has not the label that is wanted."""
    sheet = Sheet(rng, coefficients, statements)
    draft = FAMILIES[family](sheet)
    program = sheet.program(draft.body)
    pragma, target, mutation = None, draft.target, ""
    if target is not None:
        proposal = propose(program, target)
        found, pragma = proposal.trace, proposal.pragma
        if found.unknown:
            return None
        shown = pragma or proposal.candidate
        hidden = pragma is None and found.conflict is None
        if hidden:  # clauses hide a value that iterations hand on: without them it is a race
            shown = Pragma("parallel for")
        program = with_pragma(program, target, decorated(shown, rng))
        if hidden:
            found = trace(program)
    else:
        found = trace(program)
    if found.unknown:
        return None
    if not found.conflict and (racy or rng.random() < 0.3):
        for _ in range(3 if racy else 1):
            change = mutated(program, rng)
            if change is None:
                break
            after = trace(change[1])
            if not after.unknown and bool(after.conflict) == racy:
                (mutation, program), found = change, after
                break
    if bool(found.conflict) != racy:
        return None
    if target is not None and mutation not in ("", "clause dropped", "collapse added"):
        pragma = propose(with_pragma(program, target, None), target).pragma
    languages: tuple[str, ...] = ("c", "fortran")
    declared = {scalar.name for scalar in program.scalars}
    if any(isinstance(s, For) and s.var in declared for _, s in walk(program.body)):
        languages = ("c",)
    return Item(
        program=program,
        family=family,
        coefficients=coefficients,
        racy=racy,
        conflict=found.conflict,
        target=target,
        pragma=pragma,
        mutation=mutation,
        operations=operations(program),
        masked=bool(found.conflict) and family == "region" and hidden_by_schedule(program),
        languages=languages,
    )


def hidden_by_schedule(program: Program) -> bool:
    """Whether a racy program has no race where loops without a schedule are static."""
    return trace(program, static=True).conflict is None


def decorated(pragma: Pragma, rng: random.Random) -> Pragma:
    """A directive with a schedule, at times: it changes no label, as no chunk has two iterations
    for every number of threads."""
    if rng.random() < 0.75:
        return pragma
    chunk = rng.choice((("static",), ("static", "1"), ("dynamic",), ("dynamic", "1")))
    return pragma._replace(clauses=(*pragma.clauses, Clause("schedule", chunk)))


def asked(item: Item) -> Program:
    """The program of an item whose target has no directive yet: what T2 shows.

    Raises:
        ValueError: The item asks for no directive.
    """
    if item.target is None:
        raise ValueError(f"An item of the family {item.family} asks for no directive.")
    assert isinstance(statement_at(item.program.body, item.target), For)
    return with_pragma(item.program, item.target, None)
