"""The loops of a Fortran file, their directives, and each as a program."""

from __future__ import annotations

import re
from typing import Any

from jaxfm.tasks.hpc.frontend.building import Building, finish
from jaxfm.tasks.hpc.frontend.f_lift import FortranLowering
from jaxfm.tasks.hpc.frontend.f_names import UNITS, Unit, lower, read_unit
from jaxfm.tasks.hpc.frontend.loop import Lifted, Loop
from jaxfm.tasks.hpc.frontend.pragmas import combined, parse_pragma, stands_alone
from jaxfm.tasks.hpc.frontend.source import Outside, Source, line_of, nodes

_REGIONS = ("parallel", "single", "task", "master", "masked", "critical", "workshare", "sections",
            "target", "teams", "ordered", "taskgroup", "do", "section")  # fmt: skip


class FortranNames:
    """The program units of a file, each read when it is first asked for."""

    def __init__(self, source: Source):
        self.source = source
        self.read: dict[int, Unit] = {}
        names = re.findall(rb"(?im)^\s*#\s*define\s+(\w+)", source.text)
        self.macros = frozenset(name.decode("utf-8", "replace").lower() for name in names)
        self.procedures = frozenset(
            lower(n) for n in nodes(source, "(subroutine_statement name: (name) @x)"
                                    "(function_statement name: (name) @x)")
        )  # fmt: skip

    def unit(self, node: Any) -> Unit:
        """What a program unit declares."""
        if node.id not in self.read:
            host = unit_of(node)
            inner = None if host is None else self.unit(host)
            self.read[node.id] = read_unit(self.source, node, inner)
        return self.read[node.id]


def loops_of_fortran(source: Source) -> list[Loop]:
    """Every `do` of a file, outer ones before those inside them."""
    names = FortranNames(source)
    regions = _regions(source)
    found: list[Loop] = []
    open_: list[int] = []
    for node in nodes(source, "(do_loop) @x"):
        while open_ and found[open_[-1]].node.end_byte <= node.start_byte:
            open_.pop()
        at = source.before(node)
        before = None if at is None else source.directives[at]
        if before is not None and stands_alone(before.text):
            before = None
        outer = found[open_[-1]] if open_ else None
        region = tuple(
            text
            for begin, end, text in regions
            if begin < node.start_byte < end and (before is None or begin != before.start)
        )
        if outer is not None and outer.directive and outer.directive not in region:
            region = (*region, outer.directive)
        start = source.text.rfind(b"\n", 0, node.start_byte) + 1
        found.append(
            Loop(
                function=_name(node),
                first_line=line_of(node),
                last_line=node.end_point[0] + 1,
                directive="" if before is None else before.text,
                directive_line=0 if before is None else before.line,
                parent=open_[-1] if open_ else None,
                region=region,
                alone=not source.text[start : node.start_byte].strip(),
                node=node,
                source=source,
                names=names,
            )
        )
        open_.append(len(found) - 1)
    return found


def lift_fortran(loop: Loop, assume: frozenset[str]) -> Lifted:
    """A loop as a program.

    Raises:
        Outside: It is outside what a proof reads.
    """
    names, node = loop.names, unit_of(loop.node)
    if node is None or node.has_error:
        raise Outside("The program unit around the loop cannot be parsed.")
    if re.search(r"(?m)^\s*!\$\s", loop.text):
        raise Outside("The loop has lines that are compiled only with OpenMP.")
    unit = names.unit(node)
    pragma = parse_pragma(loop.directive, "fortran") if loop.directive else None
    if pragma is not None:
        pragma = combined(pragma, loop.region, "fortran")
    building = Building(assume)
    macros = names.macros | names.procedures
    lowering = FortranLowering(unit, loop.node, building, loop.source, macros)
    made = lowering.counted(loop.node, (0,))
    for directive in loop.source.directives:
        inside = loop.node.start_byte <= directive.start < loop.node.end_byte
        ending = directive.text.startswith("omp end atomic")
        if inside and directive.start not in lowering.directives and not ending:
            raise Outside(f"Line {directive.line} has a directive that is not read here.")
    after = tuple(
        name
        for name, symbol in building.symbols.items()
        if symbol.kind == "scalar" and (
            symbol.taken or unit.shares or symbol.place != "local"
            or _used_after(unit, loop.node, name)
        )
    )  # fmt: skip
    return finish(building, made, pragma=pragma, used_after=after, private_indices=True)


def unit_of(node: Any) -> Any:
    """The program unit around a node; None outside any."""
    node = node.parent
    while node is not None and node.type not in UNITS:
        node = node.parent
    return node


def _used_after(unit: Unit, loop: Any, name: str) -> bool:
    """Whether a variable's value may be read after a loop, before it is written again."""
    stretches = [(loop.end_byte, unit.node.end_byte)]
    node = loop.parent
    while node is not None and node != unit.node:
        if node.type == "do_loop":
            stretches.append((node.start_byte, loop.start_byte))
        node = node.parent
    uses = unit.uses.get(name, [])
    begin = unit.node.start_byte
    for start, end in stretches:
        position = start
        while use := next((u for u in uses if position <= u.start_byte < end), None):
            block = _written_in(use)
            if block is None:
                return True
            if block.start_byte <= loop.start_byte and loop.end_byte <= block.end_byte:
                between = unit.node.text[start - begin : use.start_byte - begin].lower()
                if re.search(rb"\b(exit|cycle|go\s*to)\b", between):
                    return True
                break
            position = block.end_byte  # what the block reads of it is what it wrote
    return False


def _written_in(use: Any) -> Any:
    """The block that writes a variable where it is used and before it reads it; None if none."""
    node = use.parent
    if node.type == "assignment_statement" and node.child_by_field_name("left") == use:
        right = node.child_by_field_name("right")
        if re.search(rf"\b{re.escape(lower(use))}\b", lower(right)):
            return None
    elif node.type == "loop_control_expression" and node.named_child(0) == use:
        node = node.parent.parent  # the loop that counts it
    else:
        return None
    branches = ("if_statement", "elseif_clause", "else_clause")
    return node if node.parent.type in branches else node.parent


def _regions(source: Source) -> list[tuple[int, int, str]]:
    """Where constructs with an end begin and end, innermost first."""
    found: list[tuple[int, int, str]] = []
    open_: list[Any] = []
    for directive in source.directives:
        words = directive.text.split()[1:]
        if words[:1] == ["end"] or (words and words[0].startswith("end")):
            kind = (words[1:2] or [words[0].removeprefix("end")])[0]
            for index in range(len(open_) - 1, -1, -1):
                if open_[index].text.split()[1].startswith(kind):
                    opened = open_.pop(index)
                    found.append((opened.start, directive.start, opened.text))
                    break
        elif words and words[0].startswith(_REGIONS):
            open_.append(directive)
    # Without an end: a loop's directive ends with its loop; of others nothing is known.
    for directive in open_:
        text = directive.text.replace("paralleldo", "parallel do")
        if not (text.startswith(("omp do", "omp parallel do"))):
            found.append((directive.start, len(source.text), directive.text))
    return found


def _name(node: Any) -> str:
    unit = unit_of(node)
    if unit is None or not unit.named_child_count:
        return ""
    names = [c for c in unit.named_child(0).named_children if c.type == "name"]
    return lower(names[0]) if names else ""
