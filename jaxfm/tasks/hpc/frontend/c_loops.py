"""The loops of a C file, their directives, and each as a program."""

from __future__ import annotations

import bisect
import functools
import re
from typing import Any

from jaxfm.tasks.hpc.frontend.building import Building, finish
from jaxfm.tasks.hpc.frontend.c_lift import CLowering
from jaxfm.tasks.hpc.frontend.c_names import read_file, read_function
from jaxfm.tasks.hpc.frontend.c_scope import File, Function, is_write
from jaxfm.tasks.hpc.frontend.loop import Lifted, Loop
from jaxfm.tasks.hpc.frontend.pragmas import combined, parse_pragma, stands_alone
from jaxfm.tasks.hpc.frontend.source import Outside, Source, line_of, nodes, text_of


class CNames:
    """The names of a file, each function's read when it is first asked for."""

    def __init__(self, source: Source):
        self.source = source

    @functools.cached_property
    def file(self) -> File:
        return read_file(self.source)

    @functools.cached_property
    def functions(self) -> list[Any]:
        return nodes(self.source, "(function_definition) @x")

    @functools.cached_property
    def _read(self) -> dict[int, Function]:
        return {}

    def function(self, node: Any) -> Function:
        """What a function declares."""
        if node.id not in self._read:
            self._read[node.id] = read_function(self.source, self.file, node)
        return self._read[node.id]


def loops_of_c(source: Source) -> list[Loop]:
    """Every `for` of a file, outer ones before those inside them."""
    names = CNames(source)
    starts = [node.start_byte for node in names.functions]
    found: list[Loop] = []
    open_: list[int] = []  # loops around the present one
    for node in nodes(source, "(for_statement) @x"):
        while open_ and found[open_[-1]].node.end_byte <= node.start_byte:
            open_.pop()
        index = bisect.bisect_right(starts, node.start_byte) - 1
        function = names.functions[index] if index >= 0 else None
        if function is not None and function.end_byte < node.end_byte:
            function = None
        at = source.before(node)
        before = None if at is None else source.directives[at]
        if before is not None and stands_alone(before.text):
            before = None
        outer = found[open_[-1]] if open_ else None
        region = _region(source, node, outer)
        found.append(
            Loop(
                function=_name(function),
                first_line=line_of(node),
                last_line=node.end_point[0] + 1,
                directive="" if before is None else before.text,
                directive_line=0 if before is None else before.line,
                parent=open_[-1] if open_ else None,
                region=region,
                alone=_begins_line(source, node),
                node=node,
                source=source,
                names=(names, function),
            )
        )
        open_.append(len(found) - 1)
    return found


def lift_c(loop: Loop, assume: frozenset[str]) -> Lifted:
    """A loop as a program.

    Raises:
        Outside: It is outside what a proof reads.
    """
    names, node = loop.names
    if node is None or node.has_error:
        raise Outside("The function around the loop cannot be parsed.")
    if nodes(loop.source, "(function_definition) @x (preproc_include) @x", node)[1:]:
        raise Outside("The function around the loop has another function or an #include in it.")
    function = names.function(node)
    _check_macros(names.file, loop.node)
    for directive in loop.source.directives:
        if directive.text.startswith("omp threadprivate"):
            raise Outside("The file has variables of each thread (threadprivate).")
    pragma = parse_pragma(loop.directive, "c") if loop.directive else None
    own = pragma
    if pragma is not None:
        pragma = combined(pragma, loop.region, "c")
    building = Building(assume)
    lowering = CLowering(names.file, function, loop.node, building, loop.source)
    made = lowering.counted(loop.node, (0,))
    for directive in loop.source.directives:
        inside = loop.node.start_byte <= directive.start < loop.node.end_byte
        if inside and directive.start not in lowering.directives:
            raise Outside(f"Line {directive.line} has a directive that is not read here.")
    if pragma is not own:
        start = _region_start(loop)
        building.local |= {
            name for name, symbol in building.symbols.items()
            if symbol.place == "local" and symbol.node is not None
            and symbol.node.start_byte > start
        }  # fmt: skip
    after = tuple(
        name
        for name, symbol in building.symbols.items()
        if symbol.kind == "scalar" and name not in building.local
        and (symbol.taken or symbol.place in ("global", "static")
             or used_after(function, loop.node, name))
    )  # fmt: skip
    return finish(building, made, pragma=pragma, used_after=after, private_indices=False)


