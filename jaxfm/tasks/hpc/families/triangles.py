"""Nests whose inner bounds depend on the outer loop."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, over, plus
from jaxfm.tasks.hpc.program import Assign, For, Number, Ref, Var


def draw(sheet: Sheet) -> Draft:
    """Transposition in place, triangular sums, elimination."""
    i, j, rng = sheet.loop(), sheet.loop(), sheet.rng
    n = sheet.bound(8, 12)
    a = sheet.array()
    below = sheet.chance(0.5)
    strict = rng.choice((0, 1))
    lower = Number(0) if below else plus(Var(i), strict)
    upper = plus(Var(i), 1 - strict) if below else n
    here, mirrored = Ref(a, (Var(i), Var(j))), Ref(a, (Var(j), Var(i)))
    mode = rng.choice(("mirror", "mirror", "row", "column", "pivot"))
    if mode == "mirror":
        write, read = (here, mirrored) if sheet.chance(0.5) else (mirrored, here)
        first = sheet.reads(write, sheet.value((i, j), read))
    elif mode == "pivot":
        first = Assign(here, sheet.value((i,), Ref(a, (Var(i), Number(0)))), "-")
    else:
        target = Ref(sheet.array(), (Var(i if mode == "row" else j),))
        first = Assign(target, sheet.value((j,), here), rng.choice(("+", "+", "")))
    body = sheet.mixed((i, j), first)
    start = Number(rng.choice((0, 1)))
    nest = over(i, n, For(j, lower, upper, body), lower=start)
    return Draft((nest,), (0,) if sheet.chance(0.65) else (0, 0))
