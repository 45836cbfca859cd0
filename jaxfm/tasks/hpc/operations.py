"""How much a program does: executions, floating-point operations, loads and stores by stride."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from jaxfm.tasks.hpc.program import (
    Assign,
    Expr,
    For,
    If,
    Op,
    Program,
    Ref,
    Statement,
    Var,
    affine,
    children,
    dtypes,
    is_integer,
    walk,
)
from jaxfm.tasks.hpc.proofs.contents import size_of, sizes_of


class Operations(NamedTuple):
    """Counts of a serial run.

    Attributes:
        statements: Assignments executed.
        flops: Operations on numbers that are no integers.
        loads, stores: Array elements read and written, by their step in memory from one iteration
            of the innermost loop to the next: "0", "1", "2", ..., "row" (another row), "indirect".
    """

    statements: int
    flops: int
    loads: dict[str, int]
    stores: dict[str, int]


def operations(program: Program) -> Operations:
    """Counts a program's operations for its sizes.

    A branch whose condition depends on more than loop variables and sizes counts half.
    """
    types, flops, statements = dtypes(program), 0, 0
    loads: Counter[str] = Counter()
    stores: Counter[str] = Counter()

    def visit(body: tuple[Statement, ...], known: dict[str, int], times: float, loop: str) -> None:
        nonlocal flops, statements
        for statement in body:
            match statement:
                case Assign(target, value, update):
                    statements += round(times)
                    own = work(value, types) + (bool(update) and not is_integer(target, types))
                    flops += round(times * own)
                    for ref in elements(value):
                        loads[step(ref, loop)] += round(times)
                    if isinstance(target, Ref):
                        for inner in target.subscripts:
                            for ref in elements(inner):
                                loads[step(ref, loop)] += round(times)
                        stores[step(target, loop)] += round(times)
                        if update:
                            loads[step(target, loop)] += round(times)
                case If(condition, then, orelse):
                    try:
                        chosen: int | None = truth(condition, known)
                    except ValueError:
                        chosen = None
                    if chosen is None:
                        visit(then, known, times / 2, loop)
                        visit(orelse, known, times / 2, loop)
                    else:
                        visit(then if chosen else orelse, known, times, loop)
                case For(var, lower, upper, inside, stride):
                    try:
                        span = range(size_of(lower, known), size_of(upper, known), stride)
                    except ValueError:
                        span = range(1)
                    if matters(inside, var):
                        for i in span:
                            visit(inside, {**known, var: i}, times, var)
                    else:
                        visit(inside, known, times * len(span), var)
                case _:
                    visit(children(statement), known, times, loop)

    visit(program.body, sizes_of(program), 1, "")
    return Operations(statements, flops, dict(loads), dict(stores))


def matters(body: tuple[Statement, ...], var: str) -> bool:
    """Whether which statements run depends on a variable."""
    for _, statement in walk(body):
        match statement:
            case If(condition) if mentions(condition, var):
                return True
            case For(lower=lower, upper=upper) if mentions(lower, var) or mentions(upper, var):
                return True
    return False


def mentions(expr: Expr, var: str) -> bool:
    """Whether a variable occurs outside of subscripts."""
    match expr:
        case Var(name):
            return name == var
        case Op(args=args):
            return any(mentions(argument, var) for argument in args)
    return False


def truth(expr: Expr, known: dict[str, int]) -> int:
    """A condition's value.

    Raises:
        ValueError: It depends on more than what is known.
    """
    match expr:
        case Op("!", (only,)):
            return int(not truth(only, known))
        case Op("&&" | "||" as op, (left, right)):
            a, b = truth(left, known), truth(right, known)
            return int(bool(a and b if op == "&&" else a or b))
        case Op("<" | "<=" | ">" | ">=" | "==" | "!=" as op, (left, right)):
            a, b = size_of(left, known), size_of(right, known)
            results = {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "==": a == b}
            return int(results.get(op, a != b))
    return size_of(expr, known)


def work(expr: Expr, types) -> int:
    """Operations on numbers that are no integers, in one evaluation."""
    if not isinstance(expr, Op):
        return 0
    return (not is_integer(expr, types)) + sum(work(argument, types) for argument in expr.args)


def elements(expr: Expr):
    """The array elements that an expression reads."""
    if isinstance(expr, Ref):
        yield expr
    for inner in expr.subscripts if isinstance(expr, Ref) else getattr(expr, "args", ()):
        yield from elements(inner)


def step(ref: Ref, loop: str) -> str:
    """How an element moves in memory with the innermost loop."""
    forms = [affine(subscript) for subscript in ref.subscripts]
    if any(form is None for form in forms):
        return "indirect"
    strides = [form[0].get(loop, 0) for form in forms if form is not None]
    return "row" if any(strides[:-1]) else str(abs(strides[-1]))
