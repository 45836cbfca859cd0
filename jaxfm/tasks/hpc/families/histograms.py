"""Counts into bins, with and without protection."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, over
from jaxfm.tasks.hpc.program import Assign, Block, Expr, Number, Op, Pragma, Ref, Statement, Var


def draw(sheet: Sheet) -> Draft:
    """`h[idx[i]] += 1`, atomic, critical or bare."""
    i, rng = sheet.loop(), sheet.rng
    length, bins = rng.randint(18, 30), rng.randint(6, 10)
    bin_: Expr
    if sheet.chance(0.5):
        index = sheet.array(Number(length), dtype="int", content="colliding", limit=Number(bins))
        bin_ = Ref(index, (Var(i),))
    else:
        modulus = rng.choice((bins, bins, length))
        bins = max(bins, modulus)
        bin_ = Op("%", (Var(i), Number(modulus)))
    h = sheet.array(Number(bins + 1))
    update: Statement = Assign(Ref(h, (bin_,)), sheet.value((i,)), "+")
    protection = rng.choice(("atomic", "critical", "atomic", "critical", "bare"))
    if protection != "bare":
        update = Block(Pragma(protection), (update,))
    extra: list[Statement] = []
    if sheet.chance(0.6):
        place = rng.choice((bin_, Number(0)))
        read = Ref(h if sheet.chance(0.7) else sheet.array(Number(bins + 1)), (place,))
        extra = [Assign(Ref(sheet.array(), (Var(i),)), sheet.value((i,), read))]
    body = [update, *extra] if sheet.chance(0.5) else [*extra, update]
    return Draft((over(i, Number(length), *sheet.mixed((i,), *body)),))
