"""T2 as text: a source with a place for a directive, and the directive that belongs there.

What a model reads is the statements of a program with an empty directive (`#pragma omp`, `!$omp`)
before the loop in question; what it writes, after all of them, is the whole directive, or "none"
where no choice of clauses makes the loop right. So a model that reads from left to right sees the
loop first. Directives are written in one form: clauses in the order of `pragma_grammar`, names in
the order of the source. Source: the pragma after its loop is OMPGPT's (Chen et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxfm.tasks.hpc.frontend.pragmas import parse_pragma, write_pragma
from jaxfm.tasks.hpc.graph import notes
from jaxfm.tasks.hpc.lexer import compact, lex, rename
from jaxfm.tasks.hpc.naming import named, renamed
from jaxfm.tasks.hpc.pragma_grammar import OPERATORS, pragma_grammar
from jaxfm.tasks.hpc.program import Clause, For, Path, Pragma, Program, Ref, walk
from jaxfm.tasks.hpc.proofs.clauses import own_names, statement_at, written
from jaxfm.tasks.hpc.render import CWriter, Language, Rendered, Style
from jaxfm.tasks.hpc.verifiers.verified import Verified, pragmas_verified
from jaxfm.tasks.hpc.verifiers.verifier import VERIFIERS, Verifier

PLACES: dict[Language, str] = {"c": "#pragma omp", "fortran": "!$omp"}
_SHARED_OUT: dict[str, str] = {
    "#pragma omp": "#pragma omp parallel for",
    "!$omp": "!$omp parallel do",
}
PROOFS = (VERIFIERS["enumeration"], VERIFIERS["clauses"])
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


def placed(shown: Rendered, path: Path, language: Language) -> str:
    """A source with an empty directive before the loop at a path."""
    lines = shown.text.splitlines(keepends=True)
    at = shown.lines[path] - 1
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    return "".join([*lines[:at], f"{indent}{PLACES[language]}\n", *lines[at:]])


def prompt(source: str, noted: bool = False) -> str:
    """What a decoder reads of a source of T2: the source without its layout.

    Args:
        source: Of a `Question`.
        noted: Whether `graph.notes` stands behind it, of the loop as shared out by a directive
            without clauses.
    """
    text = compact(source) + "\n"
    if not noted:
        return text
    lines = (_SHARED_OUT.get(line, line) for line in text.splitlines())
    return text + notes("\n".join(lines))


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


def parsed(answer: str, language: Language) -> Pragma:
    """The directive of a text in the form of `canonical`; arrays stand without their sections.

    Raises:
        ValueError: It is none.
    """
    sentinel = "#pragma" if language == "c" else "!$"
    pragma = None
    if answer.startswith(sentinel):
        pragma = parse_pragma(answer[len(sentinel) :], language)
    if pragma is None:
        raise ValueError(f"{answer!r} is no OpenMP directive; it begins with {PLACES[language]!r}.")
    whole = lambda name: name if isinstance(name, Ref) else name.partition("[")[0]
    clauses = (c._replace(arguments=tuple(map(whole, c.arguments))) for c in pragma.clauses)
    return pragma._replace(clauses=tuple(clauses))


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


def verified(
    asked: Sequence[tuple[Question, str]], verifiers: Sequence[Verifier] = PROOFS
) -> list[Verified]:
    """What verifiers say of answers, the exact enumeration by default; see `pragmas_verified`."""
    found = []
    for language in PLACES:
        own = [(n, q, text) for n, (q, text) in enumerate(asked) if q.language == language]
        triples = [(q.program, text, q.path) for _, q, text in own]
        said = pragmas_verified(triples, verifiers=verifiers, language=language)
        found += [(n, result) for (n, _, _), result in zip(own, said)]
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def in_order(asked: Question) -> Question:
    """The same with names v0, v1, ... by the order of their first use, as `lexer.rename` gives."""
    new = {name: short for short, name in rename(asked.source).names.items()}
    unused = (name for name in named(asked.program) if name not in new)
    return with_names(asked, new | {name: f"v{len(new) + k}" for k, name in enumerate(unused)})


def with_names(asked: Question, new: dict[str, str]) -> Question:
    """The same with other names."""
    change = lambda text: "".join(new.get(piece.text, piece.text) for piece in lex(text))
    return asked._replace(
        source=change(asked.source), answer=change(asked.answer),
        program=renamed(asked.program, new),
    )  # fmt: skip


def _order(source: str) -> dict[str, int]:
    """The place at which each piece of a text first occurs."""
    found: dict[str, int] = {}
    for piece in lex(source):
        found.setdefault(piece.text, piece.start)
    return found
