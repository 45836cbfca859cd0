"""Loops of Fortran as programs; subscripts are counted from 0, as in a `Program`."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxfm.tasks.hpc.frontend.building import DEEPEST, Building
from jaxfm.tasks.hpc.frontend.f_names import Unit, lower, number, resolve
from jaxfm.tasks.hpc.frontend.names import FORTRAN_FUNCTIONS, Symbol
from jaxfm.tasks.hpc.frontend.pragmas import parse_pragma
from jaxfm.tasks.hpc.frontend.reductions import assignment, branch
from jaxfm.tasks.hpc.frontend.source import Outside, Source, line_of, text_of
from jaxfm.tasks.hpc.program import (
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

_RELATIONS = {
    ".lt.": "<", ".le.": "<=", ".gt.": ">", ".ge.": ">=", ".eq.": "==", ".ne.": "!=", "/=": "!=",
    ".and.": "&&", ".or.": "||", ".eqv.": "==", ".neqv.": "!=", "**": "pow",
}  # fmt: skip
_KEYWORDS = {"exit": "leaves a loop early", "cycle": "continues a loop early",
             "return": "returns", "stop": "stops"}  # fmt: skip
_SKIPPED = ("comment", "do_statement", "end_do_loop_statement", "statement_label",
            "end_if_statement", "block_label_start_expression")  # fmt: skip


@dataclasses.dataclass
class FortranLowering:
    """Lowers the statements of one loop of a program unit; see `CLowering`."""

    unit: Unit
    loop: Any
    building: Building
    source: Source
    macros: frozenset[str] = frozenset()
    directives: set[int] = dataclasses.field(default_factory=set)

    def counted(self, node: Any, path: Path) -> For:
        """A `do` loop in counted form, its body included."""
        line = line_of(node)
        self.building.lines[path] = line
        head = next((c for c in node.named_children if c.type == "do_statement"), None)
        control = None if head is None else next(
            (c for c in head.named_children if c.type == "loop_control_expression"), None
        )  # fmt: skip
        parts = [] if control is None else [c for c in control.named_children if c.type != "&"]
        if len(parts) not in (3, 4) or parts[0].type != "identifier":
            raise Outside(f"The loop of line {line} does not count a variable.")
        name = lower(parts[0])
        symbol = self.symbol(name, parts[0])
        first, last = self.expr(parts[1]), self.expr(parts[2])
        step = affine(self.expr(parts[3])) if len(parts) == 4 else ({}, 1)
        if step is None or step[0] or not step[1]:
            raise Outside(f"The loop of line {line} does not step by a constant.")
        self.building.index(name, symbol, line)
        self.building.active.append(name)
        body: list[Statement] = []
        for child in node.named_children:
            if child.type == "end_do_label_loop_statement":
                for inner in child.named_children:
                    labels = ("statement_label", "do_label_virtual", "statement_label_reference")
                    if inner.type not in labels:
                        self.into(inner, path, body)
            elif child != head:
                self.into(child, path, body)
        self.building.active.remove(name)
        bound = Op("+" if step[1] > 0 else "-", (last, Number(1)))
        return For(name, first, bound, tuple(body), step[1])

    def symbol(self, name: str, node: Any) -> Symbol:
        """What a name stands for."""
        if name in self.macros:
            raise Outside(f"Line {line_of(node)} uses {name}, which is a macro.")
        found = resolve(self.unit, name)
        if found is not None and found.kind == "constant":
            return found
        return self.building.use(name, found, line_of(node), inner=False)

    def into(self, node: Any, path: Path, out: list[Statement], offset: int = 0) -> None:
        """Lowers a statement and appends what it becomes to a body; see `CLowering.into`."""
        kind, line = node.type, line_of(node)
        if kind in _SKIPPED:
            return
        if len(path) > 2 * DEEPEST:
            raise Outside(f"Line {line} is nested too deeply.")
        here = (*path, offset + len(out))
        self.building.lines[here] = line
        if self._atomic(node, path, out, offset):
            return
        if kind == "assignment_statement":
            out.append(self._assign(node, line))
        elif kind == "do_loop":
            out.append(self.counted(node, here))
        elif kind == "if_statement":
            out.append(self._if(node, here))
        elif kind == "keyword_statement":
            word = lower(node).split()[0]
            if word != "continue":
                raise Outside(f"Line {line} {_KEYWORDS.get(word, 'jumps')}.")
        elif kind == "subroutine_call":
            name = lower(node.child_by_field_name("subroutine"))
            raise Outside(f"Line {line} calls {name[:60]}, whose effects are not known.")
        else:
            raise Outside(f"Line {line} has a statement that is not read.")

    def _atomic(self, node: Any, path: Path, out: list[Statement], offset: int) -> bool:
        """Lowers a statement under `!$omp atomic`; False where there is no directive."""
        at = self.source.before(node)
        directive = None if at is None else self.source.directives[at]
        if directive is None or directive.start < self.loop.start_byte:
            return False
        if directive.start in self.directives or directive.text.startswith("omp end atomic"):
            return False
        pragma = parse_pragma(directive.text, "fortran")
        if pragma is None or pragma.directive != "atomic" or pragma.named("capture"):
            raise Outside(f"Line {directive.line} has a directive that is not read here.")
        if any(c.name not in ("update", "write", "read") for c in pragma.clauses):
            raise Outside(f"Line {directive.line} has a directive that is not read here.")
        self.directives.add(directive.start)
        here = (*path, offset + len(out))
        body: list[Statement] = []
        self.into(node, here, body)
        out.append(Block(pragma, tuple(body)))
        return True

    def _if(self, node: Any, here: Path) -> Statement:
        """`if` with its branches; each `else if` is an `if` in the branch before."""
        children = [c for c in node.named_children if c.type not in _SKIPPED]
        condition = self.expr(children[0])
        then: list[Statement] = []
        orelse: list[Statement] = []
        rest = children[1:]
        while rest and rest[0].type not in ("elseif_clause", "else_clause"):
            self.into(rest.pop(0), here, then)
        if rest and rest[0].type == "else_clause":
            for child in rest[0].named_children:
                self.into(child, here, orelse, len(then))
        elif rest:
            orelse.append(self._else_if(rest, (*here, len(then))))
        return branch(If(condition, tuple(then), tuple(orelse)))

    def _else_if(self, clauses: list[Any], here: Path) -> Statement:
        self.building.lines[here] = line_of(clauses[0])
        if len(here) > 2 * DEEPEST:
            raise Outside(f"Line {line_of(clauses[0])} is nested too deeply.")
        first, *rest = clauses
        children = [c for c in first.named_children if c.type not in _SKIPPED]
        condition = self.expr(children[0])
        then: list[Statement] = []
        orelse: list[Statement] = []
        for child in children[1:]:
            self.into(child, here, then)
        if rest and rest[0].type == "else_clause":
            for child in rest[0].named_children:
                self.into(child, here, orelse, len(then))
        elif rest:
            orelse.append(self._else_if(rest, (*here, len(then))))
        return If(condition, tuple(then), tuple(orelse))

    def _assign(self, node: Any, line: int) -> Statement:
        value = self.expr(node.child_by_field_name("right"))
        left = node.child_by_field_name("left")
        if left.type == "identifier":
            name = lower(left)
            symbol = self.symbol(name, left)
            if symbol.kind != "scalar":
                raise Outside(f"Line {line} assigns to the whole of {name}.")
            self.building.write(name, line)
            return assignment(Var(name), "=", value)
        target = self.expr(left)
        if not isinstance(target, Ref):
            raise Outside(f"Line {line} assigns to what is not read.")
        return assignment(target, "=", value)

    def expr(self, node: Any, depth: int = 0) -> Expr:
        """An expression without side effects."""
        line, kind = line_of(node), node.type
        if depth > 60:
            raise Outside(f"Line {line} has an expression that is nested too deeply.")
        inner = lambda child: self.expr(child, depth + 1)
        if kind == "parenthesized_expression":
            return inner(node.named_child(0))
        if kind == "number_literal":
            value = number(text_of(node))
            if value is None:
                raise Outside(f"Line {line} has the number {text_of(node)}, which is not read.")
            return Number(value)
        if kind == "boolean_literal":
            return Number(int("true" in lower(node)))
        if kind == "identifier":
            return self._name(node, line)
        if kind in ("math_expression", "relational_expression", "logical_expression"):
            left, right = (node.child_by_field_name(f) for f in ("left", "right"))
            if left is None or right is None:
                raise Outside(f"Line {line} has an expression that is not read.")
            word = lower(node.child_by_field_name("operator"))
            return Op(_RELATIONS.get(word, word), (inner(left), inner(right)))
        if kind == "unary_expression":
            word = lower(node.child_by_field_name("operator"))
            only = inner(node.child_by_field_name("argument"))
            return only if word == "+" else Op({".not.": "!"}.get(word, word), (only,))
        if kind == "call_expression":
            return self._call(node, inner, line)
        raise Outside(f"Line {line} has an expression that is not read.")

    def _name(self, node: Any, line: int) -> Expr:
        name = lower(node)
        symbol = self.symbol(name, node)
        if symbol.kind == "constant":
            assert symbol.value is not None
            return Number(symbol.value)
        if symbol.kind == "array":
            raise Outside(f"Line {line} uses the whole of {name}.")
        return self.building.read(name, line)

    def _call(self, node: Any, inner: Any, line: int) -> Expr:
        """An element of an array, or an intrinsic function."""
        callee = node.named_child(0)
        name = lower(callee)
        lists = [c for c in node.named_children if c.type == "argument_list"]
        if callee.type != "identifier" or len(lists) != 1:
            raise Outside(f"Line {line} has an expression that is not read.")
        arguments = [inner(c) for c in lists[0].named_children if c.type not in ("comment", "&")]
        found = resolve(self.unit, name)
        if found is not None and found.kind == "array":
            symbol = self.symbol(name, callee)
            if len(symbol.shape) != len(arguments):
                raise Outside(f"Line {line} indexes {name} in another way than it is declared.")
            return Ref(name, tuple(map(_from_zero, arguments, symbol.lower)))
        known = name in FORTRAN_FUNCTIONS and name not in self.macros
        own = self.unit.symbols.get(name) is not None or self._is_procedure(name)
        if not known or own:
            raise Outside(f"Line {line} calls {name[:60]}, whose effects are not known.")
        return Op(FORTRAN_FUNCTIONS[name], tuple(arguments))

    def _is_procedure(self, name: str) -> bool:
        """Whether a unit around has a procedure or a variable of a name."""
        unit: Unit | None = self.unit
        while unit is not None:
            if name == unit.name or name in unit.symbols:
                return True
            unit = unit.host
        return False


def _from_zero(subscript: Expr, low: Expr | None) -> Expr:
    return subscript if low is None else Op("-", (subscript, low))
