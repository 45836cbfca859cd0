"""Source text of programs, in C and in Fortran, and the line of each statement.

`to_c` and `to_fortran` write a whole function, which a compiler accepts; `loop_source` writes its
statements alone, which is what models read. Layout is a `Style`; names are changed by `naming`.
"""

from __future__ import annotations

import abc
import random
from typing import Literal, NamedTuple

from jaxfm.tasks.hpc.program import (
    Assign,
    Block,
    Clause,
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
    dtypes,
    is_integer,
    walk,
)

Language = Literal["c", "fortran"]
PRECEDENCE = {"||": 1, "&&": 2, "==": 3, "!=": 3, "<": 4, "<=": 4, ">": 4, ">=": 4}
PRECEDENCE |= {"+": 5, "-": 5, "*": 6, "/": 6, "%": 6}
FUNCTIONS = {"fabs", "sqrt", "exp", "sin", "cos"}


class Style(NamedTuple):
    """How source is laid out; none of it changes what a program does.

    Attributes:
        indent: What one level is indented by.
        brace: Where C's brace of a body stands; "needed" leaves out those of single statements.
        increment: How C's loops count up by one.
        inclusive: Whether C's loops end with `i <= n - 1`.
        compound: Whether C writes `s += x` rather than `s = s + x`.
        spaced: Whether operators stand between spaces.
        upper: Whether Fortran's keywords are in capitals.
        base: The lowest index of Fortran's arrays, 0 or 1.
    """

    indent: str = "    "
    brace: Literal["same line", "next line", "needed"] = "same line"
    increment: Literal["i++", "++i", "i += 1", "i = i + 1"] = "i++"
    inclusive: bool = False
    compound: bool = True
    spaced: bool = True
    upper: bool = False
    base: Literal[0, 1] = 0


def random_style(rng: random.Random) -> Style:
    """A style drawn at random."""
    return Style(
        indent=rng.choice(("  ", "    ", "\t")),
        brace=rng.choice(("same line", "next line", "needed")),
        increment=rng.choice(("i++", "i++", "++i", "i += 1", "i = i + 1")),
        inclusive=rng.random() < 0.25,
        compound=rng.random() < 0.7,
        spaced=rng.random() < 0.75,
        upper=rng.random() < 0.25,
        base=rng.choice((0, 1)),
    )


class Parameter(NamedTuple):
    """A parameter of a rendered function, in its order.

    "size", "value": by value in C. "array": a pointer. "result": a scalar that the program writes
    and whose end value counts; C takes a pointer to it, called `name_result`. Fortran takes all by
    reference, and may leave any value in a written scalar that is no result.
    """

    name: str
    kind: Literal["size", "array", "value", "result"]


def parameters(program: Program) -> tuple[Parameter, ...]:
    """The parameters of the function that `to_c` and `to_fortran` write: sizes, arrays, scalars."""
    written = {
        s.target.name
        for _, s in walk(program.body)
        if isinstance(s, Assign) and isinstance(s.target, Var)
    }
    return (
        *(Parameter(size.name, "size") for size in program.sizes),
        *(Parameter(array.name, "array") for array in program.arrays),
        *(
            Parameter(s.name, "result" if s.live and s.name in written else "value")
            for s in program.scalars
        ),
    )


def to_c(program: Program, name: str = "kernel", style: Style | None = None) -> Rendered:
    """The program as a C function (C99, variable-length array parameters).

    Scalars that are results arrive by a pointer, are copied to a local variable of their own name,
    and are copied back at the end; see `Parameter`.
    """
    writer = CWriter(program, style or Style())
    given = {p.name: p.kind for p in parameters(program)}
    types = dtypes(program)
    declared = [f"int {size.name}" for size in program.sizes]
    for array in program.arrays:
        shape = "".join(f"[{writer.expr(extent)}]" for extent in array.shape)
        declared.append(f"{array.dtype} {array.name}{shape}")
    for scalar in program.scalars:
        taken = f"*{scalar.name}_result" if given[scalar.name] == "result" else scalar.name
        declared.append(f"{scalar.dtype} {taken}")
    results = [n for n, kind in given.items() if kind == "result"]
    writer.put(0, f"void {name}({', '.join(declared) or 'void'})")
    writer.put(0, "{")
    for result in results:
        writer.put(1, f"{types[result]} {result} = *{result}_result;")
    writer.statements(program.body, (), 1)
    for result in results:
        writer.put(1, f"*{result}_result = {result};")
    writer.put(0, "}")
    return writer.rendered()


