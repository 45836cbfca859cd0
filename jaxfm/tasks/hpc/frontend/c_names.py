"""The names of a C file: macros, types, globals, and what each function declares.

Every doubt makes a name "other" with its reason, so that a loop which uses it is left unjudged.
"""

from __future__ import annotations

import bisect
import contextlib
import re
from typing import Any, NamedTuple

from jaxfm.tasks.hpc.frontend.names import C_TYPES, Symbol, Type
from jaxfm.tasks.hpc.frontend.source import Source, nodes, text_of
from jaxfm.tasks.hpc.program import Expr, Number, Op, Var

_DECLARATORS = (
    "identifier", "pointer_declarator", "array_declarator", "init_declarator",
    "function_declarator", "parenthesized_declarator", "attributed_declarator",
)  # fmt: skip
_SCOPES = ("compound_statement", "for_statement", "function_definition", "translation_unit")
_FRESH = frozenset(("malloc", "calloc", "aligned_alloc"))


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
        if _inside(node, ("function_definition",)) is None:
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
        inner = _inside(child, ("parameter_list", "compound_statement", "field_declaration_list"))
        if child.type == "parameter_declaration":
            heads = _inside(child, ("function_declarator",))
            if own is None or heads is None or _inside(heads, ("declaration",)) is not None:
                continue
            if _inside(heads, ("parameter_list", "field_declaration_list")) is not None:
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
        target = _plain(change.child_by_field_name("argument" if step else "left"))
        if target is not None and target.type == "identifier":
            writes.setdefault(text_of(target), []).append(target.start_byte)
            right = None if step else change.child_by_field_name("right")
            values.setdefault(text_of(target), []).append(right)
    for pointer in nodes(source, "(pointer_expression) @x", node):
        inner = _plain(pointer.child_by_field_name("argument"))
        if pointer.child(0).type == "&" and inner is not None and inner.type == "identifier":
            taken.add(text_of(inner))
    return {name: sorted(places) for name, places in writes.items()}, values, frozenset(taken)


def _plain(node: Any) -> Any:
    """A node without brackets around it."""
    while node is not None and node.type == "parenthesized_expression":
        node = next((c for c in node.named_children if c.type != "comment"), None)
    return node


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
    outer = _inside(node, _SCOPES)
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
    initial, dimensions, pointers, restrict, grouped = None, [], 0, False, False
    while node is not None and node.type != "identifier":
        if node.type == "function_declarator":
            name = nodes_named(node)
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
        place=place,
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
        memory=memory,
        place=place,
    )  # type: ignore[arg-type]


def nodes_named(node: Any) -> str:
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
        return Number(known[0].value) if len(known) == 1 and known[0].kind == "constant" else None
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


def written_after(function: Function, name: str, at: int) -> bool:
    """Whether a variable may be written after a byte, in the order of the text, or by pointer."""
    if function.jumps or _taken(function, name):
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


def _macros(source: Source) -> dict[str, Macro]:
    found: dict[str, Macro] = {}
    guards = ("preproc_if", "preproc_ifdef", "preproc_else", "preproc_elif")
    for node in nodes(source, "(preproc_def) @x (preproc_function_def) @x"):
        name = text_of(node.child_by_field_name("name"))
        value = node.child_by_field_name("value")
        text = "" if value is None else re.sub(r"/\*.*?\*/|//.*", "", text_of(value)).strip()
        certain = name not in found and _inside(node, guards) is None
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


def _inside(node: Any, kinds: tuple[str, ...]) -> Any:
    """The innermost ancestor of one of some kinds; None without one."""
    node = node.parent
    while node is not None and node.type not in kinds:
        node = node.parent
    return node
