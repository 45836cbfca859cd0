"""Loops of C as programs: statements, one node of the syntax tree at a time."""

from __future__ import annotations

from typing import Any

from jaxfm.tasks.hpc.frontend.building import DEEPEST, names_of
from jaxfm.tasks.hpc.frontend.c_expressions import EXPRESSIONS, CExpressions
from jaxfm.tasks.hpc.frontend.c_scope import written_within
from jaxfm.tasks.hpc.frontend.names import Symbol
from jaxfm.tasks.hpc.frontend.pragmas import parse_pragma
from jaxfm.tasks.hpc.frontend.reductions import assignment, branch
from jaxfm.tasks.hpc.frontend.source import Outside, line_of, text_of
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
_INNER_DIRECTIVES = ("atomic", "critical")
_PLAIN_CLAUSES = ("name", "update", "write", "read", "seq_cst", "relaxed")


class CLowering(CExpressions):
    """Lowers the statements of one loop of a function."""

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
                f"Line {line} {EXPRESSIONS.get(node.type, 'has no effect that is read')}."
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
