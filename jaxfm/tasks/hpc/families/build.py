"""What families draw from: names, coefficients, values; and arrays that are as long as needed."""

from __future__ import annotations

import random
from typing import NamedTuple

from jaxfm.tasks.hpc.program import (
    Array,
    Assign,
    Block,
    DType,
    Expr,
    For,
    If,
    Number,
    Op,
    Path,
    Program,
    Ref,
    Scalar,
    Statement,
    Var,
    affine,
    children,
)

ARRAYS = (
    *"abcdefghpqruvwxyz",
    *("data", "field", "grid", "buf", "src", "dst", "vals", "flux", "rho"),
)
SCALARS = ("s", "t", "acc", "tmp", "val", "total", "res", "best", "cur", "prev", "lo", "hi", "mark")
LOOPS = ("i", "j", "k", "l", "ii", "jj", "kk", "ix")
SIZES = ("n", "m", "nx", "ny", "len", "cnt", "num", "nn")
ZERO = Number(0)
USUAL: dict[str, tuple[int, ...]] = {"strides": (1, 2, 3), "offsets": (1, 2, 3)}
UNSEEN: dict[str, tuple[int, ...]] = {"strides": (4, 5, 7), "offsets": (4, 5, 6, 7, 8)}
COEFFICIENTS = {"usual": USUAL, "unseen": UNSEEN}


class Draft(NamedTuple):
    """A program as a family draws it.

    Attributes:
        body: Its statements.
        target: The loop whose directive is asked for; None where the family writes directives.
    """

    body: tuple[Statement, ...]
    target: Path | None = (0,)


class Sheet:
    """One program in the making: draws names that are new, and collects what it declares."""

    def __init__(self, rng: random.Random, coefficients: str, statements: int) -> None:
        self.rng, self.extra = rng, statements
        self.strides = COEFFICIENTS[coefficients]["strides"]
        self.offsets = COEFFICIENTS[coefficients]["offsets"]
        self.pools = {"array": ARRAYS, "scalar": SCALARS, "loop": LOOPS, "size": SIZES}
        self.taken: set[str] = set()
        self.sizes: list[Scalar] = []
        self.arrays: dict[str, Array] = {}
        self.scalars: list[Scalar] = []
        self.real: DType = rng.choice(("double", "double", "double", "float"))

    def name(self, pool: str) -> str:
        """A name of a pool that is not taken."""
        while (name := self.rng.choice(self.pools[pool])) in self.taken:
            if self.taken.issuperset(self.pools[pool]):
                name = f"{name}{len(self.taken)}"
                break
        self.taken.add(name)
        return name

    def loop(self) -> str:
        """A new loop variable."""
        return self.name("loop")

    def size(self, low: int = 20, high: int = 32) -> Var:
        """A new size."""
        name = self.name("size")
        self.sizes.append(Scalar(name, "int", self.rng.randint(low, high)))
        return Var(name)

    def bound(self, low: int = 20, high: int = 32) -> Expr:
        """How far a loop runs: a size, or a number."""
        return self.size(low, high) if self.chance(0.7) else Number(self.rng.randint(low, high))

    def array(self, *shape: Expr, dtype: DType | None = None, content="values", limit=None) -> str:
        """A new array; without a shape it will be as long as its subscripts need."""
        name = self.name("array")
        self.arrays[name] = Array(name, shape, dtype or self.real, content, limit)
        return name

    def scalar(self, dtype: DType | None = None, value: float = 0, live: bool = False) -> Var:
        """A new scalar."""
        name = self.name("scalar")
        self.scalars.append(Scalar(name, dtype or self.real, value, live))
        return Var(name)

    def chance(self, probability: float) -> bool:
        """Whether something happens."""
        return self.rng.random() < probability

    def offset(self) -> int:
        """A distance other than 0, of either sign."""
        return self.rng.choice(self.offsets) * self.rng.choice((-1, 1))

    def stride(self) -> int:
        """A stride, mostly 1."""
        return 1 if self.chance(0.4) else self.rng.choice(self.strides)

    def near(self, var: str) -> Expr:
        """A subscript at or near a loop variable."""
        return lin(var, 1, self.offset() if self.chance(0.4) else 0)

    def value(self, loops: tuple[str, ...], *read: Expr) -> Expr:
        """A value of what must be read, and of arrays that nothing writes."""
        rng = self.rng
        terms = list(read)
        for _ in range(rng.choice((0, 1, 1, 2)) if terms else rng.choice((1, 1, 2))):
            terms.append(self.term(loops))
        rng.shuffle(terms)
        result = terms[0]
        for term in terms[1:]:
            result = Op(rng.choice("++-*"), (result, term))
        if rng.random() < 0.3:
            factor = Number(rng.choice((0.5, 0.25, 1.5, 2.0, 3.0)))
            result = Op(rng.choice("*+"), (factor, result))
        return result

    def term(self, loops: tuple[str, ...]) -> Expr:
        """An element of a new array, or a number."""
        if not loops or self.chance(0.15):
            return Number(self.rng.choice((0.5, 1.0, 1.5, 2.0)))
        rank = len(loops) if self.chance(0.6) else 1
        return Ref(self.array(), tuple(self.near(v) for v in loops[-rank:]))

    def mixed(self, loops: tuple[str, ...], *statements: Statement) -> tuple[Statement, ...]:
        """Statements, and between them some that no label depends on."""
        found = list(statements)
        count = self.extra if self.extra else int(self.chance(0.4))
        for _ in range(count):
            target = Ref(self.array(), tuple(Var(v) for v in loops))
            found.insert(self.rng.randint(0, len(found)), Assign(target, self.value(loops)))
        return tuple(found)

    def reads(self, ref: Ref, value: Expr) -> Assign:
        """An assignment, as an update where chance has it."""
        return Assign(ref, value, self.rng.choice(("", "", "", "+")))

    def program(self, body: tuple[Statement, ...]) -> Program:
        """The program of statements, with arrays as long as they need."""
        return fitted(
            Program(tuple(self.sizes), tuple(self.arrays.values()), (*self.scalars,), body)
        )


