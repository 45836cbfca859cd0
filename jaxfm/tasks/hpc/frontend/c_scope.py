"""What a C file and its functions declare, as far as loops need it."""

from __future__ import annotations

import bisect
import contextlib
import re
from typing import Any, NamedTuple

from jaxfm.tasks.hpc.frontend.names import C_TYPES, Symbol, Type
from jaxfm.tasks.hpc.frontend.source import text_of


class Macro(NamedTuple):
    """A macro: its value if it is a number, and whether it is defined in each build."""

    value: int | float | None
    certain: bool
    why: str


class File(NamedTuple):
    """What a whole file declares.

    Attributes:
        macros: By name.
        types: The typedefs, by name.
        functions: Names of functions that the file defines or declares.
        globals: What stands outside functions, by name.
    """

    macros: dict[str, Macro]
    types: dict[str, Type]
    functions: frozenset[str]
    globals: dict[str, list[Symbol]]


class Function(NamedTuple):
    """What a function declares.

    Attributes:
        node: Of the function.
        name: Of the function.
        symbols: Its parameters and variables, by name.
        uses: Start bytes and nodes of every identifier, by name, in the order of the text.
        jumps: Whether it has labels to jump to.
        writes: Start bytes at which a name is assigned to or stepped, by name.
        values: What each name is assigned, by name.
        taken: Names whose address is taken (`&n`).
    """

    node: Any
    name: str
    symbols: dict[str, list[Symbol]]
    uses: dict[str, tuple[list[int], list[Any]]]
    jumps: bool
    writes: dict[str, list[int]]
    values: dict[str, list[Any]]
    taken: frozenset[str]


def number(text: str) -> int | float | None:
    """The value of a numeric literal of C; None if it is none."""
    bracketed = text = text.strip().replace("'", "")
    while text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    whole = re.fullmatch(r"([+-]?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)([uUlL]*)", text)
    if whole:
        digits = whole[2].lower()
        base = {"0x": 16, "0b": 2}.get(digits[:2], 8 if digits[0] == "0" else 10)
        try:
            value = int(digits, base)
        except ValueError:
            return None
        return -value if whole[1] == "-" else value
    if re.fullmatch(r"\([\d\s()+*-]{1,60}\)", bracketed) and "**" not in bracketed:
        with contextlib.suppress(SyntaxError, TypeError):  # such as (1024*1024)
            return eval(bracketed, {"__builtins__": {}})
    real = re.fullmatch(r"([+-]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?)[fFlL]?", text)
    return float(real[1]) if real else None


def plain(node: Any) -> Any:
    """A node without brackets around it."""
    while node is not None and node.type == "parenthesized_expression":
        node = next((c for c in node.named_children if c.type != "comment"), None)
    return node


def basic_type(file: File, node: Any) -> Type:
    """The type that a declaration's specifiers name, without its declarators."""
    for child in node.children:
        if child.type == "type_qualifier" and text_of(child) in ("volatile", "_Atomic"):
            return Type(why=f"is {text_of(child).strip('_').lower()}")
    kind = node.child_by_field_name("type")
    if kind is None:
        return Type(why="has no type")
    if kind.type in ("struct_specifier", "union_specifier"):
        return Type(why="is a structure")
    if kind.type == "enum_specifier":
        return Type(why="is of an enumeration")
    words = text_of(kind).split()
    if any(word in file.macros for word in words):
        return Type(why="is of a type that a macro names")
    name = " ".join(words)
    if name in file.types:
        return file.types[name]
    return C_TYPES.get(name, Type(why=f"is of the unknown type {name}"))


def written_after(function: Function, name: str, at: int) -> bool:
    """Whether a variable may be written after a byte, in the order of the text, or by pointer."""
    if function.jumps or name in function.taken:
        return True
    places = function.writes.get(name, [])
    return bisect.bisect_right(places, at) < len(places)


def written_within(function: Function, name: str, node: Any) -> bool:
    """Whether a variable is written in a part of the function."""
    places = function.writes.get(name, [])
    at = bisect.bisect_left(places, node.start_byte)
    return at < len(places) and places[at] < node.end_byte


def is_write(use: Any) -> bool:
    """Whether an identifier is assigned to, or stepped by ++ or --."""
    parent, child = use.parent, use
    while parent is not None and parent.type == "parenthesized_expression":
        parent, child = parent.parent, parent
    if parent is None:
        return False
    if parent.type == "assignment_expression":
        return parent.child_by_field_name("left") == child
    return parent.type == "update_expression"


def inside(node: Any, kinds: tuple[str, ...]) -> Any:
    """The innermost ancestor of one of some kinds; None without one."""
    node = node.parent
    while node is not None and node.type not in kinds:
        node = node.parent
    return node
