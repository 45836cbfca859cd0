"""Prefix sums and recurrences, beside loops that look like them."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, lin, over
from jaxfm.tasks.hpc.program import Assign, Expr, Number, Op, Ref, Statement, Var


def draw(sheet: Sheet) -> Draft:
    """`a[i] = a[i - 1] + b[i]`, or the same from another array."""
    i, rng = sheet.loop(), sheet.rng
    upper = sheet.bound()
    a, b = sheet.array(), sheet.array()
    distance = rng.choice(sheet.offsets) if sheet.chance(0.4) else 1
    source = a if sheet.chance(0.5) else b
    read: Expr = Ref(source, (lin(i, 1, -distance),))
    body: list[Statement]
    if sheet.chance(0.3):
        s = sheet.scalar()
        kind = "+" if sheet.chance(0.5) else ""
        body = [Assign(s, sheet.value((i,), Ref(b, (Var(i),))), kind), Assign(Ref(a, (Var(i),)), s)]
    else:
        body = [Assign(Ref(a, (Var(i),)), sheet.value((i,), read, Ref(b, (Var(i),))))]
        if sheet.chance(0.3):
            body.append(Assign(Ref(rng.choice((a, sheet.array())), (Number(0),)), Number(1.0)))
    if sheet.chance(0.25):
        body.append(
            Assign(Ref(sheet.array(), (Var(i),)), Op("*", (Ref(a, (Var(i),)), Number(2.0))))
        )
    return Draft((over(i, upper, *sheet.mixed((i,), *body), lower=Number(distance)),))