def lin(var: str, stride: int, offset: int = 0) -> Expr:
    """The expression `stride * var + offset`."""
    base: Expr = Var(var) if abs(stride) == 1 else Op("*", (Number(abs(stride)), Var(var)))
    if stride == 0:
        return Number(offset)
    if stride < 0:
        return Op("-", (Number(offset), base)) if offset else Op("-", (base,))
    if not offset:
        return base
    return Op("+" if offset > 0 else "-", (base, Number(abs(offset))))


def plus(expr: Expr, distance: int) -> Expr:
    """An expression plus a number."""
    if not distance:
        return expr
    return Op("+" if distance > 0 else "-", (expr, Number(abs(distance))))


def over(var: str, upper: Expr, *body: Statement, lower: Expr = ZERO, step: int = 1) -> For:
    """A loop over `lower <= var < upper`."""
    return For(var, lower, upper, body, step)


Form = tuple[dict[str, int], int]


def fitted(program: Program) -> Program:
    """A program whose arrays without a shape are as long as its subscripts need.

    Where a subscript would be negative, all subscripts of that dimension are moved up.
    """
    needs: dict[str, list[tuple[Form, Form]]] = {}
    wanted = {array.name for array in program.arrays if not array.shape}
    sizes = {size.name: int(size.value) for size in program.sizes}

    def note(ref: Ref, ranges: dict[str, tuple[Form, Form]]) -> None:
        spans = needs.setdefault(ref.array, [])
        for number, subscript in enumerate(ref.subscripts):
            form = affine(subscript)
            if form is None:
                raise ValueError(f"The shape of {ref.array} cannot be derived; give it.")
            low, high = extreme(form, ranges, False, sizes), extreme(form, ranges, True, sizes)
            if number == len(spans):
                spans.append((low, high))
            else:
                old = spans[number]
                spans[number] = joined(old[0], low, min), joined(old[1], high, max)

    def look(expr: Expr, ranges) -> None:
        if isinstance(expr, Ref):
            if expr.array in wanted:
                note(expr, ranges)
            for inner in expr.subscripts:
                look(inner, ranges)
        elif isinstance(expr, Op):
            for inner in expr.args:
                look(inner, ranges)

    def visit(body, ranges) -> None:
        for statement in body:
            inner = ranges
            if isinstance(statement, Assign):
                look(statement.target, ranges)
                look(statement.value, ranges)
            elif isinstance(statement, If):
                look(statement.condition, ranges)
            elif isinstance(statement, For):
                low, high = affine(statement.lower), affine(statement.upper)
                if low is not None and high is not None:
                    if statement.step > 0:
                        span = low, (high[0], high[1] - 1)
                    else:
                        span = (high[0], high[1] + 1), low
                    inner = {**ranges, statement.var: span}
            visit(children(statement), inner)

    visit(program.body, {})
    shifts: dict[str, list[int]] = {}
    arrays = []
    for array in program.arrays:
        if array.shape:
            arrays.append(array)
            continue
        spans = needs.get(array.name) or [(({}, 0), ({}, 0))]
        shift = [max(0, -low[1]) if not low[0] else 0 for low, _ in spans]
        shifts[array.name] = shift
        shape = tuple(form_expr(h[0], h[1] + 1 + s) for (_, h), s in zip(spans, shift))
        arrays.append(array._replace(shape=shape))
    if any(any(shift) for shift in shifts.values()):
        program = program._replace(body=tuple(shifted(s, shifts) for s in program.body))
    return program._replace(arrays=tuple(arrays))


