"""Arrays of several dimensions: whether subscripts stay in their rows, and rows found in flat ones.

`a[i][j]` and `a[i + 1][j - n]` are one element of an array with rows of n, so different subscripts
are different elements only where each stays within its dimension.
"""

from __future__ import annotations

from jaxfm.tasks.hpc.program import (
    Array,
    Assign,
    Block,
    Expr,
    For,
    If,
    Number,
    Op,
    Program,
    Ref,
    Statement,
    Var,
    affine,
)
from jaxfm.tasks.hpc.proofs.accesses import Names, places
from jaxfm.tasks.hpc.proofs.integer_points import TooLong, sets

Polynomial = dict[tuple[str, ...], int]


def leaving(loop: For, array: Array, *, last: bool) -> tuple[str, bool]:
    """A sentence if a subscript may leave its row, and whether it does whatever the sizes are.

    The sentence is "" if no subscript leaves its row, for all sizes.

    Args:
        loop: The loop.
        array: With its extents.
        last: Whether the first subscript is the one between rows (C), or the last (Fortran).
    """
    inner = range(1, len(array.shape)) if last else range(len(array.shape) - 1)
    for place in places(loop):
        if place.access.name != array.name:
            continue
        for k in inner:
            names = Names()
            domain, variables, exact = names.domain(place, "i")
            subscript = names.linear(place.access.subscripts[k], variables)
            extent = names.linear(array.shape[k], {})
            what = f"A subscript of {array.name} may leave its dimension {k + 1}"
            if subscript is None or extent is None:
                return f"{what}.", False
            outside = f"({subscript} < 0 or {subscript} >= {extent})"
            dims = ", ".join(variables.values())
            head = f"[{', '.join(names.parameters.values())}] -> {{ [{dims}] : "
            try:
                with sets() as isl:
                    found = isl.Set(f"{head}{domain} and {outside} }}")
                    if found.is_empty():
                        continue
                    runs = isl.Set(f"{head}{domain} }}").params()
                    always = exact and runs.is_subset(found.params())
            except TooLong:
                return f"{what}.", False
            return f"{what}, whose extent is {_written(array.shape[k])}.", always
    return "", False


def _written(expr: Expr) -> str:
    match expr:
        case Number(value):
            return str(value)
        case Var(name) if name.startswith("extent_"):
            return "not known"
        case Var(name):
            return name
        case Op(name, (left, right)):
            return f"{_written(left)} {name} {_written(right)}"
    return "not known"


def flattened(program: Program, name: str, *, last: bool) -> Program | None:
    """A program whose array is one row, its memory; None if its extents are not numbers."""
    array = next(a for a in program.arrays if a.name == name)
    order = range(len(array.shape)) if last else range(len(array.shape) - 1, -1, -1)
    inner = [array.shape[k] for k in order][1:]
    if not all(isinstance(extent, Number) for extent in inner):
        return None

    def flat(ref: Ref) -> Ref:
        subscripts = [ref.subscripts[k] for k in order]
        total = subscripts[0]
        for extent, subscript in zip(inner, subscripts[1:]):
            total = Op("+", (Op("*", (total, extent)), subscript))
        return Ref(ref.array, (total,))

    return _replaced(program, name, (Var(f"extent_{name}"),), flat)


def with_rows(program: Program) -> Program:
    """A program whose flat arrays with subscripts such as i * n + j have rows of n.

    The subscripts must then be shown to stay in their rows; see `leaving`.
    """
    sizes = [size.name for size in program.sizes]
    for array in program.arrays:
        refs = [
            subscripts
            for place in places(program.body[0])  # type: ignore[arg-type]
            if place.access.name == array.name
            for subscripts in [place.access.subscripts]
        ]
        if len(array.shape) != 1 or all(affine(s[0]) is not None for s in refs):
            continue
        first = [_split(s[0], sizes) for s in refs]
        if None in first:
            continue
        widths = {tuple(width for width, _ in parts or ()) for parts in first}
        longest = max(widths, key=len)
        if any(longest[len(longest) - len(width) :] != width for width in widths):
            continue

        def split(ref: Ref, longest=longest) -> Ref:
            parts = _split(ref.subscripts[0], sizes, longest)
            assert parts is not None
            return Ref(ref.array, tuple(e for _, e in parts))

        if any(_split(s[0], sizes, longest) is None for s in refs):
            continue
        shape = (Var(f"extent_{array.name}"), *map(Var, longest[1:]))
        program = _replaced(program, array.name, shape, split)
    return program


