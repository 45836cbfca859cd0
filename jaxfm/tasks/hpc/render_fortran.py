"""Fortran in free form: subroutines, loops and `!$omp` directives; see `render`."""

from __future__ import annotations

from jaxfm.tasks.hpc.program import (
    Assign,
    Block,
    Expr,
    For,
    If,
    Number,
    Op,
    Path,
    Pragma,
    Program,
    Ref,
    Rendered,
    Standalone,
    Statement,
    Var,
    affine,
    walk,
)
from jaxfm.tasks.hpc.render import FUNCTIONS, Style, Writer, moved

SPELLED = {"&&": ".and.", "||": ".or.", "!=": "/=", "!": ".not. "}
TYPES = {"double": "double precision", "float": "real", "int": "integer", "long": "integer(8)"}
AT_END = {"nowait", "copyprivate"}  # clauses that stand at the end of a construct
LINE = 120


def subroutine(program: Program, name: str, style: Style) -> Rendered:
    """The program as a subroutine; see `render.to_fortran`.

    Raises:
        ValueError: A loop variable is declared as a scalar, which only C can share between threads.
    """
    writer = FortranWriter(program, style)
    loops = list(dict.fromkeys(s.var for _, s in walk(program.body) if isinstance(s, For)))
    for var in loops:
        if var in writer.types:
            raise ValueError(
                f"Threads share the loop variable {var}, which Fortran forbids; use C."
            )
    scalars = (*program.sizes, *program.scalars)
    names = [x.name for x in program.sizes] + [x.name for x in program.arrays]
    names += [x.name for x in program.scalars]
    writer.code(0, f"subroutine {name}({', '.join(names)})")
    writer.code(1, "implicit none")
    for scalar in scalars:
        writer.code(1, f"{TYPES[scalar.dtype]} :: {scalar.name}")
    for array in program.arrays:
        writer.code(1, f"{TYPES[array.dtype]} :: {array.name}({writer.extents(array.shape)})")
    if loops:
        writer.code(1, f"integer :: {', '.join(loops)}")
    writer.statements(writer.program.body, (), 1)
    writer.code(0, f"end subroutine {name}")
    return writer.rendered()


class FortranWriter(Writer):
    """Writes Fortran. With `style.base` 1, loops and subscripts both count from one."""

    def __init__(self, program: Program, style: Style) -> None:
        if style.base:
            body = tuple(from_one(statement, frozenset()) for statement in program.body)
            program = program._replace(body=body)
        super().__init__(program, style)
        double = "double" in self.types.values()
        self.kind = "d0" if double else "e0"

    def code(self, depth: int, line: str) -> None:
        """Adds a line, broken where it is too long for free form."""
        head = "!$omp& " if line.lower().startswith("!$omp") else ""
        while len(line) > LINE:
            cut = line.rfind(" ", 0, LINE)
            if cut < 1:
                break
            self.put(depth, line[:cut] + " &")
            line = head + line[cut + 1 :]
        self.put(depth, line)

    def word(self, text: str) -> str:
        """A keyword in the style's case."""
        return text.upper() if self.style.upper else text

    def extents(self, shape: tuple[Expr, ...]) -> str:
        """The bounds of an array's dimensions."""
        if self.style.base:
            return ", ".join(self.expr(extent) for extent in shape)
        return ", ".join(f"0:{self.expr(moved(extent, -1))}" for extent in shape)

    def expr(self, expr: Expr, level: int = 0) -> str:
        """See `Writer.expr`."""
        match expr:
            case Number(int(value)):
                return f"({value})" if value < 0 and level else str(value)
            case Number(value):
                text = f"{value}{self.kind}"
                return f"({text})" if value < 0 and level else text
            case Var(name):
                return name
            case Ref(array, subscripts):
                return f"{array}({', '.join(self.expr(s) for s in subscripts)})"
            case Op("%", args):
                return f"{self.word('mod')}({', '.join(self.expr(a) for a in args)})"
            case Op(name, args) if name in FUNCTIONS or name in ("min", "max"):
                called = self.word("abs" if name == "fabs" else name)
                return f"{called}({', '.join(self.expr(argument) for argument in args)})"
            case Op("-" | "!" as name, (only,)):
                text = SPELLED.get(name, name) + self.expr(only, 7)
                return f"({text})" if level > (4 if name == "-" else 2) else text
            case Op(name, args):
                return self.binary(name, self.word(SPELLED.get(name, name)), args, level)

    def joined(self, op: str, left: str, right: str) -> str:
        """Operators that are words stand between spaces."""
        return f"{left} {op} {right}" if op.startswith(".") else super().joined(op, left, right)

    def directive(self, pragma: Pragma, end: bool = False) -> str:
        """A directive's line, or the line that ends its construct."""
        name = pragma.directive.replace("for", "do")
        late = [c for c in pragma.clauses if c.name in AT_END]
        if end:
            named = [c for c in pragma.clauses if c.name == "name"]
            words = ["end " + name, *(self.clause(c) for c in named + late)]
        else:
            words = [name, *(self.clause(c) for c in pragma.clauses if c not in late)]
        text = " ".join(("!$omp", *words)).replace(" (", "(", 1)
        return self.word(text) if not self.style.upper else upper_words(text)

    def statement(self, statement: Statement, path: Path, depth: int) -> None:
        """See `Writer.statement`."""
        match statement:
            case Assign(target, value, update):
                self.mark(path)
                value = Op(update, (target, value)) if update else value
                self.code(depth, self.joined("=", self.expr(target), self.expr(value)))
            case For(pragma=pragma):
                if pragma:
                    self.code(depth, self.directive(pragma))
                self.mark(path)
                self.loop(statement, path, depth)
                if pragma:
                    self.code(depth, self.directive(pragma, end=True))
            case If(condition, then, orelse):
                self.mark(path)
                test = f"{self.word('if')} ({self.expr(condition)}) {self.word('then')}"
                self.code(depth, test)
                self.statements(then, path, depth + 1)
                if orelse:
                    self.code(depth, self.word("else"))
                    self.statements(orelse, path, depth + 1, first=len(then))
                self.code(depth, self.word("end if"))
            case Block(pragma, body):
                self.mark(path)
                self.code(depth, self.directive(pragma))
                inside = pragma.directive in ("section",) or pragma.directive.startswith("atomic")
                self.statements(body, path, depth + (not inside))
                if not inside:
                    self.code(depth, self.directive(pragma, end=True))
            case Standalone(pragma):
                self.mark(path)
                self.code(depth, self.directive(pragma))

    def loop(self, loop: For, path: Path, depth: int) -> None:
        """A do loop, whose last value is part of it."""
        last = moved(loop.upper, -1 if loop.step > 0 else 1)
        step = "" if loop.step == 1 else f", {loop.step}"
        head = self.joined("=", loop.var, f"{self.expr(loop.lower)}, {self.expr(last)}{step}")
        self.code(depth, f"{self.word('do')} {head}")
        self.statements(loop.body, path, depth + 1)
        self.code(depth, self.word("end do"))


