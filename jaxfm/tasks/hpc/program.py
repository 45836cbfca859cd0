"""Small parallel programs as data: what is generated, parsed, proved, run and rendered as source.

A `Program` declares its sizes, arrays and scalars and holds statements. It has no language: the
renderers write it as C or Fortran, the front end reads it from either, and every proof and tool
judges the same object. Subscripts are ordinary expressions; `affine` says which of them are linear
in the variables, and a proof that needs linear ones says "cannot tell" elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple


class Number(NamedTuple):
    """A constant."""

    value: int | float


class Var(NamedTuple):
    """A loop variable, a size or a scalar, read by its name."""

    name: str


class Ref(NamedTuple):
    """An element of an array; each dimension has a subscript."""

    array: str
    subscripts: tuple[Expr, ...]


class Op(NamedTuple):
    """An operator or an intrinsic function applied to its arguments.

    Names are those of C: + - * / % < <= > >= == != && || !, and min, max, fabs, sqrt, exp, sin,
    cos. Division of integers and % round as in C; Fortran's renderer writes `mod` and its kin.
    """

    name: str
    args: tuple[Expr, ...]


Expr = Number | Var | Ref | Op


class Clause(NamedTuple):
    """A clause of a directive, for example `reduction(+: s)`.

    Attributes:
        name: "private", "firstprivate", "lastprivate", "shared", "reduction", "schedule",
            "collapse", "nowait", "depend", "default", "num_threads", ...; "name" is the name of a
            critical section.
        arguments: Its variables or values as they are written; a dependence's elements are `Ref`s.
            An array in a reduction is the whole array (C writes its section).
        modifier: What stands before the colon: "+" of a reduction, "in" of a dependence.
    """

    name: str
    arguments: tuple[str | Ref, ...] = ()
    modifier: str = ""


class Pragma(NamedTuple):
    """An OpenMP directive: its name in C ("parallel for", "critical", ...) and its clauses."""

    directive: str
    clauses: tuple[Clause, ...] = ()

    def named(self, name: str) -> tuple[str, ...]:
        """The arguments of all clauses of a name, in order; an element counts by its array."""
        return tuple(
            a.array if isinstance(a, Ref) else a
            for clause in self.clauses
            if clause.name == name
            for a in clause.arguments
        )


class Assign(NamedTuple):
    """An assignment. With `update` it is `target = target update value` ("+", "*", "min", ...)."""

    target: Var | Ref
    value: Expr
    update: str = ""


class If(NamedTuple):
    """Statements under a condition."""

    condition: Expr
    then: tuple[Statement, ...]
    orelse: tuple[Statement, ...] = ()


class For(NamedTuple):
    """A counted loop over `lower <= var < upper` (`lower >= var > upper` for a negative step)."""

    var: str
    lower: Expr
    upper: Expr
    body: tuple[Statement, ...]
    step: int = 1
    pragma: Pragma | None = None


class Block(NamedTuple):
    """Statements under a directive that is no loop's: parallel, critical, atomic, task, single."""

    pragma: Pragma
    body: tuple[Statement, ...]


class Standalone(NamedTuple):
    """A directive without statements: barrier, taskwait."""

    pragma: Pragma


Statement = Assign | If | For | Block | Standalone
DType = Literal["double", "float", "int", "long"]


class Array(NamedTuple):
    """An array of the program.

    Attributes:
        shape: Elements by dimension; sizes and numbers.
        content: What it holds at the start: "values" (any numbers), "permutation" (each index
            once), "colliding" (indices that repeat), "monotone" (indices that never fall).
        limit: Indices lie in [0, limit); None: the length of the array itself.
    """

    name: str
    shape: tuple[Expr, ...]
    dtype: DType = "double"
    content: Literal["values", "permutation", "colliding", "monotone"] = "values"
    limit: Expr | None = None


class Scalar(NamedTuple):
    """A scalar of the program and its value at the start; a size is an integer scalar.

    Attributes:
        live: Whether its value at the end is a result of the program. Where it is not, only what
            later statements read counts, so that `private` may do instead of `lastprivate`.
    """

    name: str
    dtype: DType
    value: int | float = 0
    live: bool = True


