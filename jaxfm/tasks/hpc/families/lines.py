"""One loop over one array: strides, offsets, halves, reversals."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, lin, over, plus
from jaxfm.tasks.hpc.program import Number, Op, Ref, Var


def draw(sheet: Sheet) -> Draft:
    """`a[p*i + q] = f(a[r*i + s], ...)` under `0 <= i < n`."""
    i, a, rng = sheet.loop(), sheet.array(), sheet.rng
    upper = sheet.bound()
    mode = rng.choice(("shift", "strides", "parity", "halves", "reverse", "constant", "apart"))
    lower = Number(0)
    stride = sheet.stride()
    write = read = lin(i, stride, rng.choice((0, *sheet.offsets)))
    if mode == "shift":
        read = lin(i, stride, sheet.offset() * (stride if sheet.chance(0.5) else 1))
    elif mode == "strides":
        read = lin(i, sheet.stride(), sheet.offset())
    elif mode == "parity":
        factor = rng.choice([s for s in sheet.strides if s > 1])
        distance = rng.choice((factor, 1, *sheet.offsets))
        write, read = lin(i, factor), lin(i, factor, distance)
    elif mode == "halves":
        half = rng.randint(10, 16)
        upper, distance = Number(half + rng.choice((0, 0, 1, 2))), half
        write, read = lin(i, 1), lin(i, 1, distance)
        if sheet.chance(0.5):
            write, read = read, write
    elif mode == "reverse":
        read = Op("-", (plus(upper, -1), Var(i)))
        write = lin(i, 1)
        if sheet.chance(0.5):
            write, read = read, write
    elif mode == "constant":
        read = Number(rng.choice((0, *sheet.offsets)))
        write = lin(i, 1, rng.choice((0, *sheet.offsets)))
    other = a if mode != "apart" else sheet.array()
    if sheet.chance(0.3):
        lower = Number(rng.choice(sheet.offsets))
    body = sheet.mixed((i,), sheet.reads(Ref(a, (write,)), sheet.value((i,), Ref(other, (read,)))))
    return Draft((over(i, upper, *body, lower=lower, step=rng.choice((1, 1, 1, 2))),))
