"""Declarations of C: the symbols that they declare, extents and memory of arrays included."""

from __future__ import annotations

from typing import Any

from jaxfm.tasks.hpc.frontend.c_scope import (
    File,
    Function,
    basic_type,
    inside,
    number,
    written_after,
)
from jaxfm.tasks.hpc.frontend.names import Symbol, Type
from jaxfm.tasks.hpc.frontend.source import text_of
from jaxfm.tasks.hpc.program import Expr, Number, Op, Var

_DECLARATORS = (
    "identifier", "pointer_declarator", "array_declarator", "init_declarator",
    "function_declarator", "parenthesized_declarator", "attributed_declarator",
)  # fmt: skip


_SCOPES = ("compound_statement", "for_statement", "function_definition", "translation_unit")


_FRESH = frozenset(("malloc", "calloc", "aligned_alloc"))


def declared(file: File, node: Any, function: Function | None) -> list[Symbol]:
    """The names that a declaration declares."""
    kind = basic_type(file, node)
    specifiers = {text_of(c) for c in node.children if c.type == "storage_class_specifier"}
    qualifiers = {text_of(c) for c in node.children if c.type == "type_qualifier"}
    if specifiers & {"_Thread_local", "__thread", "thread_local"}:
        kind = Type(why="is of each thread")
    place = "global" if function is None or "extern" in specifiers else "local"
    if node.type == "parameter_declaration" or (
        function is not None and node.parent.type == "function_definition"
    ):
        place = "parameter"
    if place == "local" and "static" in specifiers:
        place = "static"
    outer = inside(node, _SCOPES)
    scope = (outer.start_byte, outer.end_byte) if outer is not None else (0, 1 << 62)
    found = []
    for child in node.children_by_field_name("declarator"):
        symbol = _declarator(file, child, kind, place, function)
        if symbol is None:
            continue
        if "const" in qualifiers and symbol.kind == "scalar" and child.type == "init_declarator":
            value = number(text_of(child.child_by_field_name("value")))
            if isinstance(value, int) and symbol.bits >= 32:
                symbol = symbol._replace(kind="constant", value=value)
        found.append(symbol._replace(node=node, scope=scope))
    return found


def _declarator(file, node, kind: Type, place: str, function) -> Symbol | None:
    """The symbol that one declarator declares."""
    dimensions: list[Any] = []
    initial, pointers, restrict, grouped = None, 0, False, False
    while node is not None and node.type != "identifier":
        if node.type == "function_declarator":
            name = _function_name(node)
            return Symbol(name, "other", why="is a function") if name else None
        if node.type == "init_declarator":
            initial = node.child_by_field_name("value")
        elif node.type == "pointer_declarator":
            pointers += 1
            words = {text_of(c) for c in node.children if c.type == "type_qualifier"}
            restrict |= bool(words & {"restrict", "__restrict", "__restrict__"})
            if words & {"volatile", "_Atomic"}:
                kind = Type(why="is volatile")
            grouped |= bool(dimensions)  # (*a)[n]: a pointer to rows
        elif node.type == "array_declarator":
            qualified = {text_of(c) for c in node.children if c.type == "type_qualifier"}
            restrict |= "restrict" in qualified
            dimensions.insert(0, node.child_by_field_name("size"))
            if pointers and not grouped:
                kind = Type(why="is an array of pointers")
        elif node.type != "parenthesized_declarator":
            return None
        inner = node.child_by_field_name("declarator")
        if inner is None:
            inner = next((c for c in node.children if c.type in _DECLARATORS), None)
        node = inner
    if node is None:
        return None
    name = text_of(node)
    restrict &= file.macros.get("restrict") is None or file.macros["restrict"].why == "restrict"
    if kind.why:
        return Symbol(name, "other", why=kind.why, place=place)  # type: ignore[arg-type]
    base = Symbol(
        name,
        "scalar",
        kind.dtype,
        kind.bits,
        kind.signed,
        place=place,  # type: ignore[arg-type]
        taken=_taken(function, name),
    )  # type: ignore[arg-type]
    if place == "global":
        base = base._replace(taken=True)
    if not dimensions and not pointers:
        return base
    if pointers > 1 or (pointers and dimensions and not grouped):
        return base._replace(kind="other", why="is an array of pointers")
    shape = [_extent(file, function, size) for size in dimensions]
    memory = "own"
    if pointers:
        shape = [None, *shape]
    if pointers or place == "parameter":
        shape[0] = None
        # A local pointer may have been set to what another one reaches, whatever it promises.
        memory = "restrict" if restrict and place in ("parameter", "global") else "pointer"
        if place == "parameter" and _reassigned(function, name):
            memory, place = "pointer", "local"  # it may come to point to anything
        elif place != "parameter" and _fresh(file, function, name, initial):
            memory = "own"
    return base._replace(
        kind="array",
        shape=tuple(shape),
        lower=(Number(0),) * len(shape),
        memory=memory,  # type: ignore[arg-type]
        place=place,  # type: ignore[arg-type]
    )