def extreme(form: Form, ranges: dict[str, tuple[Form, Form]], top: bool, sizes) -> Form:
    """The least or largest value of a linear expression, in sizes only."""
    terms, constant = dict(form[0]), form[1]
    while inner := [name for name in terms if name in ranges]:
        name = inner[-1]
        c = terms.pop(name)
        bound = ranges[name][1 if (c > 0) == top else 0]
        for other, factor in bound[0].items():
            terms[other] = terms.get(other, 0) + c * factor
        constant += c * bound[1]
    return {name: c for name, c in terms.items() if c}, constant


def joined(a: Form, b: Form, choose) -> Form:
    """A linear expression at least (or at most) as large as two, for all sizes from 0."""
    names = {**a[0], **b[0]}
    terms = {name: choose(a[0].get(name, 0), b[0].get(name, 0)) for name in names}
    return {name: c for name, c in terms.items() if c}, choose(a[1], b[1])


def form_expr(terms: dict[str, int], constant: int) -> Expr:
    """A linear expression as source."""
    result: Expr | None = None
    for name, c in sorted(terms.items(), key=lambda term: -term[1]):
        part: Expr = Var(name) if abs(c) == 1 else Op("*", (Number(abs(c)), Var(name)))
        if result is None:
            result = part if c > 0 else Op("-", (part,))
        else:
            result = Op("+" if c > 0 else "-", (result, part))
    return Number(constant) if result is None else plus(result, constant)


def shifted(statement: Statement, shifts: dict[str, list[int]]) -> Statement:
    """A statement whose subscripts of some arrays are moved up."""

    def new(expr: Expr) -> Expr:
        match expr:
            case Ref(array, subscripts):
                moves = shifts.get(array, [0] * len(subscripts))
                return Ref(array, tuple(raised(new(s), k) for s, k in zip(subscripts, moves)))
            case Op(name, args):
                return Op(name, tuple(new(a) for a in args))
        return expr

    inner = tuple(shifted(s, shifts) for s in children(statement))
    match statement:
        case Assign(target, value, update):
            return Assign(new(target), new(value), update)  # type: ignore[arg-type]
        case If(condition, then):
            return If(new(condition), inner[: len(then)], inner[len(then) :])
        case For():
            return statement._replace(body=inner)
        case Block(pragma):
            depend = lambda a: new(a) if isinstance(a, Ref) else a
            clauses = tuple(
                c._replace(arguments=tuple(depend(a) for a in c.arguments))  # type: ignore[misc]
                for c in pragma.clauses
            )
            return Block(pragma._replace(clauses=clauses), inner)
    return statement


def raised(expr: Expr, distance: int) -> Expr:
    """A subscript plus a number, in order where it is linear in one variable."""
    form = affine(expr)
    if distance and form and len(form[0]) == 1:
        ((name, c),) = form[0].items()
        return lin(name, c, form[1] + distance)
    return plus(expr, distance)
