"""T8: from a serial function to a parallel one; the label is one right answer of many.

What counts is that an answer compiles, runs in parallel, leaves the serial results and has no race:
see `verifiers.translation`. The metric of the record compares texts alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from jaxfm.tasks.hpc.directives import Question, canonical, parsed, placed
from jaxfm.tasks.hpc.families import LOOPS
from jaxfm.tasks.hpc.generator import Item, asked
from jaxfm.tasks.hpc.naming import restyle
from jaxfm.tasks.hpc.pragma_grammar import NONE
from jaxfm.tasks.hpc.program import Block, For, Path, Program, Standalone, walk
from jaxfm.tasks.hpc.proofs.clauses import minimal, with_pragma
from jaxfm.tasks.hpc.records.contract import Example, Record, register
from jaxfm.tasks.hpc.render import Language, loop_source, to_c, to_fortran


def function(item: Item, rng: random.Random, language: str) -> Iterator[Example]:
    """A serial function of which some loop can run in parallel; `item.program` is serial."""
    if item.target is None or language not in item.languages:
        return
    program, style = restyle(asked(item), rng)
    if any(isinstance(statement, Block | Standalone) for _, statement in walk(program.body)):
        return
    found = {path: minimal(program, path) for path in outer_loops(program)}
    if not any(found.values()):
        return
    write = to_c if language == "c" else to_fortran
    parallel = program
    for path, pragma in found.items():
        parallel = with_pragma(parallel, path, pragma)
    source, label = write(program, style=style).text, write(parallel, style=style).text
    yield Example(source, label, (), item.family, item._replace(program=program))


def outer_loops(program: Program) -> list[Path]:
    """The loops that stand in no other loop."""
    inside = lambda path, loops: any(path[: len(loop)] == loop for loop in loops)
    loops: list[Path] = []
    for path, statement in walk(program.body):
        if isinstance(statement, For) and not inside(path, loops):
            loops.append(path)
    return loops


def questions(program: Program, language: Language = "c", family: str = "") -> list[Question]:
    """What T2 asks of each outer loop of a serial program; answers are the minimal directives."""
    shown, found = loop_source(program, language), []
    for path in outer_loops(program):
        source = placed(shown, path, language)
        pragma = minimal(program, path)
        answer = canonical(pragma, program, source, language) if pragma else NONE
        found.append(Question(source, answer, program, path, language, family))
    return found


def translated(program: Program, answers: Sequence[tuple[Path, str]], language: Language) -> str:
    """The function with directives, given as text, before its loops; "none" leaves one serial."""
    for path, answer in answers:
        if answer != NONE:
            program = with_pragma(program, path, parsed(answer, language))
    return (to_c if language == "c" else to_fortran)(program).text


def exact(labels: Sequence, predictions: Sequence) -> dict[str, float]:
    """The share of answers that are the label, spaces aside."""
    same = [str(a).split() == str(b).split() for a, b in zip(labels, predictions)]
    return {"exact": sum(same) / len(same)}


def copied(train: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """The serial function as it is: it builds and is right, but is not parallel."""
    return [row.source for row in test]


def everywhere(train: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """`parallel for` before every outer loop, in C."""
    bare = "#pragma omp parallel for"
    programs = [row.item.program for row in test if row.item]
    return [translated(p, [(path, bare) for path in outer_loops(p)], "c") for p in programs]


register(Record("translation", function, tuple(LOOPS), exact,
                {"copy": copied, "parallel for everywhere": everywhere},
                "verifiers.translation"))  # fmt: skip
