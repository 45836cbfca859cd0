"""Statements under conditions on the iteration or on values."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, lin, over
from jaxfm.tasks.hpc.program import Expr, If, Number, Op, Ref, Statement, Var


def draw(sheet: Sheet) -> Draft:
    """`if (...) a[i] = f(a[i + d])`."""
    i, a, rng = sheet.loop(), sheet.array(), sheet.rng
    distance = abs(sheet.offset())
    upper = Number(rng.randint(20, 30)) if sheet.chance(0.5) else sheet.size()
    read = lin(i, 1, distance if sheet.chance(0.5) else -distance)
    condition: Expr
    match rng.choice(("period", "period", "edge", "value", "single")):
        case "period":
            period = rng.choice((2, 2, 3, distance + 1, max(2, distance)))
            rest = Op("%", (Var(i), Number(period)))
            condition = Op(rng.choice(("==", "==", "!=")), (rest, Number(rng.choice((0, 1)))))
        case "edge":
            edge = Number(rng.choice((distance, distance + 1, max(1, distance - 1))))
            condition = Op(rng.choice(("<", "<=")), (Var(i), edge))
            read = lin(i, 1, distance)
        case "value":
            element = Ref(sheet.array(), (Var(i),))
            condition = Op(rng.choice((">", "<")), (element, Number(0.5)))
            if sheet.chance(0.5):
                read = Var(i)
        case _:
            condition = Op("==", (Var(i), Number(rng.choice((0, 3, 7)))))
            read = read if sheet.chance(0.5) else Number(5)
    written = Var(i) if sheet.chance(0.75) else Number(rng.choice((0, 2)))
    inner = sheet.reads(Ref(a, (written,)), sheet.value((i,), Ref(a, (read,))))
    orelse: tuple[Statement, ...] = ()
    if sheet.chance(0.25):
        orelse = (sheet.reads(Ref(a, (Var(i),)), sheet.value((i,))),)
    body = sheet.mixed((i,), If(condition, (inner,), orelse))
    return Draft((over(i, upper, *body),))