def _split(expr: Expr, sizes: list[str], widths: tuple[str, ...] | None = None):
    """i * n + j as (("", i), ("n", j)): subscripts, each with the width of its dimension."""
    polynomial = _polynomial(expr)
    if polynomial is None:
        return None
    parts: list[tuple[str, Expr]] = []
    rows = list(widths[1:]) if widths is not None else None
    while rows if rows is not None else any(len(m) > 1 for m in polynomial):
        if rows is not None:
            width = rows.pop()
        else:
            products = [m for m in polynomial if len(m) > 1]
            fitting = [n for n in sizes if all(m.count(n) == 1 for m in products)]
            if len(fitting) != 1:
                return None
            width = fitting[0]
        if any(m.count(width) > 1 for m in polynomial):
            return None
        rest = {m: c for m, c in polynomial.items() if width not in m}
        polynomial = {
            tuple(x for x in m if x != width): c for m, c in polynomial.items() if width in m
        }
        if any(len(m) > 1 for m in rest):
            return None
        parts.insert(0, (width, _expression(rest)))
    if any(len(m) > 1 for m in polynomial):
        return None
    return [("", _expression(polynomial)), *parts]


def _polynomial(expr: Expr) -> Polynomial | None:
    """An expression as a sum of products of variables; None if it is none."""
    match expr:
        case Number(int(value)):
            return {(): value} if value else {}
        case Var(name):
            return {(name,): 1}
        case Op("-", (only,)):
            return _polynomial(Op("-", (Number(0), only)))
        case Op("+" | "-" | "*" as name, (left, right)):
            a, b = _polynomial(left), _polynomial(right)
            if a is None or b is None or len(a) * len(b) > 100:
                return None
            total: Polynomial = {} if name == "*" else dict(a)
            if name == "*":
                for m, c in a.items():
                    for n, d in b.items():
                        key = tuple(sorted(m + n))
                        total[key] = total.get(key, 0) + c * d
            else:
                for n, d in b.items():
                    total[n] = total.get(n, 0) + (d if name == "+" else -d)
            return {m: c for m, c in total.items() if c}
    return None


def _expression(polynomial: Polynomial) -> Expr:
    """A linear polynomial as an expression."""
    total: Expr = Number(polynomial.get((), 0))
    for monomial, coefficient in polynomial.items():
        if monomial:
            total = Op("+", (total, Op("*", (Number(coefficient), Var(monomial[0])))))
    return total


def _replaced(program: Program, name: str, shape: tuple[Expr, ...], change) -> Program:
    """A program with another form of an array, each reference to it changed."""

    def expr(e: Expr) -> Expr:
        match e:
            case Ref(array, subscripts):
                inner = Ref(array, tuple(map(expr, subscripts)))
                return change(inner) if array == name else inner
            case Op(op, args):
                return Op(op, tuple(map(expr, args)))
        return e

    def statement(s: Statement) -> Statement:
        match s:
            case Assign(target, value):
                place = expr(target)
                assert isinstance(place, (Var, Ref))
                return s._replace(target=place, value=expr(value))
            case If(condition, then, orelse):
                return If(
                    expr(condition), tuple(map(statement, then)), tuple(map(statement, orelse))
                )
            case For(_, lower, upper, body):
                return s._replace(
                    lower=expr(lower), upper=expr(upper), body=tuple(map(statement, body))
                )
            case Block(body=body):
                return s._replace(body=tuple(map(statement, body)))
        return s

    arrays = tuple(a._replace(shape=shape) if a.name == name else a for a in program.arrays)
    return program._replace(arrays=arrays, body=tuple(map(statement, program.body)))


def is_written(loop: For, name: str) -> bool:
    """Whether a loop writes an array."""
    return any(p.access.name == name and p.access.write for p in places(loop))
