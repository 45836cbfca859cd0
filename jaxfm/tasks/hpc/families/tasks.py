"""Tasks, ordered by dependences, `taskwait` and groups."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, lin, over
from jaxfm.tasks.hpc.program import (
    Assign,
    Block,
    Clause,
    Number,
    Pragma,
    Ref,
    Standalone,
    Statement,
    Var,
)


def draw(sheet: Sheet) -> Draft:
    """A chain of tasks, or tasks of a loop, created by one thread."""
    body = chain(sheet) if sheet.chance(0.55) else looped(sheet)
    return Draft((Block(Pragma("parallel"), (Block(Pragma("single"), body),)),), None)


def depend(kind: str, where) -> Clause:
    """A dependence on a scalar or an element."""
    return Clause("depend", (where.name if isinstance(where, Var) else where,), kind)


def chain(sheet: Sheet) -> tuple[Statement, ...]:
    """`x = ..` in one task, `y = x` in the next, and what uses both."""
    rng = sheet.rng
    x, y = sheet.scalar(live=True), sheet.scalar(live=True)
    missing = rng.choice((None, None, 0, 1, 2))
    first = Assign(x, sheet.value(()))
    second = Assign(y, sheet.value((), x if sheet.chance(0.8) else Number(2.0)))
    third = Assign(x if sheet.chance(0.5) else sheet.scalar(live=True), sheet.value((), y))
    clauses = [[depend("out", x)], [depend("in", x), depend("out", y)], [depend("in", y)]]
    if third.target == x:
        clauses[2].append(depend("inout", x))
    if missing is not None:
        clauses[missing] = clauses[missing][1:]
    parts: list[Statement] = []
    for number, statement in enumerate((first, second, third)):
        parts.append(Block(Pragma("task", tuple(clauses[number])), (statement,)))
        if sheet.chance(0.2):
            parts.append(Standalone(Pragma("taskwait")))
    if sheet.chance(0.4):
        if sheet.chance(0.5):
            parts.append(Standalone(Pragma("taskwait")))
        parts.append(Assign(Ref(sheet.array(), (Number(0),)), sheet.value((), y)))
    if sheet.chance(0.2):
        return (Block(Pragma("taskgroup"), tuple(parts[:-1])), parts[-1])
    return tuple(parts)


def looped(sheet: Sheet) -> tuple[Statement, ...]:
    """A task an iteration: `a[i] = f(a[i - d])`, with dependences on elements or without."""
    i, rng = sheet.loop(), sheet.rng
    distance = rng.choice(sheet.offsets)
    a = sheet.array()
    here, before = Ref(a, (Var(i),)), Ref(a, (lin(i, 1, -distance),))
    source = before if sheet.chance(0.7) else Ref(sheet.array(), (Var(i),))
    clauses: tuple[Clause, ...] = ()
    mode = rng.choice(("both", "both", "out", "in", "none", "wrong"))
    if mode in ("both", "out", "wrong"):
        clauses += (depend("out", here),)
    if mode in ("both", "in"):
        clauses += (depend("in", before),)
    if mode == "wrong":
        clauses += (depend("in", Ref(a, (lin(i, 1, -distance - 1),))),)
    task = Block(Pragma("task", clauses), (Assign(here, sheet.value((i,), source)),))
    lower = Number(distance + 1)
    body: tuple[Statement, ...] = (over(i, sheet.bound(10, 18), task, lower=lower),)
    if sheet.chance(0.3):
        waits = (Standalone(Pragma("taskwait")),) if sheet.chance(0.5) else ()
        body = (*body, *waits, Assign(Ref(sheet.array(), (Number(0),)), Ref(a, (lower,))))
    return body
