"""Parallel regions of several loops, with barriers, `nowait`, `single` and `master`."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, lin, over
from jaxfm.tasks.hpc.program import (
    Assign,
    Block,
    Clause,
    For,
    Number,
    Pragma,
    Ref,
    Standalone,
    Statement,
    Var,
)


def draw(sheet: Sheet) -> Draft:
    """Two or three constructs of a region that share an array or a scalar."""
    rng = sheet.rng
    upper = sheet.bound(16, 24)
    a, s = sheet.array(), sheet.scalar()
    parts: list[Statement] = []
    first = rng.choice(("loop", "loop", "single", "master"))
    if first == "loop":
        i = sheet.loop()
        static = sheet.chance(0.3)
        parts.append(shared(sheet, i, upper, Assign(Ref(a, (Var(i),)), sheet.value((i,))), static))
    else:
        static = False
        i = sheet.loop()
        waits = (Clause("nowait"),) if first == "single" and sheet.chance(0.4) else ()
        parts.append(Block(Pragma(first, waits), (Assign(s, sheet.value(())),)))
    if sheet.chance(0.4):
        parts.append(Standalone(Pragma("barrier")))
    if sheet.chance(0.25):
        k = sheet.loop()
        parts.append(
            shared(sheet, k, upper, Assign(Ref(sheet.array(), (Var(k),)), sheet.value((k,))))
        )
    j = rng.choice((i, sheet.loop()))
    moved = lin(j, 1, 0 if sheet.chance(0.4) else -rng.choice(sheet.offsets))
    used = Ref(a, (moved,)) if first == "loop" else s
    if sheet.chance(0.2):
        used = Ref(sheet.array(), (Var(j),))
    read = sheet.value((j,), used)
    target = Ref(a if sheet.chance(0.15) and first != "loop" else sheet.array(), (Var(j),))
    parts.append(shared(sheet, j, upper, Assign(target, read), static))
    if sheet.chance(0.2):
        parts.append(
            Block(Pragma("single"), (Assign(Ref(sheet.array(), (Number(0),)), used_at(used)),))
        )
    return Draft((Block(Pragma("parallel"), tuple(parts)),), None)


def used_at(used):
    """What a `single` reads of what was written before: one element, or the scalar."""
    return Ref(used.array, (Number(1),)) if isinstance(used, Ref) else used


def shared(sheet: Sheet, i: str, upper, statement: Statement, static: bool = False) -> For:
    """A loop whose iterations the team shares out."""
    clauses = (Clause("schedule", ("static",)),) if static else ()
    if not static and sheet.chance(0.3):
        clauses = (Clause("schedule", ("dynamic", "1")),)
    if sheet.chance(0.5):
        clauses = (*clauses, Clause("nowait"))
    return over(i, upper, *sheet.mixed((i,), statement))._replace(pragma=Pragma("for", clauses))
