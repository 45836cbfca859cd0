"""Counters and previous values that one iteration leaves to the next."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, lin, over
from jaxfm.tasks.hpc.program import Assign, Expr, Number, Op, Ref, Statement, Var


def draw(sheet: Sheet) -> Draft:
    """`k += c; a[k] = ...`, `a[i] = prev; prev = b[i]`, and their parallel forms."""
    i, rng = sheet.loop(), sheet.rng
    upper = Number(rng.randint(16, 28))
    stride = rng.choice(sheet.strides)
    trips = upper.value
    body: list[Statement]
    if sheet.chance(0.6):
        k = sheet.scalar("int", 0)
        a = sheet.array(Number(int(trips) * max(1, stride) + 8))
        moved: Statement = Assign(k, Number(stride), "+")
        if sheet.chance(0.6):
            moved = Assign(k, lin(i, stride, rng.choice((0, 1, 2))))
        there: Expr = k if sheet.chance(0.7) else Op("+", (k, Number(rng.choice((1, 2)))))
        read = [Ref(a, (k,))] if sheet.chance(0.5) else []
        body = [moved, sheet.reads(Ref(a, (there,)), sheet.value((i,), *read))]
    else:
        previous, a = sheet.scalar(), sheet.array()
        body = [
            Assign(previous, sheet.value((i,))),
            Assign(Ref(a, (Var(i),)), sheet.value((i,), previous)),
        ]
    if sheet.chance(0.2):
        body.reverse()
    return Draft((over(i, upper, *sheet.mixed((i,), *body)),))
