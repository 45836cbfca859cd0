"""Stencils: into another array (Jacobi), in place (Gauss-Seidel), in two colors."""

from __future__ import annotations

from jaxfm.tasks.hpc.families.build import Draft, Sheet, lin, over
from jaxfm.tasks.hpc.program import Expr, If, Number, Op, Ref, Var


def draw(sheet: Sheet) -> Draft:
    """A stencil in one or two dimensions."""
    rng = sheet.rng
    rank = rng.choice((1, 2))
    loops = tuple(sheet.loop() for _ in range(rank))
    bounds = [sheet.bound(20, 30) if rank == 1 else sheet.bound(8, 11) for _ in range(rank)]
    target, reach = sheet.array(), rng.choice(sheet.offsets) if sheet.chance(0.3) else 1
    source = rng.choice((target, sheet.array()))
    colored = sheet.chance(0.4)
    step = 2 if colored and rank == 1 else 1

    def at(*moves: int) -> Ref:
        return Ref(source, tuple(lin(v, 1, d) for v, d in zip(loops, moves)))

    points = [
        at(*(d if k == axis else 0 for k in range(rank)))
        for axis in range(rank)
        for d in (-reach, reach)
    ]
    if rank == 2 and sheet.chance(0.3):
        points = points[:2] if sheet.chance(0.5) else points[2:]
    elif sheet.chance(0.3):
        points = [rng.choice(points)]
    if sheet.chance(0.5):
        points.append(at(*(0,) * rank))
    total: Expr = points[0]
    for point in points[1:]:
        total = Op("+", (total, point))
    value = Op("*", (Number(rng.choice((0.25, 0.5, 0.125))), total))
    write = sheet.reads(Ref(target, tuple(Var(v) for v in loops)), value)
    body = sheet.mixed(loops, write)
    if colored and rank == 2:
        color = Op("%", (Op("+", (Var(loops[0]), Var(loops[1]))), Number(rng.choice((2, 2, 3)))))
        body = (If(Op("==", (color, Number(rng.choice((0, 1))))), body),)
    inner = over(loops[-1], bounds[-1], *body, lower=Number(reach), step=step)
    if rank == 1:
        return Draft((inner,))
    nest = over(loops[0], bounds[0], inner, lower=Number(reach))
    return Draft((nest,), (0,) if sheet.chance(0.6) else (0, 0))
