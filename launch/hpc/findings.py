"""What is found in source files, one `Finding` for each loop or directive."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jaxfm.tasks.hpc.frontend import SUFFIXES, lift, loops, parse
from jaxfm.tasks.hpc.frontend.loop import Lifted, Loop
from jaxfm.tasks.hpc.frontend.pragmas import write_pragma
from jaxfm.tasks.hpc.frontend.source import Language, Source
from jaxfm.tasks.hpc.frontend.verdict import WORKSHARING, Verdict, judge_given, judge_serial

RACE_FREE, WITH, RACE, UNKNOWN = "race-free", "race-free with", "race", "cannot tell"
_LOOP_LIMIT_S = 3.0
MOST_BYTES = 1_000_000
"""The longest file that is read; a parser's time and memory grow with it."""


class Finding(NamedTuple):
    """What is said of a loop.

    Attributes:
        path: The file.
        function: The function around it.
        first_line, last_line: Where it stands.
        verdict: "race-free" (under the directive that it has), "race-free with" (the proposed
            directive), "race", or "cannot tell".
        reason: One sentence.
        pragma: The proposed directive, "" if none.
        lines: The lines of the racing pair; empty without one.
        verified_by: What showed it, with its version; "" for "cannot tell".
        probability: A model's probability that the loop is race-free, where one was asked.
        notes: Further sentences.
        insert: The line before which the directive can be put, 0 where it cannot.
        directive_line: The line of the directive that it has, 0 without one.
        guess: The directive that a decoder would write where nothing is told, "none" where it
            would leave the loop serial; "" where none was asked.
    """

    path: str
    function: str
    first_line: int
    last_line: int
    verdict: str
    reason: str
    pragma: str = ""
    lines: tuple[int, ...] = ()
    verified_by: str = ""
    probability: float | None = None
    notes: tuple[str, ...] = ()
    insert: int = 0
    directive_line: int = 0
    guess: str = ""


def proof_name() -> str:
    """The proof and its version."""
    return f"proof by integer sets (islpy {importlib.metadata.version('islpy')})"


def source_files(paths: Iterable[str]) -> list[pathlib.Path]:
    """The C and Fortran files among paths and in their folders, sorted in each folder.

    Raises:
        FileNotFoundError: A path is not there.
        ValueError: A file has another suffix.
    """
    found: list[pathlib.Path] = []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            inside = (pathlib.Path(f, n) for f, _, names in os.walk(path) for n in names)
            found += sorted(p for p in inside if p.suffix.lower() in SUFFIXES and p.is_file())
        elif not path.exists():
            raise FileNotFoundError(2, "There is no such file or folder", str(path))
        elif path.suffix.lower() not in SUFFIXES:
            known = ", ".join(sorted(SUFFIXES))
            raise ValueError(f"{path}: give a file that ends in one of {known}.")
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def shown(path: pathlib.Path) -> str:
    """A path as text that can be printed, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "replace")


def language_of(path: pathlib.Path) -> Language:
    """The language of a file by its suffix."""
    return SUFFIXES[path.suffix.lower()]


def advise(
    path: pathlib.Path, data: bytes, *, assume: frozenset[str], limit_s: float
) -> list[Finding]:
    """What each loop of a file needs to run in parallel, outer loops first.

    A loop inside one that can run in parallel is not looked at.

    Args:
        path: The file.
        data: Its content.
        assume: See `jaxfm.tasks.hpc.frontend.ASSUMPTIONS`.
        limit_s: Seconds for the proofs of the file; loops after that are left untold.
    """
    deadline = time.monotonic() + limit_s
    source = _parsed(path, data)
    if isinstance(source, Finding):
        return [source]
    found, covered = [], set()
    for index, loop in enumerate(loops(source)):
        if loop.parent in covered:
            covered.add(index)
            continue
        finding = _advised(path, loop, assume, deadline)
        if finding.verdict in (RACE_FREE, WITH) or loop.directive:
            covered.add(index)
        found.append(finding)
    return found


def check(
    path: pathlib.Path, data: bytes, *, assume: frozenset[str], limit_s: float
) -> list[Finding]:
    """What is to be said of each OpenMP directive of a file that shares work; see `advise`."""
    deadline = time.monotonic() + limit_s
    source = _parsed(path, data)
    if isinstance(source, Finding):
        return [source]
    found, judged = [], set()
    for loop in loops(source):
        if loop.directive:
            judged.add(loop.directive_line)
            found.append(_checked(path, loop, assume, deadline))
    for directive in source.directives:
        words = directive.text.split("(")[0].split()[1:]
        if directive.line in judged or not words or words[0] in _NOT_WORK:
            continue
        reason = f"The directive {' '.join(words[:2])} is not one that is judged."
        if words[0] in ("parallel", "for", "do") and _is_loop(words):
            reason = "No loop that can be read follows the directive."
        found.append(
            Finding(shown(path), "", directive.line, directive.line, UNKNOWN, reason,
                    directive_line=directive.line)
        )  # fmt: skip
    return sorted(found, key=lambda f: f.directive_line)


_NOT_WORK = frozenset((
    "end", "barrier", "atomic", "critical", "flush", "taskwait", "taskyield", "declare",
    "threadprivate", "single", "master", "masked", "section", "ordered", "requires", "simd",
))  # fmt: skip


def _is_loop(words: list[str]) -> bool:
    return bool({"for", "do", "paralleldo"} & set(words))


def _parsed(path: pathlib.Path, data: bytes) -> Source | Finding:
    """A file's syntax tree, or the finding that it cannot be read."""
    if len(data) > MOST_BYTES:
        reason = f"The file has {len(data):,} bytes; files of up to {MOST_BYTES:,} are read."
        return Finding(shown(path), "", 1, 1, UNKNOWN, reason)
    try:
        return parse(data, language_of(path))
    except ValueError as error:
        return Finding(shown(path), "", 1, 1, UNKNOWN, str(error))


