"""The names of a Fortran file: what each program unit declares, by type or implicitly."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from jaxfm.tasks.hpc.frontend.names import FORTRAN_FUNCTIONS, Symbol, Type
from jaxfm.tasks.hpc.frontend.source import Source, nodes, text_of
from jaxfm.tasks.hpc.program import Expr, Number, Op, Var

UNITS = ("subroutine", "function", "program", "module", "submodule")
_EXPRESSIONS = (
    "math_expression", "relational_expression", "logical_expression", "unary_expression",
    "parenthesized_expression", "extent_specifier", "size", "loop_control_expression",
    "parameters", "variable_declaration", "sized_declarator",
)  # fmt: skip
_TYPES = {
    "real": Type("double"), "doubleprecision": Type("double"), "integer": Type("int", 32),
    "logical": Type("int", 8),
}  # fmt: skip


class Unit(NamedTuple):
    """A program unit.

    Attributes:
        node: Of the syntax tree.
        name: In lower case.
        symbols: What it declares, by name in lower case.
        uses: Every identifier in it, by name in lower case, in the order of the text.
        implicit: Whether undeclared names have the types of their first letters.
        unclear: Why an undeclared name may come from elsewhere; "" if it cannot.
        host: The unit around it.
        parameters: The names of its dummy arguments.
        shares: Whether procedures inside it may read its variables.
    """

    node: Any
    name: str
    symbols: dict[str, Symbol]
    uses: dict[str, list[Any]]
    implicit: bool
    unclear: str
    host: Unit | None
    parameters: frozenset[str]
    shares: bool


def lower(node: Any) -> str:
    """The text of a node in lower case."""
    return text_of(node).lower()


def number(text: str) -> int | float | None:
    """The value of a numeric literal of Fortran; None if it is none."""
    text = re.sub(r"_\w+$", "", text.strip().lower())
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([ed][+-]?\d+)?", text):
        return float(text.replace("d", "e"))
    return None


def read_unit(source: Source, node: Any, host: Unit | None) -> Unit:
    """What a program unit declares."""
    uses: dict[str, list[Any]] = {}
    for use in nodes(source, "(identifier) @x", node):
        uses.setdefault(lower(use), []).append(use)
    head = node.named_child(0)
    names = [c for c in head.named_children if c.type == "name"]
    texts = [lower(c) for c in node.named_children if c.type == "implicit_statement"]
    clear = [
        c.type for c in node.named_children if c.type in ("use_statement", "include_statement")
    ]
    dummies = [c for c in head.named_children if c.type == "parameters"]
    unit = Unit(
        node, lower(names[0]) if names else "", {}, uses,
        implicit=not texts and (host is None or host.implicit),
        unclear="may come from a module or an included file" if clear else (
            "is of a type that an IMPLICIT statement gives" if any("none" not in t for t in texts)
            else ""
        ),
        host=host,
        parameters=frozenset(lower(c) for d in dummies for c in d.named_children),
        shares=any(c.type == "internal_procedures" for c in node.named_children),
    )  # fmt: skip
    for child in node.named_children:
        if child.type == "variable_declaration":
            _declare(unit, child)
        elif child.type in ("variable_modification", "common_statement", "dimension_statement"):
            _modify(unit, child)
        elif child.type in ("equivalence_statement", "namelist_statement", "external_statement"):
            for name in _identifiers(child):
                _spoil(unit, name, "is in a statement that ties it to others")
        elif child.type == "save_statement":
            for name in list(unit.symbols):
                unit.symbols[name] = unit.symbols[name]._replace(place="static")
        elif child.type == "parameter_statement":
            _parameters(unit, child)
        elif child.type in ("interface", "import_statement", "derived_type_definition"):
            for name in _identifiers(child):
                _spoil(unit, name, "is in an interface or a type")
    return unit


def resolve(unit: Unit, name: str) -> Symbol | None:
    """What a name stands for in a unit; None if nothing is known of it."""
    found: Unit | None = unit
    while found is not None:
        if name in found.symbols:
            symbol = found.symbols[name]
            if found is not unit and symbol.kind in ("scalar", "array"):
                symbol = symbol._replace(place="global")
            return symbol
        if found.name == name:
            return Symbol(name, "other", why="is the name of a procedure")
        if found.unclear:
            return Symbol(name, "other", why=found.unclear)
        found = found.host
    if not unit.implicit:
        return None
    kind = Type("int", 32) if name[0] in "ijklmn" else Type("double")
    place = "parameter" if name in unit.parameters else "local"
    return Symbol(name, "scalar", kind.dtype, kind.bits, place=place, memory="restrict")  # type: ignore[arg-type]


def _declare(unit: Unit, node: Any) -> None:
    """The names of a type declaration."""
    words = [lower(c).replace(" ", "") for c in node.children if c.type == "type_qualifier"]
    kind = _type(node.child_by_field_name("type"))
    if {"volatile", "asynchronous"} & set(words):
        kind = Type(why="is volatile")
    shape = None
    for child in node.children:
        if child.type == "type_qualifier" and lower(child).startswith("dimension"):
            shape = next((c for c in child.named_children if c.type == "argument_list"), None)
    for child in node.children_by_field_name("declarator"):
        name, size, initial = _parts(child)
        if name is None:
            continue
        text = lower(name)
        if kind.why:
            unit.symbols[text] = Symbol(text, "other", why=kind.why)
            continue
        symbol = Symbol(
            text,
            "scalar",
            kind.dtype,
            kind.bits,
            place=_place(unit, text, words, initial),  # type: ignore[arg-type]
            memory="pointer" if {"pointer", "target"} & set(words) else "restrict",
            taken=bool({"pointer", "target"} & set(words)),
            node=None,
        )  # type: ignore[arg-type]
        if "intent(in)" in words:
            symbol = symbol._replace(why="intent(in)")
        if "parameter" in words:
            value = None if initial is None else number(lower(initial))
            known = isinstance(value, int) and kind.bits
            symbol = symbol._replace(kind="constant", value=value) if known else Symbol(
                text, "other", why="is a constant whose value is not read"
            )  # fmt: skip
        elif "external" in words:
            symbol = Symbol(text, "other", why="is a procedure")
        elif "pointer" in words and size is None and shape is None:
            symbol = Symbol(text, "other", why="is a pointer")
        old = unit.symbols.get(text)
        if old is not None:  # a COMMON or DIMENSION statement has come before
            symbol = symbol._replace(kind=old.kind, shape=old.shape, lower=old.lower,
                                     place=old.place, why=old.why)  # fmt: skip
        unit.symbols[text] = symbol
        if size is not None or shape is not None:
            _shaped(unit, text, size if size is not None else shape)


def _place(unit: Unit, name: str, words: list[str], initial: Any) -> str:
    if name in unit.parameters:
        return "parameter"
    if unit.node.type in ("module", "submodule"):
        return "global"
    return "static" if "save" in words or initial is not None else "local"


def _type(node: Any) -> Type:
    """A type by its words; the kind of an integer tells its bits."""
    text = re.sub(r"\s+", "", lower(node)) if node is not None else ""
    match = re.fullmatch(
        r"(real|doubleprecision|integer|logical)(?:\*(\d+)|\((?:kind=)?(\w+)\))?", text
    )
    if match is None:
        return Type(why=f"is of the type {text[:40] or 'nothing'}")
    kind = _TYPES[match[1]]
    if match[1] == "integer":
        size = match[2] or match[3] or "4"
        bits = {"1": 8, "2": 16, "8": 64, "int64": 64, "int8": 8, "int16": 16}.get(size, 32)
        return Type("long" if bits == 64 else "int", bits)
    return kind


def _parts(node: Any) -> tuple[Any, Any, Any]:
    """The identifier, the size and the initial value of a declarator."""
    initial, size = None, None
    if node.type in ("init_declarator", "pointer_init_declarator"):
        initial = node.child_by_field_name("right")
        node = node.child_by_field_name("left")
    if node is not None and node.type == "sized_declarator":
        size = next((c for c in node.named_children if c.type == "size"), None)
        node = next((c for c in node.named_children if c.type == "identifier"), None)
    return (node if node is not None and node.type == "identifier" else None), size, initial


def _modify(unit: Unit, node: Any) -> None:
    """DIMENSION, COMMON, POINTER, EXTERNAL and the like, for names by themselves."""
    words = lower(node).split()[0] if lower(node) else ""
    for child in _of_types(node, ("sized_declarator", "identifier")):
        name, size, _ = _parts(child)
        if name is None:
            continue
        text = lower(name)
        if not words.startswith(
            ("dimension", "common", "save", "intent", "allocatable", "integer")
        ):
            _spoil(unit, text, f"is in a statement {words.rstrip('(:,').upper()}")
            continue
        if text not in unit.symbols:
            kind = Type("int", 32) if text[0] in "ijklmn" else Type("double")
            unit.symbols[text] = Symbol(
                text, "scalar", kind.dtype, kind.bits, memory="restrict",
                place="parameter" if text in unit.parameters else "local",
            )  # fmt: skip
        if words.startswith(("common", "save")):
            unit.symbols[text] = unit.symbols[text]._replace(place="global")
        if size is not None:
            _shaped(unit, text, size)


def _parameters(unit: Unit, node: Any) -> None:
    """The constants of a PARAMETER statement."""
    for child in node.named_children:
        name, value = child.named_child(0), child.named_child(1)
        if name is None:
            continue
        text, found = lower(name), None if value is None else number(lower(value))
        symbol = unit.symbols.get(text)
        integer = symbol.bits > 0 if symbol is not None else text[:1] in "ijklmn"
        if isinstance(found, int) and integer:
            unit.symbols[text] = Symbol(text, "constant", "int", 32, value=found)
        else:
            _spoil(unit, text, "is a constant whose value is not read")


def _shaped(unit: Unit, name: str, size: Any) -> None:
    """Makes a name an array with the extents that a list of dimensions gives."""
    shape: list[Expr | None] = []
    first: list[Expr | None] = []
    for child in size.named_children:
        low, high = _dimension(unit, child)
        first.append(low)
        shape.append(None if low is None or high is None else _extent(low, high))
    symbol = unit.symbols[name]
    if symbol.kind in ("scalar", "array") and shape:
        unit.symbols[name] = symbol._replace(kind="array", shape=tuple(shape), lower=tuple(first))


def _extent(low: Expr, high: Expr) -> Expr:
    if isinstance(low, Number) and isinstance(high, Number):
        return Number(int(high.value) - int(low.value) + 1)
    if low == Number(1):
        return high
    return Op("+", (Op("-", (high, low)), Number(1)))


def _dimension(unit: Unit, node: Any) -> tuple[Expr | None, Expr | None]:
    """The first and the last index of a dimension; None where they are not known."""
    if node.type != "extent_specifier":
        return Number(1), _kept(unit, node)
    parts = node.named_children
    text = text_of(node)
    if text.strip().startswith(":"):
        return Number(1), None
    low = _kept(unit, parts[0]) if parts else None
    return low, (_kept(unit, parts[1]) if len(parts) > 1 else None)


def _kept(unit: Unit, node: Any) -> Expr | None:
    """A bound of a dimension as an expression of variables that keep their values."""
    value = number(text_of(node))
    if isinstance(value, int):
        return Number(value)
    if node.type == "parenthesized_expression":
        return _kept(unit, node.named_child(0))
    if node.type == "math_expression" and text_of(node.child(1)) in ("+", "-", "*"):
        left, right = _kept(unit, node.child(0)), _kept(unit, node.child(2))
        if left is None or right is None:
            return None
        return Op(text_of(node.child(1)), (left, right))
    if node.type != "identifier":
        return None
    name = lower(node)
    symbol = resolve(unit, name)
    if symbol is not None and symbol.kind == "constant" and isinstance(symbol.value, int):
        return Number(symbol.value)
    if name in unit.parameters or (symbol is not None and symbol.kind == "scalar"):
        return Var(name) if _stays(unit, name) else None
    return None


def _stays(unit: Unit, name: str) -> bool:
    """Whether no statement of a unit may change a variable."""
    symbol = unit.symbols.get(name)
    if symbol is not None and symbol.why == "intent(in)":
        return True
    for use in unit.uses.get(name, ()):
        parent = use.parent
        if parent.type == "loop_control_expression" and parent.named_child(0) == use:
            return False
        if parent.type == "argument_list":
            callee = parent.parent.named_child(0) if parent.parent is not None else None
            known = "" if callee is None else lower(callee)
            array = unit.symbols.get(known)
            if parent.parent.type == "call_expression" and (
                known in FORTRAN_FUNCTIONS or (array is not None and array.kind == "array")
            ):
                continue
            if parent.parent.type == "type_qualifier":
                continue
            return False
        if parent.type not in _EXPRESSIONS:
            return False
    return True


def _spoil(unit: Unit, name: str, why: str) -> None:
    unit.symbols[name] = Symbol(name, "other", why=why)


def _identifiers(node: Any) -> list[str]:
    return [lower(n) for n in _of_types(node, ("identifier", "name"))]


def _of_types(node: Any, kinds: tuple[str, ...]) -> list[Any]:
    """The outermost nodes of some kinds under a node."""
    found = []
    for child in node.named_children:
        found += [child] if child.type in kinds else _of_types(child, kinds)
    return found