def from_one(statement: Statement, counters: frozenset[str]) -> Statement:
    """A statement whose subscripts, and whose loops as far as they are `counters`, count from one.

    The variable of such a loop is one larger than before; everything else computes the same.
    """

    def inner(body: tuple[Statement, ...], more: frozenset[str] = frozenset()):
        return tuple(from_one(s, counters | more) for s in body)

    def new(expr: Expr) -> Expr:
        return counted(expr, counters)

    match statement:
        case Assign(target, value, update):
            return Assign(new(target), new(value), update)  # type: ignore[arg-type]
        case If(condition, then, orelse):
            return If(new(condition), inner(then), inner(orelse))
        case For(var, lower, upper, body, step, pragma):
            first, last = counted_more(new(lower)), counted_more(new(upper))
            return For(var, first, last, inner(body, frozenset({var})), step, pragma)
        case Block(pragma, body):
            clauses = tuple(
                c._replace(
                    arguments=tuple(new(a) if isinstance(a, Ref) else a for a in c.arguments)  # type: ignore[misc]
                )
                for c in pragma.clauses
            )
            return Block(pragma._replace(clauses=clauses), inner(body))
        case _:
            return statement


def counted(expr: Expr, counters: frozenset[str]) -> Expr:
    """An expression in which counters are one larger and subscripts count from one."""
    form = affine(expr)
    if form and any(name in counters for name in form[0]):
        return linear(form[0], form[1] - sum(c for name, c in form[0].items() if name in counters))
    match expr:
        case Var(name) if name in counters:
            return Op("-", (expr, Number(1)))
        case Ref(array, subscripts):
            return Ref(array, tuple(counted_more(counted(s, counters)) for s in subscripts))
        case Op(name, args):
            return Op(name, tuple(counted(argument, counters) for argument in args))
        case _:
            return expr


def counted_more(expr: Expr) -> Expr:
    """An expression plus one."""
    form = affine(expr)
    return linear(form[0], form[1] + 1) if form else moved(expr, 1)


def linear(terms: dict[str, int], constant: int) -> Expr:
    """The expression of coefficients and a constant, for example 2*i - 1."""
    result: Expr | None = None
    ordered = sorted(terms.items(), key=lambda item: item[1] < 0)
    for name, c in ordered:
        part: Expr = Var(name) if abs(c) == 1 else Op("*", (Number(abs(c)), Var(name)))
        if result is None:
            result = part if c > 0 else Op("-", (part,))
            if c < 0 and constant:
                result = Op("-", (Number(constant), part))
                constant = 0
        else:
            result = Op("+" if c > 0 else "-", (result, part))
    if result is None:
        return Number(constant)
    return moved(result, constant) if constant else result


def upper_words(text: str) -> str:
    """A directive with its keywords, not its variables, in capitals."""
    head, parenthesis, rest = text.partition("(")
    if not parenthesis:
        return text.upper()
    words, _, name = head.rpartition(" ")
    inside, close, after = rest.partition(")")
    return f"{words.upper()} {name.upper()}({inside}{close}{upper_words(after) if after else ''}"