def to_fortran(program: Program, name: str = "kernel", style: Style | None = None) -> Rendered:
    """The program as a Fortran subroutine in free form.

    An element has the same subscripts as in C (one more where `style.base` is 1), thus another
    place in memory when it has several.
    """
    from jaxfm.tasks.hpc import render_fortran

    return render_fortran.subroutine(program, name, style or Style())


def loop_source(program: Program, language: Language = "c", style: Style | None = None) -> Rendered:
    """The program's statements alone, without declarations: what a model reads."""
    if language == "c":
        writer: Writer = CWriter(program, style or Style())
    else:
        from jaxfm.tasks.hpc import render_fortran

        writer = render_fortran.FortranWriter(program, style or Style())
    writer.statements(writer.program.body, (), 0)
    return writer.rendered()


def pragma_source(pragma: Pragma, program: Program, language: Language = "c") -> str:
    """One directive as a line of source, `#pragma omp ...` or `!$omp ...`."""
    if language == "c":
        return CWriter(program, Style()).directive(pragma)
    from jaxfm.tasks.hpc import render_fortran

    return render_fortran.FortranWriter(program, Style()).directive(pragma)


class Writer(abc.ABC):
    """Lines of one language: its subclass says how expressions and statements are written."""

    def __init__(self, program: Program, style: Style) -> None:
        self.program, self.style, self.types = program, style, dtypes(program)
        self.shapes = {array.name: array.shape for array in program.arrays}
        self.text: list[str] = []
        self.lines: dict[Path, int] = {}

    def put(self, depth: int, line: str) -> None:
        """Adds a line."""
        self.text.append(self.style.indent * depth + line)

    def mark(self, path: Path) -> None:
        """Says that the statement at a path begins on the next line."""
        self.lines[path] = len(self.text) + 1

    def rendered(self) -> Rendered:
        """What was written."""
        return Rendered("\n".join(self.text) + "\n", self.lines)

    def statements(self, body: tuple[Statement, ...], path: Path, depth: int, first: int = 0):
        """Writes statements, the first of which is number `first` of its path."""
        for index, statement in enumerate(body, first):
            self.statement(statement, (*path, index), depth)

    @abc.abstractmethod
    def statement(self, statement: Statement, path: Path, depth: int) -> None:
        """Writes one statement."""

    @abc.abstractmethod
    def expr(self, expr: Expr, level: int = 0) -> str:
        """An expression, in parentheses where its operators bind less than `level`."""

    def joined(self, op: str, left: str, right: str) -> str:
        """Two operands and their operator."""
        return f"{left} {op} {right}" if self.style.spaced else f"{left}{op}{right}"

    def binary(self, op: str, spelled: str, args: tuple[Expr, ...], level: int) -> str:
        """A binary operator with the parentheses that it needs."""
        left, right = args
        own = PRECEDENCE[op]
        if op == "+" and isinstance(right, Number) and right.value < 0:
            op, spelled, right = "-", "-", Number(-right.value)
        # The right side is in parentheses even in a + (b - c), so that the tree reads back.
        first = own + (own in (3, 4))
        text = self.joined(spelled, self.expr(left, first), self.expr(right, own + 1))
        return f"({text})" if own < level else text

    def clause(self, clause: Clause) -> str:
        """A clause as it is written in a directive."""
        if clause.name == "name":
            return f"({clause.arguments[0]})"
        if not clause.arguments:
            return clause.name
        inside = ", ".join(self.listed(clause, argument) for argument in clause.arguments)
        modifier = clause.modifier and f"{clause.modifier}: "
        return f"{clause.name}({modifier}{inside})"

    def listed(self, clause: Clause, argument: str | Ref) -> str:
        """One argument of a clause."""
        return self.expr(argument) if isinstance(argument, Ref) else argument


