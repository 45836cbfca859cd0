"""The names of a C file: macros, types, globals, and what each function declares.

Every doubt makes a name "other" with its reason, so that a loop which uses it is left unjudged.
"""

from __future__ import annotations

import re
from typing import Any

from jaxfm.tasks.hpc.frontend.c_declarations import declared
from jaxfm.tasks.hpc.frontend.c_scope import (
    File,
    Function,
    Macro,
    basic_type,
    inside,
    number,
    plain,
)
from jaxfm.tasks.hpc.frontend.names import Symbol, Type
from jaxfm.tasks.hpc.frontend.source import Source, nodes, text_of


def read_file(source: Source) -> File:
    """The macros, types, functions and globals of a file."""
    functions = {text_of(n) for n in nodes(source, _FUNCTION_NAMES)}
    file = File(_macros(source), {}, frozenset(functions), {})
    for node in nodes(source, "(type_definition) @x"):
        kind = basic_type(file, node)
        for child in node.children_by_field_name("declarator"):
            name = text_of(child)
            plain = child.type in ("type_identifier", "primitive_type")
            known = kind if plain else Type(why="is of a derived type")
            if name in file.types and file.types[name] != known:
                known = Type(why="is of a type that is defined twice")
            file.types[name] = known
    for node in nodes(source, "(translation_unit (declaration) @x)") + nodes(
        source, "(preproc_ifdef (declaration) @x) (preproc_if (declaration) @x) "
        "(preproc_else (declaration) @x) (preproc_elif (declaration) @x)"
    ):  # fmt: skip
        if inside(node, ("function_definition",)) is None:
            for symbol in declared(file, node, None):
                file.globals.setdefault(symbol.name, []).append(symbol)
    for node in nodes(source, "(enumerator name: (identifier) @x)"):
        file.globals.setdefault(text_of(node), []).append(
            Symbol(text_of(node), "other", why="is a constant of an enumeration", node=node)
        )
    return file


_FUNCTION_NAMES = "(function_declarator declarator: (identifier) @x)"


def read_function(source: Source, file: File, node: Any) -> Function:
    """What a function declares and where it uses each name."""
    uses: dict[str, tuple[list[int], list[Any]]] = {}
    for use in nodes(source, "(identifier) @x", node):
        starts, places = uses.setdefault(text_of(use), ([], []))
        starts.append(use.start_byte)
        places.append(use)
    symbols: dict[str, list[Symbol]] = {}
    own = node.child_by_field_name("declarator")
    names = [n for n in nodes(source, _FUNCTION_NAMES, node) if own is not None]
    function = Function(
        node, text_of(names[0]) if names else "", symbols, uses,
        bool(nodes(source, "(labeled_statement) @x (goto_statement) @x", node)),
        *_changes(source, node),
    )  # fmt: skip
    for child in nodes(source, "(declaration) @x (parameter_declaration) @x", node):
        inner = inside(child, ("parameter_list", "compound_statement", "field_declaration_list"))
        if child.type == "parameter_declaration":
            heads = inside(child, ("function_declarator",))
            if own is None or heads is None or inside(heads, ("declaration",)) is not None:
                continue
            if inside(heads, ("parameter_list", "field_declaration_list")) is not None:
                continue
        elif inner is not None and inner.type == "field_declaration_list":
            continue
        for symbol in declared(file, child, function):
            symbols.setdefault(symbol.name, []).append(symbol)
    return function


def _changes(source: Source, node: Any) -> tuple[dict, dict, frozenset[str]]:
    """Where names are written, what they are assigned, and whose address is taken."""
    writes: dict[str, list[int]] = {}
    values: dict[str, list[Any]] = {}
    taken = set()
    for change in nodes(source, "(assignment_expression) @x (update_expression) @x", node):
        step = change.type == "update_expression"
        target = plain(change.child_by_field_name("argument" if step else "left"))
        if target is not None and target.type == "identifier":
            writes.setdefault(text_of(target), []).append(target.start_byte)
            right = None if step else change.child_by_field_name("right")
            values.setdefault(text_of(target), []).append(right)
    for pointer in nodes(source, "(pointer_expression) @x", node):
        inner = plain(pointer.child_by_field_name("argument"))
        if pointer.child(0).type == "&" and inner is not None and inner.type == "identifier":
            taken.add(text_of(inner))
    return {name: sorted(places) for name, places in writes.items()}, values, frozenset(taken)


def resolve(file: File, function: Function, name: str, at: int) -> Symbol | None:
    """What a name stands for at a byte; None if nothing is known of it."""
    seen = [
        s
        for s in function.symbols.get(name, ())
        if s.scope[0] <= at <= s.scope[1] and (s.place == "parameter" or s.node.end_byte <= at)
    ]
    if not seen:
        seen = [s for s in file.globals.get(name, ()) if s.node.end_byte <= at]
        if len({s[:11] for s in seen}) > 1:
            return Symbol(name, "other", why="is declared in several ways")
        return seen[-1] if seen else None
    inner = max(s.scope[0] for s in seen)
    seen = [s for s in seen if s.scope[0] == inner]
    return seen[0] if len(seen) == 1 else Symbol(name, "other", why="is declared in several ways")


def _macros(source: Source) -> dict[str, Macro]:
    found: dict[str, Macro] = {}
    guards = ("preproc_if", "preproc_ifdef", "preproc_else", "preproc_elif")
    for node in nodes(source, "(preproc_def) @x (preproc_function_def) @x"):
        name = text_of(node.child_by_field_name("name"))
        value = node.child_by_field_name("value")
        text = "" if value is None else re.sub(r"/\*.*?\*/|//.*", "", text_of(value)).strip()
        certain = name not in found and inside(node, guards) is None
        plain = node.type == "preproc_def"
        restrict = plain and text in ("restrict", "__restrict", "__restrict__")
        why = "restrict" if name == "restrict" and restrict and name not in found else "is a macro"
        number_ = number(text) if plain else None
        if name in found and found[name].value is None:
            number_ = None
        found[name] = Macro(number_, certain, why)
    for node in nodes(source, "(preproc_call) @x"):
        words = text_of(node).split()
        if words[:1] == ["#undef"] and len(words) > 1:
            found[words[1]] = Macro(None, False, "is a macro")
    return found
