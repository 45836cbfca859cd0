"""Loops with loops inside: products of matrices and vectors, row sums, shared counters."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, lin, over
from jaxfm.tasks.hpc.program import Assign, Number, Op, Ref, Statement, Var


def draw(sheet: Sheet) -> Draft:
    """`s = 0; for (j) s += a[i][j] * x[j]; y[i] = s`, and its transposes."""
    i, j, rng = sheet.loop(), sheet.loop(), sheet.rng
    n, m = sheet.bound(8, 14), sheet.bound(6, 10)
    a, y = sheet.array(), sheet.array()
    element = Ref(a, (Var(i), Var(j)))
    if sheet.chance(0.3):
        element = Ref(a, (Var(j), Var(i)))
    product = Op("*", (element, Ref(sheet.array(), (Var(j),))))
    row, column = Ref(y, (Var(i),)), Ref(y, (Var(j),))
    body: tuple[Statement, ...]
    mode = rng.choice(("local", "local", "direct", "column", "temporary", "outside"))
    read = row if sheet.chance(0.6) else Ref(y, (lin(i, 1, sheet.offset()),))
    if mode == "local":
        s = sheet.scalar()
        start = (Assign(s, Number(0.0)),) if sheet.chance(0.7) else ()
        body = (
            *start,
            over(j, m, Assign(s, product, "+")),
            Assign(row, sheet.value((i,), s, read)),
        )
    elif mode == "direct":
        body = (Assign(row, Number(0.0)), over(j, m, Assign(row, product, "+")))
    elif mode == "column":
        body = (over(j, m, Assign(column, product, rng.choice(("+", "")))),)
    elif mode == "temporary":
        t = sheet.scalar()
        steps = (Assign(t, product), Assign(element, Op("+", (t, read))))
        body = (over(j, m, *steps),)
    else:
        s = sheet.scalar(live=True)
        body = (over(j, m, Assign(s, product, "+")),)
    if sheet.chance(0.25):  # the inner counter is declared outside, as in C of old
        sheet.scalars.append(counter(j))
    body = sheet.mixed((i,), *body)
    where = [k for k, s in enumerate(body) if hasattr(s, "var")]
    inside = sheet.chance(0.3) and not any(s.name == j for s in sheet.scalars)
    return Draft((over(i, n, *body),), (0, where[0]) if inside else (0,))


def counter(name: str):
    """The declaration of a loop variable outside its loop."""
    from jaxfm.tasks.hpc.program import Scalar

    return Scalar(name, "int", 0, live=False)
