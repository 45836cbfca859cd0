"""Two loops over a two-dimensional array: which level is parallel?"""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, lin, over
from jaxfm.tasks.hpc.program import Number, Ref, Var


def draw(sheet: Sheet) -> Draft:
    """`a[i][j] = f(a[i + di][j + dj])`, the directive outside or inside."""
    i, j, a, rng = sheet.loop(), sheet.loop(), sheet.array(), sheet.rng
    n, m = sheet.bound(8, 12), sheet.bound(8, 12)
    distances = (
        sheet.offset() if sheet.chance(0.5) else 0,
        sheet.offset() if sheet.chance(0.5) else 0,
    )
    other = a if sheet.chance(0.8) else sheet.array()
    order = (i, j) if sheet.chance(0.75) else (j, i)
    write = Ref(a, tuple(Var(v) for v in order))
    read = Ref(other, tuple(lin(v, 1, d) for v, d in zip(order, distances)))
    body = sheet.mixed((i, j), sheet.reads(write, sheet.value((i, j), read)))
    low = Number(rng.choice((0, 0, 1, 2)))
    nest = over(i, n, over(j, m, *body, lower=low), lower=low)
    return Draft((nest,), (0,) if sheet.chance(0.5) else (0, 0))
