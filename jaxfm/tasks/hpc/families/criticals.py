"""Scalars that threads update in critical sections, all of the time or most of it."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, over
from jaxfm.tasks.hpc.program import Assign, Block, Clause, Number, Op, Pragma, Ref, Statement, Var


def draw(sheet: Sheet) -> Draft:
    """Two accesses of one scalar, each atomic, in a critical section, or bare."""
    i, rng = sheet.loop(), sheet.rng
    upper = sheet.bound()
    s = sheet.scalar(live=True)
    other = s if sheet.chance(0.75) else sheet.scalar(live=True)
    name = "one" if sheet.chance(0.4) else ""
    first = Assign(s, sheet.value((i,)), "+")
    second = Assign(other, sheet.value((i,)), "+")
    if sheet.chance(0.3):
        second = Assign(Ref(sheet.array(), (Var(i),)), Op("+", (other, Number(1.0))))
    kind = rng.choice(("critical", "critical", "atomic"))
    guards = [kind, kind if sheet.chance(0.75) else rng.choice(("critical", "atomic", "bare"))]
    body: list[Statement] = []
    for number, (guard, statement) in enumerate(zip(guards, (first, second))):
        label = name if number == 0 or sheet.chance(0.7) else "two"
        clauses = (Clause("name", (label,)),) if label and guard == "critical" else ()
        if guard == "atomic" and not isinstance(statement.target, Var):
            guard = "critical"
        body.append(statement if guard == "bare" else Block(Pragma(guard, clauses), (statement,)))
    if sheet.chance(0.3):
        body = body[:1]
    return Draft((over(i, upper, *sheet.mixed((i,), *body)),))