class CWriter(Writer):
    """Writes C."""

    def expr(self, expr: Expr, level: int = 0) -> str:
        """See `Writer.expr`."""
        match expr:
            case Number(value):
                return f"({value})" if value < 0 and level else str(value)
            case Var(name):
                return name
            case Ref(array, subscripts):
                return array + "".join(f"[{self.expr(s)}]" for s in subscripts)
            case Op("min" | "max" as name, (left, right)):
                if not is_integer(expr, self.types):
                    return f"f{name}({self.expr(left)}, {self.expr(right)})"
                sign = "<" if name == "min" else ">"
                test = self.joined(sign, self.expr(left, 5), self.expr(right, 5))
                return f"({test} ? {self.expr(left, 1)} : {self.expr(right, 1)})"
            case Op(name, args) if name in FUNCTIONS:
                return f"{name}({', '.join(self.expr(argument) for argument in args)})"
            case Op("-" | "!" as name, (only,)):
                text = name + self.expr(only, 7)
                return f"({text})" if level > 4 else text
            case Op(name, args):
                return self.binary(name, name, args, level)

    def listed(self, clause: Clause, argument: str | Ref) -> str:
        """Arrays in a reduction are written as sections: `h[0:m]`."""
        if clause.name == "reduction" and argument in self.shapes:
            extents = self.shapes[argument]
            return argument + "".join(f"[0:{self.expr(extent)}]" for extent in extents)
        return super().listed(clause, argument)

    def directive(self, pragma: Pragma) -> str:
        """A directive's line."""
        words = [self.clause(clause) for clause in pragma.clauses]
        return " ".join(("#pragma omp", pragma.directive, *words)).replace(" (", "(", 1)

    def statement(self, statement: Statement, path: Path, depth: int) -> None:
        """See `Writer.statement`."""
        match statement:
            case Assign():
                self.mark(path)
                self.put(depth, self.assignment(statement))
            case For(pragma=pragma, body=body):
                if pragma:
                    self.put(depth, self.directive(pragma))
                self.mark(path)
                self.braced(self.head(statement), body, path, depth)
            case If(condition, then, orelse):
                self.mark(path)
                self.braced(f"if ({self.expr(condition)})", then, path, depth)
                if orelse:
                    self.braced("else", orelse, path, depth, first=len(then))
            case Block(pragma, body):
                self.mark(path)
                self.put(depth, self.directive(pragma))
                if pragma.directive.startswith("atomic"):
                    self.statements(body, path, depth)
                else:
                    self.braced("", body, path, depth)
            case Standalone(pragma):
                self.mark(path)
                self.put(depth, self.directive(pragma))

    def braced(self, head: str, body, path: Path, depth: int, first: int = 0) -> None:
        """A head and its body; an empty head is a directive's, whose brace stands alone."""
        # A brace is kept where a body is more than one plain assignment or loop.
        bare = self.style.brace == "needed" and head and len(body) == 1
        if bare and isinstance(body[0], Assign | For) and not getattr(body[0], "pragma", None):
            self.put(depth, head)
            self.statements(body, path, depth + 1, first)
            return
        if head and self.style.brace != "next line":
            self.put(depth, f"{head} {{")
        else:
            if head:
                self.put(depth, head)
            self.put(depth, "{")
        self.statements(body, path, depth + 1, first)
        self.put(depth, "}")

    def head(self, loop: For) -> str:
        """The head of a loop."""
        i, declared = loop.var, "" if loop.var in self.types else "int "
        start = f"{declared}{self.joined('=', i, self.expr(loop.lower))}"
        sign = "<" if loop.step > 0 else ">"
        stop = loop.upper
        if self.style.inclusive:
            sign, stop = sign + "=", moved(stop, -1 if loop.step > 0 else 1)
        if loop.step == 1:
            step = self.style.increment.replace("i", i)
            step = step if self.style.spaced else step.replace(" ", "")
        elif loop.step == -1:
            step = f"{i}--"
        else:
            step = self.joined("+=" if loop.step > 0 else "-=", i, str(abs(loop.step)))
        return f"for ({start}; {self.joined(sign, i, self.expr(stop, 5))}; {step})"

    def assignment(self, assign: Assign) -> str:
        """An assignment and its semicolon."""
        target, value, update = assign
        if update and (not self.style.compound or update not in ("+", "-", "*", "/")):
            value, update = Op(update, (target, value)), ""
        return self.joined(f"{update}=", self.expr(target), self.expr(value)) + ";"


def moved(expr: Expr, distance: int) -> Expr:
    """An expression plus a number, with numbers at its end joined."""
    match expr:
        case Number(value):
            return Number(value + distance)
        case Op("+" | "-" as sign, (left, Number(value))):
            total = (value if sign == "+" else -value) + distance
            return left if total == 0 else Op("+" if total > 0 else "-", (left, Number(abs(total))))
        case _:
            return Op("+" if distance > 0 else "-", (expr, Number(abs(distance))))
