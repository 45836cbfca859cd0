"""Other orders of a loop's iterations and statements, as tuning and refactoring choose them.

`variants` lists those that are legal for a loop that needs no order among its iterations: one that
`proofs.clauses` finds a directive for, without `lastprivate`. Then every dependence stays within an
iteration, so that the loop may run backwards, in tiles, or inside the loop that it contains; and it
may be cut in two where no private scalar crosses the cut. Unrolling is always legal.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxfm.tasks.hpc.program import (
    Assign,
    Block,
    Expr,
    For,
    If,
    Number,
    Op,
    Path,
    Program,
    Ref,
    Standalone,
    Statement,
    Var,
    affine,
    dtypes,
    walk,
)
from jaxfm.tasks.hpc.proofs.clauses import (
    own_reads,
    propose,
    replaced,
    statement_at,
    with_pragma,
    written,
)
from jaxfm.tasks.hpc.render import moved


def free(program: Program, path: Path) -> bool:
    """Whether the iterations of the serial loop at a path may run in any order."""
    pragma = propose(program, path).pragma
    return pragma is not None and not pragma.named("lastprivate")


def variants(program: Program, path: Path) -> Iterator[tuple[str, Program]]:
    """The legal other forms of a serial loop that is `free`, with what was done."""
    loop = statement_at(program.body, path)
    assert isinstance(loop, For)
    serial = with_pragma(program, path, None)
    loop = loop._replace(pragma=None)
    put = lambda *new: serial._replace(body=replaced(serial.body, path, new))
    names = set(dtypes(program))
    if loop.var in names:
        return
    if loop.step == 1:
        yield "reversed", put(backwards(loop))
        yield "tiled", put(tiled(loop, 8, _fresh(program, "t")))
        yield "unrolled", put(*unrolled(loop, 2))
    if (inner := inner_loop(loop)) and inner.var not in names:
        yield "interchanged", put(interchanged(loop))
    if (parts := split(loop, {s.name for s in program.scalars})) is not None:
        yield "split", put(*parts)


def _fresh(program: Program, stem: str) -> str:
    used = set(dtypes(program))
    used |= {s.var for _, s in walk(program.body) if isinstance(s, For)}
    return next(name for k in range(99) if (name := f"{stem}{k}") not in used)


def backwards(loop: For) -> For:
    """A loop with step 1 from its end."""
    return loop._replace(lower=moved(loop.upper, -1), upper=moved(loop.lower, -1), step=-1)


def tiled(loop: For, size: int, outer: str) -> For:
    """A loop with step 1 in tiles of `size` iterations, over which the new outer loop runs."""
    last = Op("min", (Op("+", (Var(outer), Number(size))), loop.upper))
    return For(outer, loop.lower, loop.upper, (loop._replace(lower=Var(outer), upper=last),), size)


def inner_loop(loop: For) -> For | None:
    """The only statement of a loop, if it is a loop whose bounds the outer one does not decide."""
    inner = loop.body[0] if len(loop.body) == 1 else None
    if not isinstance(inner, For) or inner.pragma:
        return None
    forms = [affine(bound) for bound in (inner.lower, inner.upper)]
    return inner if all(form and loop.var not in form[0] for form in forms) else None


def interchanged(loop: For) -> For:
    """A nest of two with its loops in the other order."""
    inner = inner_loop(loop)
    assert inner is not None
    return inner._replace(body=(loop._replace(body=inner.body),))


def tiled_nest(loop: For, size: int, names: tuple[str, str]) -> For:
    """A nest of two in square tiles; the outermost loop runs over tiles of the outer one."""
    inner = inner_loop(loop)
    assert inner is not None
    rows, columns = tiled(loop, size, names[0]), tiled(inner, size, names[1])
    row, column = rows.body[0], columns.body[0]
    assert isinstance(row, For) and isinstance(column, For)
    return rows._replace(body=(columns._replace(body=(row._replace(body=(column,)),)),))


def unrolled(loop: For, factor: int) -> tuple[For, For]:
    """A loop with step 1 whose body stands `factor` times in it, and one for what is left."""
    count = Op("-", (loop.upper, loop.lower))
    whole = Op("*", (Op("/", (count, Number(factor))), Number(factor)))
    middle = Op("+", (loop.lower, whole)) if loop.lower != Number(0) else whole
    body = tuple(
        at(statement, loop.var, shift) for shift in range(factor) for statement in loop.body
    )
    return (
        loop._replace(upper=middle, body=body, step=factor),
        loop._replace(lower=middle),
    )


def split(loop: For, scalars: set[str]) -> tuple[For, For] | None:
    """A loop of two or more statements as two; None where a scalar crosses every cut."""
    for cut in range(1, len(loop.body)):
        first, second = loop.body[:cut], loop.body[cut:]
        reads = [set().union(*(own_reads(s) for _, s in walk(part))) for part in (first, second)]
        crossing = (written(first) & reads[1]) | (written(second) & reads[0])
        if not crossing & scalars:
            return loop._replace(body=first), loop._replace(body=second)
    return None


def at(statement: Statement, var: str, shift: int) -> Statement:
    """A statement for the iteration that is `shift` later."""
    if shift == 0:
        return statement
    new = lambda expr: shifted(expr, var, shift)
    inner = lambda body: tuple(at(s, var, shift) for s in body)
    match statement:
        case Assign(target, value, update):
            return Assign(new(target), new(value), update)  # type: ignore[arg-type]
        case If(condition, then, orelse):
            return If(new(condition), inner(then), inner(orelse))
        case For(lower=lower, upper=upper, body=body):
            return statement._replace(lower=new(lower), upper=new(upper), body=inner(body))
        case Block(pragma, body):
            return Block(pragma, inner(body))
        case Standalone():
            return statement
    raise AssertionError(statement)


def shifted(expr: Expr, var: str, shift: int) -> Expr:
    """An expression with `var + shift` for `var`."""
    match expr:
        case Var(name) if name == var:
            return Op("+", (expr, Number(shift)))
        case Op("+" | "-", (Var(name), Number(int(_)))) if name == var:
            return moved(expr, shift)
        case Ref(array, subscripts):
            return Ref(array, tuple(shifted(s, var, shift) for s in subscripts))
        case Op(name, args):
            return Op(name, tuple(shifted(a, var, shift) for a in args))
    return expr
