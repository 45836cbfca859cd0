"""Assignments in the form in which a reduction shows: `s = s + x` becomes `s += x`."""

from __future__ import annotations

from jaxfm.tasks.hpc.program import Assign, Expr, If, Number, Op, Ref, Statement, Var

_UPDATES = {"+=": "+", "*=": "*", "|=": "|", "&=": "&", "^=": "^"}


def assignment(target: Var | Ref, operator: str, value: Expr) -> Assign:
    """An assignment as an update where it is one that can be reordered.

    Args:
        target: What is assigned.
        operator: "=", or one of C's such as "+=".
        value: The right side.
    """
    if operator in _UPDATES:
        return _update(target, value, _UPDATES[operator])
    if operator == "-=":
        return _update(target, Op("-", (Number(0), value)), "+")
    if operator != "=":
        return Assign(target, Op(operator.removesuffix("="), (target, value)))
    match value:
        case Op("+" | "*" | "min" | "max" | "|" | "&" | "^" as name, (left, right)):
            if right == target:
                return _update(target, left, name)
            rest = _without(value, target, name)
            if rest is not None:
                return _update(target, rest, name)
        case Op("-", (left, right)):
            rest = _without(value, target, "+")
            if rest is not None:
                return _update(target, rest, "+")
        case Op("?:", (Op(sign, (a, b)), one, other)):
            if (way := _extreme(sign, a, b, one, other)) and target in (a, b):
                return _update(target, b if a == target else a, way)
    return Assign(target, value)


def expanded(update: Assign) -> Assign:
    """An update as a plain assignment, which no reduction fits."""
    if not update.update:
        return update
    return Assign(update.target, Op(update.update, (update.target, update.value)))


def _update(target: Var | Ref, value: Expr, name: str) -> Assign:
    """`target = target name value`, as an update unless the value has the target in it, too."""
    update = Assign(target, value, name)
    return expanded(update) if _mentions(value, target) else update


def _mentions(expr: Expr, target: Var | Ref) -> bool:
    match expr:
        case Var(name):
            return isinstance(target, Var) and name == target.name
        case Ref(array, subscripts):
            same = isinstance(target, Ref) and array == target.array
            return same or any(_mentions(s, target) for s in subscripts)
        case Op(_, args):
            return any(_mentions(argument, target) for argument in args)
        case _:
            return False


def branch(statement: If) -> Statement:
    """`if (x > m) m = x` as an update of m by the maximum."""
    match statement:
        case If(Op(sign, (a, b)), (Assign(Var() as target, value, ""),), ()):
            one, other = value, target
            way = _extreme(sign, a, b, one, other)
            if way and target in (a, b) and target != value:
                return Assign(target, value, way)
    return statement


def _extreme(sign: str, a: Expr, b: Expr, one: Expr, other: Expr) -> str:
    """ "min" or "max" where `a sign b ? one : other` is it; else ""."""
    if sign not in ("<", "<=", ">", ">=") or {a, b} != {one, other}:
        return ""
    return "max" if (sign[0] == ">") == (one == a) else "min"


def _without(value: Expr, target: Expr, name: str) -> Expr | None:
    """A chain `target + a - b` without its first term; None if it does not begin with it."""
    match value:
        case Op(operator, (left, right)) if operator == name or (operator, name) == ("-", "+"):
            if left == target:
                return right if operator == name else Op("-", (Number(0), right))
            rest = _without(left, target, name) if name in ("+", "*") else None
            return None if rest is None else Op(operator, (rest, right))
    return None
