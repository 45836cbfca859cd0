"""Where a loop's statements reach memory: each access with the iterations in which it happens.

Iterations are described by constraints in the notation of isl. What is not linear is left out of
them, and the access says so (`exact` is false): then it is known to happen in no more iterations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jaxfm.tasks.hpc.program import (
    Access,
    Assign,
    Block,
    Expr,
    For,
    If,
    Number,
    Op,
    Path,
    Ref,
    Statement,
    Var,
    affine,
)

_COMPARE = {"<": "<", "<=": "<=", ">": ">", ">=": ">=", "==": "=", "!=": "!="}
_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "=": "!=", "!=": "="}


class Place(NamedTuple):
    """An access and when it happens.

    Attributes:
        access: What is accessed, and by which statement.
        loops: The loops around it, outermost first.
        guards: Conditions around it, and whether they hold there.
        held: "atomic", or the name of the critical section it is in; "" outside.
        sure: Whether it happens whenever its conditions hold, not only by a short circuit.
    """

    access: Access
    loops: tuple[For, ...]
    guards: tuple[tuple[Expr, bool], ...] = ()
    held: str = ""
    sure: bool = True


def places(loop: For, path: Path = (0,)) -> list[Place]:
    """Every access in a loop's body and in the bounds of the loops inside it."""
    return list(_body(loop.body, path, (loop,), (), ""))


def _body(body, path, loops, guards, held, offset=0) -> Iterator[Place]:
    for index, statement in enumerate(body):
        yield from _statement(statement, (*path, offset + index), loops, guards, held)


def _statement(statement: Statement, path, loops, guards, held) -> Iterator[Place]:
    def reads(expr: Expr, sure: bool = True) -> Iterator[Place]:
        for access, certain in _reads(expr, path, sure):
            plain = "" if held == "atomic" else held
            yield Place(access, loops, guards, plain, certain)

    match statement:
        case Assign(target, value, update):
            yield from reads(value)
            subscripts = target.subscripts if isinstance(target, Ref) else ()
            for subscript in subscripts:
                yield from reads(subscript)
            name = target.array if isinstance(target, Ref) else target.name
            if update:
                yield Place(Access(name, False, path, subscripts), loops, guards, held)
            yield Place(Access(name, True, path, subscripts), loops, guards, held)
        case If(condition, then, orelse):
            yield from reads(condition)
            yield from _body(then, path, loops, (*guards, (condition, True)), held)
            yield from _body(orelse, path, loops, (*guards, (condition, False)), held, len(then))
        case For(var, lower, upper, body):
            yield from reads(lower)
            yield from reads(upper)
            for write in (True, False):  # its variable, which may be shared
                yield Place(Access(var, write, path), loops, guards, held)
            yield from _body(body, path, (*loops, statement), guards, held)
        case Block(pragma, body):
            name = "atomic" if pragma.directive == "atomic" else "critical " + "".join(
                pragma.named("name")
            )  # fmt: skip
            yield from _body(body, path, loops, guards, held or name)


def _reads(expr: Expr, path: Path, sure: bool) -> Iterator[tuple[Access, bool]]:
    match expr:
        case Var(name):
            yield Access(name, False, path), sure
        case Ref(array, subscripts):
            yield Access(array, False, path, subscripts), sure
            for subscript in subscripts:
                yield from _reads(subscript, path, sure)
        case Op("&&" | "||" | "?:" | "merge", (first, *others)):
            yield from _reads(first, path, sure)
            for other in others:
                yield from _reads(other, path, False)
        case Op(_, args):
            for argument in args:
                yield from _reads(argument, path, sure)


class Names:
    """Names of a program as names that isl can read: parameters p0, p1, ..."""

    def __init__(self) -> None:
        self.parameters: dict[str, str] = {}

    def linear(self, expr: Expr, variables: dict[str, str]) -> str | None:
        """An expression in isl's notation; None if it is not linear.

        Args:
            expr: The expression.
            variables: The name of each loop's variable.
        """
        found = affine(expr)
        if found is None:
            return None
        terms = [str(found[1])]
        for name, coefficient in found[0].items():
            known = variables.get(name)
            if known is None:
                known = self.parameters.setdefault(name, f"p{len(self.parameters)}")
            terms.append(f"{coefficient}*{known}")
        return " + ".join(f"({term})" for term in terms)

    def domain(self, place: Place, prefix: str) -> tuple[str, dict[str, str], bool]:
        """An access's iterations: constraints, names of its variables, whether they are exact."""
        variables: dict[str, str] = {}
        parts, exact = [], place.sure
        for index, loop in enumerate(place.loops):
            lower, upper = (self.linear(e, variables) for e in (loop.lower, loop.upper))
            name = f"{prefix}{index}"
            variables = {**variables, loop.var: name}
            exact &= lower is not None and upper is not None
            up = loop.step > 0
            if lower is not None:
                parts.append(f"{name} {'>=' if up else '<='} {lower}")
            if upper is not None:
                parts.append(f"{name} {'<' if up else '>'} {upper}")
            if abs(loop.step) != 1 and lower is not None:
                parts.append(f"({name} - ({lower})) mod {abs(loop.step)} = 0")
        for condition, holds in place.guards:
            text, known = self.condition(condition, holds, variables)
            parts.append(f"({text})")
            exact &= known
        return " and ".join(parts) or "true", variables, exact

    def condition(self, expr: Expr, holds: bool, variables: dict[str, str]) -> tuple[str, bool]:
        """A condition, or its opposite, in isl's notation, and whether it is exact."""
        match expr:
            case Op("free"):
                return "true", True
            case Op("!", (inner,)):
                return self.condition(inner, not holds, variables)
            case Op("&&" | "||" as name, (left, right)):
                one, exact_one = self.condition(left, holds, variables)
                other, exact_other = self.condition(right, holds, variables)
                word = "and" if (name == "&&") == holds else "or"
                return f"(({one}) {word} ({other}))", exact_one and exact_other
            case Op("==" | "!=" as name, (Op("%", (value, Number(int(divisor)))), Number(0))):
                text = self.linear(value, variables)
                if text is not None and divisor > 0:
                    sign = "=" if (name == "==") == holds else "!="
                    return f"({text}) mod {divisor} {sign} 0", True
            case Op(name, (left, right)) if name in _COMPARE:
                low, high = self.linear(left, variables), self.linear(right, variables)
                if low is not None and high is not None:
                    sign = _COMPARE[name] if holds else _NEGATED[_COMPARE[name]]
                    return f"{low} {sign} {high}", True
        return "true", False