def _function_name(node: Any) -> str:
    """The name that a function's declarator declares; "" if it is a pointer to a function."""
    inner = node.child_by_field_name("declarator")
    return text_of(inner) if inner is not None and inner.type == "identifier" else ""


def _extent(file: File, function: Function | None, node: Any) -> Expr | None:
    """An extent as an expression of variables that keep their values; None if it is not known."""
    if node is None:
        return None
    text = text_of(node)
    value = number(text)
    if isinstance(value, int):
        return Number(value)
    if node.type == "parenthesized_expression":
        return _extent(file, function, node.named_child(0))
    if node.type == "binary_expression" and node.child(1).type in ("+", "-", "*"):
        left, right = (_extent(file, function, node.child(k)) for k in (0, 2))
        return None if left is None or right is None else Op(node.child(1).type, (left, right))
    if node.type != "identifier":
        return None
    macro = file.macros.get(text)
    if macro is not None:
        if not isinstance(macro.value, int):
            return None
        return Number(macro.value) if macro.certain else Var(text)
    if function is None or text not in function.uses or len(function.symbols.get(text, ())) > 1:
        return None
    symbol = next(iter(function.symbols.get(text, ())), None)
    if symbol is None:
        known = file.globals.get(text, ())
        if len(known) != 1 or known[0].kind != "constant" or known[0].value is None:
            return None
        return Number(known[0].value)
    value = constant_value(function, symbol)
    if value is not None:
        return Number(value)
    return None if written_after(function, text, node.start_byte) else Var(text)


def constant_value(function: Function, symbol: Symbol) -> int | None:
    """The value of an integer that is initialised by a number and never written again."""
    if symbol.place != "local" or symbol.taken or symbol.node is None or function.jumps:
        return None
    if len(function.symbols.get(symbol.name, ())) != 1:
        return None
    for child in symbol.node.children_by_field_name("declarator"):
        if child.type != "init_declarator":
            continue
        if text_of(child.child_by_field_name("declarator")) != symbol.name:
            continue
        value = number(text_of(child.child_by_field_name("value")))
        if isinstance(value, int) and not written_after(function, symbol.name, child.end_byte):
            return value
    return None


def _taken(function: Function | None, name: str) -> bool:
    """Whether the address of a name is taken in the function (`&n`)."""
    return function is None or name in function.taken


def _reassigned(function: Function | None, name: str) -> bool:
    """Whether a pointer may be changed in the function."""
    return _taken(function, name) or name in function.writes  # type: ignore[union-attr]


def _fresh(file: File, function: Function | None, name: str, initial: Any) -> bool:
    """Whether a local pointer only ever holds memory of its own, from malloc."""
    if function is None or _taken(function, name) or _FRESH & (file.functions | set(file.macros)):
        return False
    values = [] if initial is None else [initial]
    values += function.values.get(name, [])
    if len(values) != 1:
        return False
    value = values[0]
    while value is not None and value.type in ("cast_expression", "parenthesized_expression"):
        value = value.child_by_field_name("value") or value.named_child(0)
    if value is None or value.type != "call_expression":
        return False
    return text_of(value.child_by_field_name("function")) in _FRESH
