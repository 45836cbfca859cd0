"""Sums, products, minima and maxima, and scalars that only look like them."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, over
from jaxfm.tasks.hpc.program import Assign, Expr, If, Number, Op, Ref, Statement, Var


def draw(sheet: Sheet) -> Draft:
    """`s = s op f(i)`."""
    i, rng = sheet.loop(), sheet.rng
    upper = sheet.bound()
    s = sheet.scalar(live=True)
    operator = rng.choice(("+", "+", "*", "min", "max"))
    value = sheet.value((i,))
    if sheet.chance(0.3):
        value = Op("fabs", (value,))
    target: Var | Ref = s
    if sheet.chance(0.15):
        target = Ref(sheet.array(), (Number(rng.choice((0, 1, 2))),))
    update: Statement = Assign(target, value, operator)
    body: list[Statement] = [update]
    mode = rng.choice(("plain", "plain", "guard", "two", "mixed", "used", "used", "shifted"))
    if mode == "guard":
        body = [If(Op(">", (Ref(sheet.array(), (Var(i),)), Number(0.0))), (update,))]
    elif mode == "two":
        other = sheet.scalar(live=True)
        body.append(Assign(other, sheet.value((i,)), rng.choice(("+", "max"))))
    elif mode == "mixed":
        body.append(Assign(target, sheet.value((i,)), rng.choice(("+", "*"))))
    elif mode == "used":
        body.append(Assign(Ref(sheet.array(), (Var(i),)), sheet.value((i,), target)))
    elif mode == "shifted":
        a = sheet.array()
        position: Expr = Var(i) if sheet.chance(0.5) else Op("+", (Var(i), Number(1)))
        body.append(Assign(Ref(a, (Var(i),)), sheet.value((i,), Ref(a, (position,)))))
    return Draft((over(i, upper, *sheet.mixed((i,), *body)),))
