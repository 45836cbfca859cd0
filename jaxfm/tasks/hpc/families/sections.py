"""Sections that run side by side."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, over
from jaxfm.tasks.hpc.program import Assign, Block, Expr, Number, Pragma, Ref, Statement, Var


def draw(sheet: Sheet) -> Draft:
    """Two or three sections; some pairs share an array or a scalar."""
    rng = sheet.rng
    upper = sheet.bound(8, 16)
    arrays = [sheet.array() for _ in range(3)]
    s = sheet.scalar()
    parts = []
    for number in range(rng.choice((2, 2, 3))):
        i = sheet.loop()
        own = arrays[number] if sheet.chance(0.8) else rng.choice(arrays)
        read: list[Expr] = []
        if sheet.chance(0.3):
            read = [Ref(rng.choice(arrays), (Var(i),))]
        body: list[Statement] = [
            over(i, upper, sheet.reads(Ref(own, (Var(i),)), sheet.value((i,), *read)))
        ]
        if sheet.chance(0.3):
            update: Statement = Assign(s, Number(1.0), "+")
            body.append(Block(Pragma("atomic"), (update,)) if sheet.chance(0.8) else update)
        parts.append(Block(Pragma("section"), tuple(body)))
    return Draft((Block(Pragma("parallel sections"), tuple(parts)),), None)
