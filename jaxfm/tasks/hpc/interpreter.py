"""Runs a program serially in Python: its results, and the order in which it reaches memory.

The program becomes a Python function, with numbers in double precision and integers as C has them.
Directives do not count. It needs no compiler, and stands beside the harness as a second opinion.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from jaxfm.tasks.hpc.program import (
    Assign,
    Expr,
    For,
    If,
    Number,
    Op,
    Program,
    Ref,
    Statement,
    Var,
    children,
    dtypes,
    is_integer,
)
from jaxfm.tasks.hpc.proofs.contents import contents, divided, size_of, sizes_of
from jaxfm.tasks.hpc.render import parameters

WORDS = {"&&": "and", "||": "or"}
GLOBALS = {
    "quotient": lambda a, b: divided("/", a, b),
    "remainder": lambda a, b: divided("%", a, b),
    "ratio": lambda a, b: a / b if b else math.copysign(math.inf, a) if a else math.nan,
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "exp": lambda x: math.exp(min(x, 700.0)),
    "sin": math.sin, "cos": math.cos, "fabs": abs, "min": min, "max": max, "range": range,
    "int": int, "len": len,
}  # fmt: skip


def results(program: Program) -> dict[str, np.ndarray]:
    """The arrays and the scalars that are results, at the end of a serial run.

    Raises:
        ValueError: An element outside its array, a division by zero, or a name that is unknown.
    """
    memory = _memory(program)
    given = {s.name: s.value for s in program.scalars}
    left = _run(program, memory, given, None)
    shapes = _shapes(program)
    found = {name: np.array(flat).reshape(shapes[name]) for name, flat in memory.items()}
    return found | {
        p.name: np.array(left[p.name]) for p in parameters(program) if p.kind == "result"
    }


def accesses(program: Program) -> np.ndarray:
    """The elements that a serial run reads and writes in turn, [count], as places in one memory.

    Arrays lie one after the other, each at a multiple of 8 elements.
    """
    log: list[int] = []
    given = {s.name: s.value for s in program.scalars}
    _run(program, _memory(program), given, log)
    return np.array(log, np.int64)


def _shapes(program: Program) -> dict[str, tuple[int, ...]]:
    known = sizes_of(program)
    return {a.name: tuple(size_of(extent, known) for extent in a.shape) for a in program.arrays}


def _memory(program: Program) -> dict[str, list]:
    known = sizes_of(program)
    return {array.name: contents(array, known).ravel().tolist() for array in program.arrays}


def _run(program: Program, memory: dict[str, list], given: dict, log: list[int] | None) -> dict:
    """Runs a program on its memory; returns the scalars at the end."""
    scope: dict = {}
    exec(_Writer(program).source(), dict(GLOBALS), scope)
    function: Callable = scope["kernel"]

    def touch(place: int, base: int, length: int) -> int:
        if not 0 <= place < length:
            raise IndexError("an element is outside its array")
        if log is not None:
            log.append(base + place)
        return place

    try:
        return function(memory, sizes_of(program) | given, touch)
    except (IndexError, NameError, OverflowError) as error:
        raise ValueError(
            f"The program cannot be run: {error or 'an element is outside'}."
        ) from None


class _Writer:
    """A program as the text of a Python function; each name has a letter before it."""

    def __init__(self, program: Program) -> None:
        self.program, self.types = program, dtypes(program)
        self.shapes = _shapes(program)
        self.lines: list[str] = []
        self.bases: dict[str, int] = {}
        at = 0
        for name, shape in self.shapes.items():
            self.bases[name] = at
            at += -(-math.prod(shape) // 8) * 8

    def source(self) -> str:
        """The text of the function."""
        self.lines = ["def kernel(memory, given, touch):"]
        scalars = [x.name for x in (*self.program.sizes, *self.program.scalars)]
        self.lines += [f"    v_{name} = memory[{name!r}]" for name in self.shapes]
        self.lines += [f"    v_{name} = given[{name!r}]" for name in scalars]
        self.block(self.program.body, 1)
        inside = ", ".join(f"{name!r}: v_{name}" for name in scalars)
        self.lines.append(f"    return {{{inside}}}")
        return "\n".join(self.lines)

    def put(self, depth: int, line: str) -> None:
        """Adds a line."""
        self.lines.append("    " * depth + line)

    def block(self, body: tuple[Statement, ...], depth: int) -> None:
        """Statements, at least `pass`."""
        self.put(depth, "pass")
        for statement in body:
            match statement:
                case Assign():
                    self.put(depth, self.assignment(statement))
                case If(condition, then, orelse):
                    self.put(depth, f"if {self.expr(condition)}:")
                    self.block(then, depth + 1)
                    self.put(depth, "else:")
                    self.block(orelse, depth + 1)
                case For(var, lower, upper, inside, step):
                    bounds = f"range({self.expr(lower)}, {self.expr(upper)}, {step})"
                    self.put(depth, f"for v_{var} in {bounds}:")
                    self.block(inside, depth + 1)
                    if var in self.types:  # C leaves the value that ends the loop
                        self.put(depth, f"v_{var} = {bounds}.start + len({bounds}) * {step}")
                case _:
                    self.block(children(statement), depth)

    def assignment(self, assign: Assign) -> str:
        """An assignment."""
        target, value, update = assign
        new = self.expr(Op(update, (target, value)) if update else value)
        if is_integer(target, self.types) and not is_integer(value, self.types):
            new = f"int({new})"
        return f"{self.expr(target)} = {new}"

    def expr(self, expr: Expr) -> str:
        """An expression."""
        match expr:
            case Number(value):
                return f"({value})"
            case Var(name):
                return f"v_{name}"
            case Ref(name, subscripts):
                place, shape = "0", self.shapes[name]
                for subscript, extent in zip(subscripts, shape):
                    place = f"({place}) * {extent} + {self.expr(subscript)}"
                length = math.prod(shape)
                return f"v_{name}[touch({place}, {self.bases[name]}, {length})]"
            case Op("/" | "%" as name, (left, right)):
                whole = is_integer(expr, self.types)
                called = "remainder" if name == "%" else "quotient" if whole else "ratio"
                return f"{called}({self.expr(left)}, {self.expr(right)})"
            case Op("!", (only,)):
                return f"(not {self.expr(only)})"
            case Op("-", (only,)):
                return f"(-{self.expr(only)})"
            case Op(name, args) if name in GLOBALS:
                return f"{name}({', '.join(self.expr(argument) for argument in args)})"
            case Op(name, (left, right)):
                return f"({self.expr(left)} {WORDS.get(name, name)} {self.expr(right)})"
        raise ValueError(f"The interpreter does not know {expr}.")
