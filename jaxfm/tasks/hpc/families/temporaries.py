"""Scalars that hold a value within an iteration, or across iterations, or beyond."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, over
from jaxfm.tasks.hpc.program import Assign, Expr, If, Number, Op, Ref, Statement, Var


def draw(sheet: Sheet) -> Draft:
    """`t = ...; a[i] = f(t)`."""
    return scalars(sheet, beyond=False)


def draw_last(sheet: Sheet) -> Draft:
    """`t = ...; a[i] = f(t)`, and after the loop `out[0] = t`."""
    return scalars(sheet, beyond=True)


def scalars(sheet: Sheet, beyond: bool) -> Draft:
    """A loop with one or two temporaries."""
    i, rng = sheet.loop(), sheet.rng
    upper = sheet.bound()
    t, a = sheet.scalar(), sheet.array()
    guard = Op(rng.choice(("<", ">")), (Ref(sheet.array(), (Var(i),)), Number(0.5)))
    written: Statement = Assign(t, sheet.value((i,)))
    if sheet.chance(0.2):
        written = If(
            guard, (written,), (Assign(t, sheet.value((i,))),) if sheet.chance(0.6) else ()
        )
    position: Expr = Var(i)
    if sheet.chance(0.2):
        position = Op("+", (Var(i), Number(1)))
    source = a if sheet.chance(0.4) else sheet.array()
    used = sheet.value((i,), t, *([Ref(source, (position,))] if sheet.chance(0.5) else []))
    body: list[Statement] = [written, sheet.reads(Ref(a, (Var(i),)), used)]
    if sheet.chance(0.4):
        u = sheet.scalar()
        body.insert(1, Assign(u, sheet.value((i,), t)))
        body.append(Assign(Ref(sheet.array(), (Var(i),)), Op("+", (u, t))))
    if sheet.chance(0.15):
        body = body[1:] + body[:1]
    loop = over(i, upper, *sheet.mixed((i,), *body))
    if not beyond:
        return Draft((loop,))
    after = Assign(Ref(sheet.array(), (Number(0),)), t if sheet.chance(0.75) else Number(1.0))
    return Draft((loop, after))
