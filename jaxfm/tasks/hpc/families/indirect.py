"""Subscripts through index arrays, whose contents the program writes or does not."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, over
from jaxfm.tasks.hpc.program import Assign, Expr, Number, Op, Ref, Var


def draw(sheet: Sheet) -> Draft:
    """`a[idx[i]] = ...` and `... = a[idx[i]]`, with `idx` written by a formula before."""
    i, rng = sheet.loop(), sheet.rng
    length = rng.randint(16, 28)
    known = sheet.chance(0.75)
    limit = length if known else rng.randint(8, length)
    content = "values" if known else "colliding"
    index = sheet.array(Number(length), dtype="int", content=content, limit=Number(limit))
    mode = rng.choice(("scatter", "scatter", "gather", "both"))
    data = sheet.array(Number(limit))
    there = Ref(data, (Ref(index, (Var(i),)),))
    if mode == "scatter":
        first = sheet.reads(there, sheet.value((i,)))
    elif mode == "gather":
        first = sheet.reads(Ref(sheet.array(), (Var(i),)), sheet.value((i,), there))
    else:
        first = sheet.reads(there, sheet.value((i,), there))
    loop = over(i, Number(length), *sheet.mixed((i,), first))
    if not known:
        return Draft((loop,))
    filled = Assign(Ref(index, (Var(i),)), formula(sheet, Var(i), length))
    return Draft((over(i, Number(length), filled), loop), (1,))


def formula(sheet: Sheet, i: Expr, length: int) -> Expr:
    """An index in [0, length): each once, or some twice."""
    rng = sheet.rng
    c = rng.choice((2, 3, 5, 7, *sheet.strides))
    match rng.choice(("modulo", "modulo", "reverse", "half", "folded")):
        case "modulo":
            moved = Op("+", (Op("*", (Number(c), i)), Number(rng.choice(sheet.offsets))))
            return Op("%", (moved, Number(length)))
        case "reverse":
            return Op("-", (Number(length - 1), i))
        case "half":
            return Op("/", (i, Number(rng.choice((1, 2, c)))))
        case _:
            return Op("%", (i, Number(rng.choice((length, length, max(2, length - c))))))
