"""T2 as text: a source with a place for a directive, and the directive that belongs there.

What a model reads is the statements of a program with an empty directive (`#pragma omp`, `!$omp`)
before the loop in question; what it writes, after all of them, is the whole directive, or "none"
where no choice of clauses makes the loop right. So a model that reads from left to right sees the
loop first. Directives are written in one form: clauses in the order of `pragma_grammar`, names in
the order of the source. Source: the pragma after its loop is OMPGPT's (Chen et al. 2024).
"""

from __future__ import annotations

import random
from typing import NamedTuple

from jaxfm.tasks.hpc.frontend.pragmas import parse_pragma, write_pragma
from jaxfm.tasks.hpc.frontend.source import Outside
from jaxfm.tasks.hpc.generator import Item, asked
from jaxfm.tasks.hpc.lexer import lex
from jaxfm.tasks.hpc.naming import restyle
from jaxfm.tasks.hpc.pragma_grammar import NONE, OPERATORS, pragma_grammar
from jaxfm.tasks.hpc.program import Clause, For, Judgement, Path, Pragma, Program, walk
from jaxfm.tasks.hpc.proofs.clauses import (
    own_names,
    propose,
    right,
    statement_at,
    with_pragma,
    written,
)
from jaxfm.tasks.hpc.render import CWriter, Language, Rendered, Style, loop_source

PLACES = {"c": "#pragma omp", "fortran": "!$omp"}
_READER = "reader of directives"
_ONE_NAME = ("private", "firstprivate", "lastprivate")


class Question(NamedTuple):
    """A loop that asks for its directive.

    Attributes:
        source: What a model reads; it ends with a line break.
        answer: The directive with the fewest clauses, or "none".
        program: The program, with the names of the source; the loop is serial in it.
        path: Where the loop stands.
        language: Of the source.
        family: The generator's.
    """

    source: str
    answer: str
    program: Program
    path: Path
    language: Language
    family: str


def question(item: Item, rng: random.Random, language: Language = "c") -> Question | None:
    """The question that an item asks; None if it asks for no directive, or it cannot be judged."""
    if item.target is None or language not in item.languages:
        return None
    program, style = restyle(asked(item), rng)
    proposal = propose(program, item.target)
    if proposal.trace.unknown:
        return None
    source = placed(loop_source(program, language, style), item.target, language)
    answer = NONE
    if proposal.pragma is not None:
        answer = canonical(proposal.pragma, program, source, language)
    return Question(source, answer, program, item.target, language, item.family)


def placed(shown: Rendered, path: Path, language: Language) -> str:
    """A source with an empty directive before the loop at a path."""
    lines = shown.text.splitlines(keepends=True)
    at = shown.lines[path] - 1
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    return "".join([*lines[:at], f"{indent}{PLACES[language]}\n", *lines[at:]])


def canonical(pragma: Pragma, program: Program, source: str, language: Language) -> str:
    """A directive of a loop in the one form in which it is written, as `pragma_grammar` says."""
    order = _order(source)
    listed = lambda names: tuple(sorted(dict.fromkeys(names), key=lambda n: order.get(n, 0)))
    clauses = [Clause(name, listed(pragma.named(name))) for name in _ONE_NAME if pragma.named(name)]
    for operator in OPERATORS[language]:
        reduced = [
            name
            for clause in pragma.clauses
            if clause.name == "reduction" and clause.modifier == operator
            for name in clause.arguments
        ]
        if reduced:
            whole = (section(str(name), program, language) for name in listed(reduced))
            clauses.append(Clause("reduction", tuple(whole), operator))
    clauses += [clause for clause in pragma.clauses if clause.name in ("collapse", "schedule")]
    return write_pragma(pragma._replace(clauses=tuple(clauses)), language)


def section(name: str, program: Program, language: Language) -> str:
    """A name as an argument of a reduction: in C, an array's section."""
    if language != "c":
        return name
    return CWriter(program, Style()).listed(Clause("reduction"), name)


def grammar_of(asked: Question) -> str:
    """The directives that may stand there: clauses name only scalars and arrays of the loop."""
    loop = statement_at(asked.program.body, asked.path)
    assert isinstance(loop, For)
    inside = set().union(*(own_names(s) for _, s in walk((loop,)))) - {loop.var}
    order = _order(asked.source)
    listed = lambda declared, among: sorted(
        (x.name for x in declared if x.name in among), key=lambda name: order.get(name, 0)
    )
    scalars = listed(asked.program.scalars, inside)
    arrays = listed(asked.program.arrays, written(loop.body))
    sections = [section(name, asked.program, asked.language) for name in arrays]
    return pragma_grammar(scalars, sections=sections, language=asked.language)


def judge(asked: Question, text: str) -> Judgement:
    """Whether an answer is right, by the exact enumeration; clauses count by their meaning."""
    line = text.strip()
    if line == NONE:
        proposal = propose(asked.program, asked.path)
        if proposal.pragma is not None:
            return Judgement("refuted", "A directive makes the loop right.", _READER)
        return Judgement("confirmed", "No choice of clauses makes the loop right.", _READER)
    sentinel = "#pragma" if asked.language == "c" else "!$"
    if not line.startswith(sentinel):
        return Judgement("refuted", "It is no directive.", _READER)
    try:
        pragma = parse_pragma(line[len(sentinel) :], asked.language)
    except Outside as reason:
        return Judgement("refuted", str(reason), _READER)
    if pragma is None or pragma.directive != "parallel for":
        return Judgement("refuted", "It is no directive that makes a loop parallel.", _READER)
    whole = tuple(
        c._replace(arguments=tuple(str(a).partition("[")[0] for a in c.arguments))
        if c.name == "reduction" else c
        for c in pragma.clauses
    )  # fmt: skip
    pragma = pragma._replace(clauses=whole)
    return right(with_pragma(asked.program, asked.path, pragma))


def _order(source: str) -> dict[str, int]:
    """The place at which each piece of a text first occurs."""
    found: dict[str, int] = {}
    for piece in lex(source):
        found.setdefault(piece.text, piece.start)
    return found