class Program(NamedTuple):
    """A program: sizes (never written), arrays, scalars, and its statements.

    Loop variables are not declared; they are private to their loop. One that is declared as a
    scalar is C's `for (j = 0; ...)` over an outer `j`, which threads share unless a clause or the
    directive of its own loop makes it private; Fortran has no such loop.
    """

    sizes: tuple[Scalar, ...]
    arrays: tuple[Array, ...]
    scalars: tuple[Scalar, ...]
    body: tuple[Statement, ...]


Path = tuple[int, ...]
"""Where a statement stands: its index in the body, then in its own body, and so on. The
statements of an `If` are numbered through `then` and `orelse`."""


class Access(NamedTuple):
    """An access of a variable by the statement at `path`."""

    name: str
    write: bool
    path: Path
    subscripts: tuple[Expr, ...] = ()


class Conflict(NamedTuple):
    """Two accesses of one place by two threads, at least one a write, in no order.

    Attributes:
        first, second: The accesses.
        iterations: The values of the loop variables at either access, for example
            (("i", 3),) and (("i", 4),); empty where the accesses are in no loop.
    """

    first: Access
    second: Access
    iterations: tuple[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]] = ((), ())


Verdict = Literal["confirmed", "refuted", "cannot tell"]


class Judgement(NamedTuple):
    """What a proof or a tool says of a claim, mostly that a program has no data race.

    Attributes:
        verdict: "confirmed" (no race), "refuted" (a race), "cannot tell".
        reason: One sentence.
        tool: Who says it, with its version.
        conflict: The racing pair, where one was found.
    """

    verdict: Verdict
    reason: str
    tool: str
    conflict: Conflict | None = None


class Rendered(NamedTuple):
    """Source text, and the line (from 1) at which each statement begins."""

    text: str
    lines: dict[Path, int]


def children(statement: Statement) -> tuple[Statement, ...]:
    """The statements inside a statement, numbered as a `Path` numbers them."""
    match statement:
        case If(_, then, orelse):
            return then + orelse
        case For(body=body) | Block(body=body):
            return body
        case _:
            return ()


def walk(body: tuple[Statement, ...], path: Path = ()) -> Iterator[tuple[Path, Statement]]:
    """Every statement with its path, outer ones first."""
    for index, statement in enumerate(body):
        yield (*path, index), statement
        yield from walk(children(statement), (*path, index))


def dtypes(program: Program) -> dict[str, DType]:
    """The type of each declared name; loop variables, which are not declared, are integers."""
    scalars = {x.name: x.dtype for x in (*program.sizes, *program.scalars)}
    return scalars | {array.name: array.dtype for array in program.arrays}


def is_integer(expr: Expr, types: dict[str, DType]) -> bool:
    """Whether an expression's value is an integer (or a truth value), by the types of its names."""
    match expr:
        case Number(value):
            return isinstance(value, int)
        case Var(name) | Ref(array=name):
            return types.get(name, "int") in ("int", "long")
        case Op("sqrt" | "exp" | "sin" | "cos" | "fabs"):
            return False
        case Op("<" | "<=" | ">" | ">=" | "==" | "!=" | "&&" | "||" | "!"):
            return True
        case Op(args=args):
            return all(is_integer(argument, types) for argument in args)


def affine(expr: Expr) -> tuple[dict[str, int], int] | None:
    """An integer expression as (coefficient of each variable, constant); None if not linear."""
    match expr:
        case Number(int(value)):
            return {}, value
        case Var(name):
            return {name: 1}, 0
        case Op("+" | "-" as sign, (left, right)):
            a, b = affine(left), affine(right)
            if a is None or b is None:
                return None
            scale = 1 if sign == "+" else -1
            names = [*a[0], *(name for name in b[0] if name not in a[0])]
            sums = {name: a[0].get(name, 0) + scale * b[0].get(name, 0) for name in names}
            return {name: c for name, c in sums.items() if c}, a[1] + scale * b[1]
        case Op("-", (only,)):
            return affine(Op("-", (Number(0), only)))
        case Op("*", (left, right)):
            a, b = affine(left), affine(right)
            if a is None or b is None or (a[0] and b[0]):
                return None
            (terms, constant), factor = (b, a[1]) if not a[0] else (a, b[1])
            scaled = {name: factor * c for name, c in terms.items() if factor * c}
            return scaled, factor * constant
        case _:
            return None
