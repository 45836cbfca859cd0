"""Rows from a folder of DataRaceBench, to score on and never to train on.

A program's label is the ending of its file name, "-yes" for a race and "-no" for none. Comments
name the racing pair, so they are always removed; a model never sees a file's name. Programs that
differ in their number and in "orig" or "var" only are twins, of one group.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import NamedTuple

from jaxfm.tasks.hpc.frontend import SUFFIXES, loops, parse
from jaxfm.tasks.hpc.lexer import lex

_NAME = re.compile(r"DRB\d+-(?P<group>.+?)(-orig|-var)?-(?P<label>yes|no)$")


class BenchmarkProgram(NamedTuple):
    """A program.

    Attributes:
        source: Its text without comments.
        loops: The text of each of its loops with a directive, the directive's line first; empty
            where none can be read.
        label: 1 for a race.
        group: What twins share.
        language: "c" or "fortran".
    """

    source: str
    loops: tuple[str, ...]
    label: int
    group: str
    language: str


def read_folder(folder: str | os.PathLike) -> list[BenchmarkProgram]:
    """The programs of a folder and of those in it, sorted by name.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It has no file with a name of DataRaceBench.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(2, "There is no such folder", str(root))
    found = []
    for path in sorted(root.rglob("DRB*")):
        told = _NAME.match(path.stem)
        suffix = ".c" if path.suffix == ".cpp" else path.suffix.lower()
        if told and suffix in SUFFIXES and path.is_file():
            language = SUFFIXES[suffix]
            text = without_comments(path.read_bytes().decode(errors="replace"), language)
            found.append(
                BenchmarkProgram(
                    text, _directed(text, language), int(told["label"] == "yes"), told["group"],
                    language,
                )
            )  # fmt: skip
    if not found:
        raise ValueError(
            f"{root} has no program of DataRaceBench; their names are like "
            "DRB001-antidep1-orig-yes.c."
        )
    return found


def without_comments(text: str, language: str) -> str:
    """A text whose comments are gone; lines keep their numbers.

    >>> without_comments("a[i] = 0; // race", "c")
    'a[i] = 0; '
    """
    if language == "c":
        pieces = (
            "\n" * p.text.count("\n")
            if p.kind == "verbatim" and p.text.startswith(("/*", "//"))
            else p.text
            for p in lex(text)
        )
        return "".join(pieces)
    lines = (re.sub(r"!(?!\$omp).*", "", x, flags=re.IGNORECASE) for x in text.split("\n"))
    return "\n".join(lines)


def _directed(text: str, language) -> tuple[str, ...]:
    """The loops with a directive of their own, the directive in front."""
    try:
        source = parse(text.encode(), language)
    except ValueError:
        return ()
    lines = text.split("\n")
    return tuple(
        "\n".join(lines[loop.directive_line - 1 : loop.last_line])
        for loop in loops(source)
        if loop.directive
    )