def _finding(path: pathlib.Path, loop: Loop, verdict: str, reason: str) -> Finding:
    return Finding(
        shown(path), loop.function, loop.first_line, loop.last_line, verdict, reason,
        directive_line=loop.directive_line,
    )  # fmt: skip


def _lifted(path, loop: Loop, assume, deadline: float) -> Lifted | Finding:
    """A loop as a program, or the finding that says why not."""
    if time.monotonic() > deadline:
        return _finding(path, loop, UNKNOWN, "The time for this file is over (--time_limit_s).")
    lifted = lift(loop, assume=assume)
    return _finding(path, loop, UNKNOWN, lifted) if isinstance(lifted, str) else lifted


def _limit(deadline: float) -> float:
    return max(0.1, min(_LOOP_LIMIT_S, deadline - time.monotonic()))


def _advised(path: pathlib.Path, loop: Loop, assume, deadline: float) -> Finding:
    if loop.directive:
        return _checked(path, loop, assume, deadline)
    if loop.region:
        reason = f"The loop is already inside the directive {loop.region[0].split('(')[0]}."
        return _finding(path, loop, UNKNOWN, reason)
    lifted = _lifted(path, loop, assume, deadline)
    if isinstance(lifted, Finding):
        return lifted
    verdict = judge_serial(lifted, assume=assume, limit_s=_limit(deadline))
    finding = _told(path, loop, verdict)
    if finding.verdict != RACE_FREE:
        return finding
    pragma = write_pragma(verdict.pragma, loop.source.language)
    return finding._replace(
        verdict=WITH, pragma=pragma, insert=loop.first_line if loop.alone else 0
    )


def _checked(path: pathlib.Path, loop: Loop, assume, deadline: float) -> Finding:
    """What is said of a loop under its own directive, with another one where it races."""
    lifted = _lifted(path, loop, assume, deadline)
    if isinstance(lifted, Finding):
        return lifted
    if lifted.pragma is None:
        return _finding(path, loop, UNKNOWN, "The directive cannot be read.")
    verdict = judge_given(lifted, lifted.pragma, assume=assume, limit_s=_limit(deadline))
    finding = _told(path, loop, verdict)
    if finding.verdict == RACE and lifted.pragma.directive in WORKSHARING[:1]:
        other = judge_serial(lifted, assume=assume, limit_s=_limit(deadline))
        if other.judgement.verdict == "confirmed" and other.pragma is not None:
            return finding._replace(pragma=write_pragma(other.pragma, loop.source.language))
    return finding


def _told(path: pathlib.Path, loop: Loop, verdict: Verdict) -> Finding:
    names = {"confirmed": RACE_FREE, "refuted": RACE, "cannot tell": UNKNOWN}
    told = names[verdict.judgement.verdict]
    return _finding(path, loop, told, verdict.judgement.reason)._replace(
        lines=verdict.lines or (),
        notes=verdict.notes,
        verified_by="" if told == UNKNOWN else proof_name(),
    )


def all_findings(
    paths: Iterable[str], look, **options
) -> Iterator[tuple[pathlib.Path, bytes, list[Finding]]]:
    """Every file with its content and what `look`, `advise` or `check`, finds in it."""
    for path in source_files(paths):
        data = path.read_bytes()
        yield path, data, look(path, data, **options)