def used_after(function: Function, loop: Any, name: str) -> bool:
    """Whether a variable's value may be read after a loop, before it is written again."""
    if function.jumps:
        return True
    starts, places = function.uses.get(name, ([], []))
    stretches = [(loop.end_byte, function.node.end_byte)]
    node = loop.parent
    while node is not None and node != function.node:
        if node.type in ("for_statement", "while_statement", "do_statement"):
            # The loop around it comes back to what stands before it, and then to itself.
            stretches.append((node.start_byte, loop.start_byte))
        node = node.parent
    begin = function.node.start_byte
    for start, end in stretches:
        position = start
        while (at := bisect.bisect_left(starts, position)) < len(starts) and starts[at] < end:
            block = _written_in(places[at])
            if block is None:
                return True
            if _contains(block, loop):
                between = function.node.text[start - begin : starts[at] - begin]
                if re.search(rb"\b(break|continue)\b", between):
                    return True
                break
            position = block.end_byte  # what the block reads of it is what it wrote
    return False


def _written_in(use: Any) -> Any:
    """The block that writes a variable where it is used and before it reads it; None if none."""
    node = use.parent
    if node.type != "assignment_expression" or not is_write(use) or node.child(1).type != "=":
        return None
    right = node.child_by_field_name("right")
    if any(c.type == "identifier" and c.text == use.text for c in _descendants(right)):
        return None
    parent = node.parent
    first = parent.type == "for_statement" and parent.child_by_field_name("initializer") == node
    if parent.type != "expression_statement" and not first:
        return None
    return parent.parent if parent.parent.type == "compound_statement" else parent


def _contains(node: Any, other: Any) -> bool:
    return node.start_byte <= other.start_byte and other.end_byte <= node.end_byte


def _descendants(node: Any) -> list[Any]:
    out: list[Any] = []
    rest = [node]
    while rest and len(out) < 10_000:
        out.append(rest.pop())
        rest += out[-1].children
    return out


def _check_macros(file: File, node: Any) -> None:
    """Refuses a loop in which a macro stands for a word of the language."""
    words = {"for", "if", "else", "int", "double", "float", "long", "unsigned", "const", "char",
             "signed", "short", "size_t"} & set(file.macros)  # fmt: skip
    text = set(text_of(node).replace("(", " ").split()) if words else set()
    if words & text:
        raise Outside(f"{min(words & text)} is a macro in this file.")


def _region(source: Source, node: Any, outer: Loop | None) -> tuple[str, ...]:
    """The directives of the OpenMP constructs around a loop, innermost first."""
    found = []
    stop = None if outer is None else outer.node
    parent = node.parent
    while parent is not None and parent != stop and parent.type != "function_definition":
        if parent.type == "compound_statement":
            at = source.before(parent)
            if at is not None and not stands_alone(source.directives[at].text):
                found.append(source.directives[at].text)
        parent = parent.parent
    if outer is not None:
        found += [outer.directive] if outer.directive else []
        found += outer.region
    return tuple(found)


def _region_start(loop: Loop) -> int:
    """Where the construct around a loop begins."""
    parent = loop.node.parent
    while parent is not None and parent.type != "function_definition":
        if parent.type == "compound_statement" and loop.source.before(parent) is not None:
            return parent.start_byte
        parent = parent.parent
    return 1 << 62


def _begins_line(source: Source, node: Any) -> bool:
    start = source.text.rfind(b"\n", 0, node.start_byte) + 1
    plain = not source.text[start : node.start_byte].strip()
    above = source.text[source.text.rfind(b"\n", 0, max(start - 1, 0)) + 1 : start].strip()
    # Nothing comes between a loop and a pragma of another kind, or into a continued line.
    return plain and not above.endswith(b"\\") and not above.startswith(b"#pragma")


def _name(function: Any) -> str:
    node = function
    while node is not None and node.type != "identifier":
        node = node.child_by_field_name("declarator")
    return "" if node is None else text_of(node)
