"""Expressions of C: one node of the syntax tree at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxfm.tasks.hpc.frontend.building import Building, names_of
from jaxfm.tasks.hpc.frontend.c_declarations import constant_value
from jaxfm.tasks.hpc.frontend.c_names import resolve
from jaxfm.tasks.hpc.frontend.c_scope import File, Function, number
from jaxfm.tasks.hpc.frontend.names import C_FUNCTIONS, C_TYPES, Symbol
from jaxfm.tasks.hpc.frontend.source import Outside, Source, line_of, text_of
from jaxfm.tasks.hpc.program import Expr, Number, Op, Ref, affine

EXPRESSIONS = {
    "field_expression": "uses a member of a structure", "string_literal": "uses a string",
    "sizeof_expression": "uses sizeof", "comma_expression": "uses the comma operator",
    "assignment_expression": "assigns inside an expression",
    "update_expression": "assigns inside an expression", "offsetof_expression": "uses offsetof",
    "compound_literal_expression": "uses a compound literal", "null": "uses a null pointer",
}  # fmt: skip
_DEEPEST = 60


@dataclasses.dataclass
class CExpressions:
    """Lowers the expressions of one loop of a function.

    Attributes:
        file, function: What they declare.
        loop: The node of the loop.
        building: What is found.
        source: The file.
        directives: Where the directives begin that have been read.
    """

    file: File
    function: Function
    loop: Any
    building: Building
    source: Source
    directives: set[int] = dataclasses.field(default_factory=set)

    def symbol(self, name: str, node: Any, at: int | None = None) -> Symbol:
        """What a name stands for at a node, or at a byte."""
        macro = self.file.macros.get(name)
        if macro is not None:
            if macro.value is None or name in self.function.symbols or name in self.file.globals:
                raise Outside(f"Line {line_of(node)} uses {name}, which is a macro.")
            if macro.certain:
                return Symbol(name, "constant", value=macro.value)
            if isinstance(macro.value, float):
                return Symbol(name, "scalar", place="global")
            size = Symbol(name, "scalar", "long", 64, place="static")
            return self.building.use(name, size, line_of(node), inner=False)
        found = resolve(self.file, self.function, name, node.start_byte if at is None else at)
        if found is not None and found.kind == "constant":
            return found
        moved = name in self.function.writes  # a pointer that may come to point to anything
        if found is not None and found.kind == "array" and found.memory != "own" and moved:
            found = found._replace(memory="pointer", place="local")
        if found is not None and found.kind == "scalar" and found.bits:
            value = constant_value(self.function, found)
            if value is not None:
                return found._replace(kind="constant", value=value)
        inside = found is not None and found.node is not None and (
            self.loop.start_byte <= found.node.start_byte < self.loop.end_byte
        )  # fmt: skip
        if inside and found is not None and found.place != "local":
            raise Outside(f"Line {line_of(node)} uses {name}, which is static in the loop.")
        return self.building.use(name, found, line_of(node), inner=inside)

    def expr(self, node: Any, depth: int = 0) -> Expr:
        """An expression without side effects."""
        line, kind = line_of(node), node.type
        if depth > _DEEPEST:
            raise Outside(f"Line {line} has an expression that is nested too deeply.")
        inner = lambda child: self.expr(child, depth + 1)
        if kind == "parenthesized_expression":
            children = [c for c in node.named_children if c.type != "comment"]
            return inner(children[0])
        if kind == "number_literal":
            return self._number(node, line)
        if kind in ("true", "false"):
            return Number(int(kind == "true"))
        if kind == "char_literal":
            return Op("opaque", ())
        if kind == "identifier":
            return self._name(node, line)
        if kind == "binary_expression":
            left, right = (node.child_by_field_name(f) for f in ("left", "right"))
            return Op(text_of(node.child_by_field_name("operator")), (inner(left), inner(right)))
        if kind == "unary_expression":
            operator = text_of(node.child_by_field_name("operator"))
            value = inner(node.child_by_field_name("argument"))
            return value if operator == "+" else Op(operator, (value,))
        if kind == "conditional_expression":
            parts = [
                node.child_by_field_name(f) for f in ("condition", "consequence", "alternative")
            ]
            if None in parts:
                raise Outside(f"Line {line} has a conditional expression without a middle.")
            return Op("?:", tuple(map(inner, parts)))
        if kind == "subscript_expression":
            return self._element(node, depth, line)
        if kind == "pointer_expression":
            return self._pointed(node, depth, line)
        if kind == "cast_expression":
            return self._cast(node, inner(node.child_by_field_name("value")), line)
        if kind == "call_expression":
            return self._call(node, inner, line)
        raise Outside(f"Line {line} {EXPRESSIONS.get(kind, 'has an expression that is not read')}.")

    def _number(self, node: Any, line: int) -> Expr:
        text = text_of(node)
        value = number(text)
        if value is None:
            raise Outside(f"Line {line} has the number {text}, which is not read.")
        if isinstance(value, int) and "u" in text.lower().removeprefix("0x"):
            return Op("opaque", (Number(value),))  # it makes its neighbors unsigned
        return Number(value)

    def _name(self, node: Any, line: int) -> Expr:
        name = text_of(node)
        if name in self.building.alias:
            self.symbol(name, node)
            return self.building.alias[name]
        symbol = self.symbol(name, node)
        if symbol.kind == "constant":
            assert symbol.value is not None
            return Number(symbol.value)
        if symbol.kind == "array":
            raise Outside(f"Line {line} uses the pointer {name} itself.")
        return self.building.read(name, line)

    def _element(self, node: Any, depth: int, line: int) -> Ref:
        indices: list[Expr] = []
        while node.type == "subscript_expression":
            indices.insert(0, self.expr(node.child_by_field_name("index"), depth + 1))
            node = node.child_by_field_name("argument")
            while node.type == "parenthesized_expression":
                node = node.named_child(0)
        if node.type != "identifier":
            raise Outside(f"Line {line} {EXPRESSIONS.get(node.type, 'indexes an expression')}.")
        return self._reference(node, tuple(indices), line)

    def _reference(self, node: Any, indices: tuple[Expr, ...], line: int) -> Ref:
        name = text_of(node)
        symbol = self.symbol(name, node)
        if symbol.kind != "array" or len(symbol.shape) != len(indices):
            raise Outside(f"Line {line} indexes {name} in another way than it is declared.")
        if name in self.building.local:
            raise Outside(f"Line {line} uses {name}, an array that is declared in the loop.")
        return Ref(name, indices)

    def _pointed(self, node: Any, depth: int, line: int) -> Ref:
        """`*p` or `*(p + e)` as an element of p."""
        if text_of(node.child_by_field_name("operator")) != "*":
            raise Outside(f"Line {line} takes an address.")
        inner = node.child_by_field_name("argument")
        while inner.type == "parenthesized_expression":
            inner = inner.named_child(0)
        if inner.type == "identifier":
            return self._reference(inner, (Number(0),), line)
        if inner.type == "binary_expression" and inner.child(1).type in ("+", "-"):
            base, offset = inner.child_by_field_name("left"), inner.child_by_field_name("right")
            if base.type == "identifier":
                value = self.expr(offset, depth + 1)
                if inner.child(1).type == "-":
                    value = Op("-", (Number(0), value))
                return self._reference(base, (value,), line)
        raise Outside(f"Line {line} follows a pointer that is computed.")

    def _cast(self, node: Any, value: Expr, line: int) -> Expr:
        kind = node.child_by_field_name("type")
        name = " ".join(text_of(kind).split())
        known = self.file.types.get(name) or C_TYPES.get(name)
        if known is None or known.why or name in self.file.macros:
            raise Outside(f"Line {line} casts to {name}, which is not read.")
        wide = known.bits == 64 or (known.bits == 32 and known.signed)
        names = [self.building.symbols.get(x) for x in names_of(value)]
        signed = all(s is None or (s.signed and 0 < s.bits <= (known.bits or 64)) for s in names)
        if wide and signed and affine(value) is not None:
            return value
        return Op("cast", (value,))

    def _call(self, node: Any, inner: Any, line: int) -> Expr:
        function = node.child_by_field_name("function")
        name = text_of(function)
        shadowed = name in self.file.macros or self._is_own(name)
        if function.type != "identifier" or shadowed or name not in C_FUNCTIONS:
            raise Outside(f"Line {line} calls {name[:60]}, whose effects are not known.")
        arguments = node.child_by_field_name("arguments").named_children
        return Op(C_FUNCTIONS[name], tuple(inner(c) for c in arguments if c.type != "comment"))

    def _is_own(self, name: str) -> bool:
        """Whether the file has its own function or variable of a name."""
        own = name in self.file.functions or name in self.file.globals
        return own or name in self.function.symbols
