"""Loops of C as programs: statements and expressions, one node of the syntax tree at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxfm.tasks.hpc.frontend.building import DEEPEST, Building, names_of
from jaxfm.tasks.hpc.frontend.c_names import (
    File,
    Function,
    constant_value,
    number,
    resolve,
    written_within,
)
from jaxfm.tasks.hpc.frontend.names import C_FUNCTIONS, C_TYPES, Symbol
from jaxfm.tasks.hpc.frontend.pragmas import parse_pragma
from jaxfm.tasks.hpc.frontend.reductions import assignment, branch
from jaxfm.tasks.hpc.frontend.source import Outside, Source, line_of, text_of
from jaxfm.tasks.hpc.program import (
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

_STATEMENTS = {
    "while_statement": "has a while loop", "do_statement": "has a do loop",
    "goto_statement": "jumps", "break_statement": "leaves a loop early",
    "continue_statement": "continues a loop early", "return_statement": "returns",
    "switch_statement": "has a switch", "labeled_statement": "has a label",
    "preproc_if": "depends on #if", "preproc_ifdef": "depends on #ifdef",
    "preproc_def": "defines a macro", "preproc_function_def": "defines a macro",
    "type_definition": "defines a type", "gnu_asm_expression": "has assembly",
}  # fmt: skip
_EXPRESSIONS = {
    "field_expression": "uses a member of a structure", "string_literal": "uses a string",
    "sizeof_expression": "uses sizeof", "comma_expression": "uses the comma operator",
    "assignment_expression": "assigns inside an expression",
    "update_expression": "assigns inside an expression", "offsetof_expression": "uses offsetof",
    "compound_literal_expression": "uses a compound literal", "null": "uses a null pointer",
}  # fmt: skip
_INNER_DIRECTIVES = ("atomic", "critical")
_PLAIN_CLAUSES = ("name", "update", "write", "read", "seq_cst", "relaxed")
_DEEPEST_EXPRESSION = 60


@dataclasses.dataclass
class CLowering:
    """Lowers the statements of one loop of a function.

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

    def counted(self, node: Any, path: Path) -> For:
        """A `for` statement in counted form, its body included."""
        line = line_of(node)
        self.building.lines[path] = line
        name, lower = self._initial(node.child_by_field_name("initializer"), line)
        symbol = self.symbol(name, node.child_by_field_name("body"))
        self.building.index(name, symbol, line)
        step = self._step(node.child_by_field_name("update"), name, line)
        upper = self._upper(node.child_by_field_name("condition"), name, step, line)
        self.building.active.append(name)
        body = self._body(node.child_by_field_name("body"), path)
        self.building.active.remove(name)
        return For(name, lower, upper, body, step)

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

    def _initial(self, node: Any, line: int) -> tuple[str, Expr]:
        if node is not None and node.type == "declaration":
            made = node.children_by_field_name("declarator")
            if len(made) == 1 and made[0].type == "init_declarator":
                name = made[0].child_by_field_name("declarator")
                if name.type == "identifier":
                    return text_of(name), self.expr(made[0].child_by_field_name("value"))
        if node is not None and node.type == "assignment_expression" and node.child(1).type == "=":
            name = node.child_by_field_name("left")
            if name.type == "identifier":
                return text_of(name), self.expr(node.child_by_field_name("right"))
        raise Outside(f"The loop of line {line} does not begin by setting one variable.")

    def _step(self, node: Any, name: str, line: int) -> int:
        """The step of a loop's variable: `i++`, `i -= 2`, `i = i + c`."""
        found: int | None = None
        if node is not None and node.type == "update_expression":
            if text_of(node.child_by_field_name("argument")) == name:
                found = {"++": 1, "--": -1}[text_of(node.child_by_field_name("operator"))]
        elif node is not None and node.type == "assignment_expression":
            operator = node.child(1).type
            if text_of(node.child_by_field_name("left")) == name:
                self.building.active.append(name)
                value = affine(self.expr(node.child_by_field_name("right")))
                self.building.active.remove(name)
                if value is not None and operator in ("+=", "-=") and not value[0]:
                    found = value[1] if operator == "+=" else -value[1]
                elif value is not None and operator == "=" and value[0] == {name: 1}:
                    found = value[1]
        if not found:
            raise Outside(f"The loop of line {line} does not step by a constant.")
        return found

    def _upper(self, node: Any, name: str, step: int, line: int) -> Expr:
        """The bound that a loop's variable does not reach."""
        turned = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}
        if node is None or node.type != "binary_expression" or node.child(1).type not in turned:
            raise Outside(f"The loop of line {line} does not compare its variable with a bound.")
        left, operator, right = (node.child(0), node.child(1).type, node.child(2))
        if text_of(left) != name:
            left, operator, right = right, turned[operator], left
        bound = self.expr(right)
        if text_of(left) != name or name in names_of(bound):
            raise Outside(f"The loop of line {line} does not compare its variable with a bound.")
        symbol = self.building.symbols[name]
        others = [self.building.symbols.get(x) for x in names_of(bound)]
        mixed = not symbol.signed or any(s is not None and not s.signed for s in others)
        plain = isinstance(bound, Number) and not mixed
        if operator == "!=" and abs(step) == 1 and not mixed:
            operator = "<" if step > 0 else ">"
        if (operator in ("<", "<=")) != (step > 0) or operator == "!=":
            raise Outside(f"The loop of line {line} does not count towards its bound.")
        if step < 0 and mixed and not plain:
            signs = {s.signed for s in others if s is not None} | {symbol.signed}
            if operator == ">=" or step != -1 or len(signs) > 1:
                raise Outside(
                    f"The loop of line {line} counts an unsigned number down, which may wrap."
                )
        if operator in ("<=", ">="):
            return Op("+" if step > 0 else "-", (bound, Number(1)))
        return bound

    def _body(self, node: Any, path: Path) -> tuple[Statement, ...]:
        statements: list[Statement] = []
        self.into(node, path, statements)
        return tuple(statements)

    def into(self, node: Any, path: Path, out: list[Statement], offset: int = 0) -> None:
        """Lowers a statement and appends what it becomes to a body.

        Args:
            node: The statement.
            path: Of the statement that the body belongs to.
            out: The body.
            offset: How many statements stand before the body in its statement's numbering.
        """
        if len(path) > 2 * DEEPEST:
            raise Outside(f"Line {line_of(node)} is nested too deeply.")
        kind, line = node.type, line_of(node)
        here = (*path, offset + len(out))
        if kind in ("comment", ";", "{", "}"):
            return
        self.building.lines[here] = line
        if self._directed(node, path, out, offset):
            return
        if kind == "compound_statement":
            for child in node.named_children:
                self.into(child, path, out, offset)
        elif kind == "expression_statement":
            if node.named_child_count:
                out.append(self._effect(node.named_child(0), line))
        elif kind == "declaration":
            for child in node.children_by_field_name("declarator"):
                self._declare(child, path, out, offset)
        elif kind == "for_statement":
            out.append(self.counted(node, here))
        elif kind == "if_statement":
            out.append(self._if(node, here))
        else:
            raise Outside(
                f"Line {line} {_STATEMENTS.get(kind, 'has a statement that is not read')}."
            )

    def _directed(self, node: Any, path: Path, out: list[Statement], offset: int) -> bool:
        """Lowers a statement under an OpenMP directive; False where there is none."""
        at = self.source.before(node)
        directive = None if at is None else self.source.directives[at]
        if directive is None or directive.start < self.loop.start_byte:
            return False
        if directive.start in self.directives:
            return False  # a block inside the statement begins where the statement does
        self.directives.add(directive.start)
        pragma = parse_pragma(directive.text, "c")
        name = "" if pragma is None else pragma.directive
        plain = pragma is not None and all(c.name in _PLAIN_CLAUSES for c in pragma.clauses)
        if name not in _INNER_DIRECTIVES or not plain:
            raise Outside(f"Line {directive.line} has the directive {name}, which is not read.")
        assert pragma is not None
        here = (*path, offset + len(out))
        self.building.lines[here] = directive.line
        body: list[Statement] = []
        self.into(node, here, body)
        out.append(Block(pragma, tuple(body)))
        return True

    def _if(self, node: Any, here: Path) -> Statement:
        condition = self.expr(node.child_by_field_name("condition"))
        then: list[Statement] = []
        self.into(node.child_by_field_name("consequence"), here, then)
        orelse: list[Statement] = []
        other = node.child_by_field_name("alternative")
        if other is not None:
            inner = next(c for c in other.named_children if c.type != "comment")
            self.into(inner, here, orelse, len(then))
        return branch(If(condition, tuple(then), tuple(orelse)))

    def _declare(self, node: Any, path: Path, out: list[Statement], offset: int) -> None:
        """A variable of the loop's own."""
        value = node.child_by_field_name("value") if node.type == "init_declarator" else None
        name = node.child_by_field_name("declarator") if node.type == "init_declarator" else node
        line = line_of(node)
        if name.type != "identifier":
            raise Outside(f"Line {line} declares an array or a pointer in the loop.")
        text = text_of(name)
        inner = self.expr(value) if value is not None else None
        found = self.symbol(text, node, node.parent.end_byte)
        if found.kind == "constant":
            return
        if found.kind != "scalar":
            raise Outside(f"Line {line} declares an array or a pointer in the loop.")
        if inner is None:
            return
        if found.bits >= 32 and found.signed and self._fixed(text, found, inner):
            self.building.alias[text] = inner
            return
        self.building.write(text, line)
        self.building.lines[(*path, offset + len(out))] = line
        out.append(Assign(Var(text), inner))

    def _fixed(self, name: str, own: Symbol, value: Expr) -> bool:
        """Whether a local integer keeps its first value, which is linear in what stays the same."""
        linear = affine(value)
        if linear is None or len(self.function.symbols.get(name, ())) != 1:
            return False
        for inner in (name, *linear[0]):
            if inner in self.building.active:
                continue
            if written_within(self.function, inner, self.loop):
                return False
            symbol = self.building.symbols.get(inner)
            if symbol is not None and (symbol.taken or not symbol.signed):
                return False
            if symbol is not None and not 0 < symbol.bits <= own.bits:
                return False
        return True

    def _effect(self, node: Any, line: int) -> Statement:
        """An assignment, or a step by ++ or --."""
        if node.type == "parenthesized_expression":
            return self._effect(node.named_child(0), line)
        if node.type == "update_expression":
            target = self._target(node.child_by_field_name("argument"), line)
            sign = 1 if text_of(node.child_by_field_name("operator")) == "++" else -1
            return Assign(target, Number(sign), "+")
        if node.type == "call_expression":
            name = text_of(node.child_by_field_name("function"))
            raise Outside(f"Line {line} calls {name}, whose effects are not known.")
        if node.type != "assignment_expression":
            raise Outside(
                f"Line {line} {_EXPRESSIONS.get(node.type, 'has no effect that is read')}."
            )
        value = self.expr(node.child_by_field_name("right"))
        target = self._target(node.child_by_field_name("left"), line)
        return assignment(target, node.child(1).type, value)

    def _target(self, node: Any, line: int) -> Var | Ref:
        while node.type == "parenthesized_expression":
            node = node.named_child(0)
        if node.type == "identifier":
            name = text_of(node)
            symbol = self.symbol(name, node)
            if symbol.kind != "scalar":
                raise Outside(f"Line {line} changes the pointer {name}.")
            self.building.write(name, line)
            return Var(name)
        target = self.expr(node)
        if not isinstance(target, Ref):
            raise Outside(f"Line {line} assigns to what is not read.")
        return target

    def expr(self, node: Any, depth: int = 0) -> Expr:
        """An expression without side effects."""
        line, kind = line_of(node), node.type
        if depth > _DEEPEST_EXPRESSION:
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
        raise Outside(
            f"Line {line} {_EXPRESSIONS.get(kind, 'has an expression that is not read')}."
        )

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
            raise Outside(f"Line {line} {_EXPRESSIONS.get(node.type, 'indexes an expression')}.")
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
