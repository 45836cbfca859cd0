"""Loops of source files, and what lifting one gives."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxfm.tasks.hpc.frontend.source import Source
from jaxfm.tasks.hpc.program import Path, Pragma, Program


class Loop(NamedTuple):
    """A loop of a file.

    Attributes:
        function: The function it is in; "" outside any.
        first_line, last_line: Where it stands, from 1.
        directive: The text of its OpenMP directive, on one line without the sentinel; "" if it
            has none.
        directive_line: The line of the directive, 0 without one.
        parent: Index of the loop around it in the list of the file's loops; None if outermost.
        region: The OpenMP directives of the constructs around it, innermost first.
        alone: Whether a line can be put before it: it begins its own line as a statement.
        node: Of the syntax tree.
        source: The file.
        names: What the file and the function declare, for `lift`.
    """

    function: str
    first_line: int
    last_line: int
    directive: str
    directive_line: int
    parent: int | None
    region: tuple[str, ...]
    alone: bool
    node: Any
    source: Source
    names: Any

    @property
    def text(self) -> str:
        """Its source, without its directive."""
        return self.source.text[self.node.start_byte : self.node.end_byte].decode(
            "utf-8", "replace"
        )


class Lifted(NamedTuple):
    """A loop as a program.

    Attributes:
        program: Its body is the loop alone. Clauses that the source implies, such as those of
            variables that are declared in the loop, are in its pragma if it has one.
        lines: The line of each statement.
        local: Names that are declared in the loop: each iteration has its own.
        index: Of variables of loops that are declared outside, in the order of the loops.
        doubts: One sentence for each reason why the absence of conflicts in the program does not
            show that the source has none; a conflict stands all the same.
        used_after: Scalars whose values may be read after the loop.
        pragma: The directive as it is written, without what the source implies.
        fortran: Whether arrays lie in memory as Fortran's do, the first subscript fastest.
    """

    program: Program
    lines: dict[Path, int]
    local: tuple[str, ...]
    index: tuple[str, ...]  # type: ignore[assignment]  # hides a method of tuples
    doubts: tuple[str, ...]
    used_after: tuple[str, ...]
    pragma: Pragma | None
    fortran: bool = False
