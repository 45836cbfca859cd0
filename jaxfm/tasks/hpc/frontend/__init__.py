"""The front end: loops of real C and Fortran files, and each as a program that a proof can judge.

    for loop in loops(text, "c"):
        lifted = lift(loop)  # a Lifted, or a sentence that says why it is outside

`judge` puts the proof for all sizes on a lifted loop and keeps to "cannot tell" wherever the source
leaves room for more than the program says. It needs the extra `hpc` (tree-sitter, islpy).
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxfm.tasks.hpc.frontend.c_loops import lift_c, loops_of_c
from jaxfm.tasks.hpc.frontend.f_loops import lift_fortran, loops_of_fortran
from jaxfm.tasks.hpc.frontend.loop import Lifted, Loop
from jaxfm.tasks.hpc.frontend.source import SUFFIXES, Language, Outside, Source, parse

__all__ = ["SUFFIXES", "Lifted", "Loop", "lift", "loops", "parse"]

ASSUMPTIONS = ("no_alias", "in_bounds")
"""What a caller may vouch for: no two pointers reach the same memory; each subscript of an array of
several dimensions stays within its dimension."""


def loops(source: str | bytes | Source, language: Language = "c") -> list[Loop]:
    """Every loop of a file, outer ones before those inside them.

    Args:
        source: The text of the file, or what `parse` made of it.
        language: "c", "fortran" (free form) or "fortran-fixed".
    Raises:
        ValueError: The file is no text or the language is another one.
        ImportError: The grammars are not installed.
    """
    if language not in SUFFIXES.values():
        raise ValueError(f"language={language!r}: give one of {sorted(set(SUFFIXES.values()))}.")
    parsed = source if isinstance(source, Source) else parse(source, language)
    return loops_of_c(parsed) if parsed.language == "c" else loops_of_fortran(parsed)


def lift(loop: Loop, *, assume: Iterable[str] = ()) -> Lifted | str:
    """A loop as a program, or one sentence that says why no proof can judge it.

    Args:
        loop: One of `loops`.
        assume: Which of `ASSUMPTIONS` hold.
    """
    unknown = sorted(set(assume) - set(ASSUMPTIONS))
    if unknown:
        raise ValueError(f"assume={unknown[0]!r}: give some of {', '.join(ASSUMPTIONS)}.")
    lift_one = lift_c if loop.source.language == "c" else lift_fortran
    try:
        return lift_one(loop, frozenset(assume))
    except Outside as reason:
        return str(reason)
