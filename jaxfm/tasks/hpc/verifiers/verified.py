"""Whether an answer stands before every verifier that is present: one that refutes it suffices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxfm.tasks.hpc.frontend.pragmas import parse_pragma
from jaxfm.tasks.hpc.frontend.source import Outside
from jaxfm.tasks.hpc.pragma_grammar import NONE
from jaxfm.tasks.hpc.program import (
    Clause,
    For,
    Judgement,
    Path,
    Pragma,
    Program,
    Verdict,
    dtypes,
    walk,
)
from jaxfm.tasks.hpc.proofs.clauses import propose, statement_at, with_pragma
from jaxfm.tasks.hpc.proofs.enumeration import TOOL
from jaxfm.tasks.hpc.verifiers.verifier import Reach, Verifier, present

SHARING = ("private", "firstprivate", "lastprivate", "reduction", "shared")
COPIES = {"firstprivate", "lastprivate"}
REACHES: tuple[Reach, ...] = ("all sizes", "these sizes", "these runs")


class Verified(NamedTuple):
    """What all verifiers together say of an answer.

    Attributes:
        verdict: "refuted" if one refutes it; "confirmed" if one confirms that it is race-free and
            one that its results are those of the serial program; else "cannot tell".
        reason: Of the judgement that decided.
        reach: Of the strongest confirmation that there is no race; empty unless confirmed.
        judgements: By verifier, what each said.
    """

    verdict: Verdict
    reason: str
    reach: Reach | Literal[""]
    judgements: dict[str, Judgement]


def pragma_verified(
    program: Program,
    pragma: Pragma | str | None,
    path: Path = (0,),
    *,
    verifiers: Sequence[Verifier] | None = None,
    language: str = "c",
) -> Verified:
    """Whether a directive makes a serial loop of a program right; see `pragmas_verified`."""
    return pragmas_verified([(program, pragma, path)], verifiers=verifiers, language=language)[0]


def pragmas_verified(
    answers: Sequence[tuple[Program, Pragma | str | None, Path]],
    *,
    verifiers: Sequence[Verifier] | None = None,
    language: str = "c",
) -> list[Verified]:
    """Whether directives make serial loops right: race-free, and with the serial results.

    Args:
        answers: A program whose loop at the path is serial, and the directive: a `Pragma`, its
            line as a model wrote it, or None (or "none") for "no directive makes it right".
        verifiers: Those to ask; all that are present otherwise. Tools that run programs run all
            answers together, and only those that no proof refutes.
        language: Of directives as text, "c" or "fortran".

    Raises:
        ValueError: There is no loop at the path.
    """
    tools = present() if verifiers is None else list(verifiers)
    found: list[Verified | None] = []
    asked: list[tuple[int, Program]] = []
    for program, answer, path in answers:
        if not isinstance(statement_at(program.body, path), For):
            raise ValueError(f"The statement at {path} is no loop; give the path of a loop.")
        pragma = _read(answer, program, language) if isinstance(answer, str) else answer
        if pragma is None:
            found.append(_none(program, path))
        elif isinstance(pragma, Judgement):
            found.append(combined({"text": pragma}, {}))
        else:
            found.append(None)
            asked.append((len(found) - 1, with_pragma(program, path, pragma)))
    judged = _judged([program for _, program in asked], tools)
    claims = {tool.name: tool for tool in tools}
    for (place, _), judgements in zip(asked, judged):
        found[place] = combined(judgements, claims)
    return [result for result in found if result is not None]


def _judged(programs: Sequence[Program], tools: Sequence[Verifier]) -> list[dict[str, Judgement]]:
    """The judgements of each program; proofs come first, and what they refute is not run."""
    found: list[dict[str, Judgement]] = [{} for _ in programs]
    for tool in sorted(tools, key=lambda tool: tool.executes):
        places = [
            k for k, judgements in enumerate(found)
            if not tool.executes or all(j.verdict != "refuted" for j in judgements.values())
        ]  # fmt: skip
        if places:
            for k, judgement in zip(places, tool.verify([programs[k] for k in places])):
                found[k][tool.name] = judgement
    return found


def combined(judgements: dict[str, Judgement], tools: dict[str, Verifier]) -> Verified:
    """The verdict of all judgements; see `Verified`. What is no verifier's can only refute."""
    for judgement in judgements.values():
        if judgement.verdict == "refuted":
            return Verified("refuted", judgement.reason, "", judgements)
    known = {name: j for name, j in judgements.items() if name in tools}
    sure = [tools[name] for name, j in known.items() if j.verdict == "confirmed"]
    reaches = [tool.reach for tool in sure if tool.claim != "same results"]
    reach: Reach | Literal[""] = next((reach for reach in REACHES if reach in reaches), "")
    for claim in ("race-free", "same results"):
        if not any(tool.claim in (claim, "right") for tool in sure):
            doubt = [j for name, j in known.items() if tools[name].claim in (claim, "right")]
            reason = doubt[0].reason if doubt else f"No verifier says whether it is {claim}."
            return Verified("cannot tell", reason, "", judgements)
    best = min(sure, key=lambda tool: REACHES.index(tool.reach))
    return Verified("confirmed", judgements[best.name].reason, reach, judgements)


def _read(text: str, program: Program, language: str) -> Pragma | Judgement | None:
    """A directive as a model wrote it; a refutation where it is none."""
    line = text.strip()
    sentinel = "#pragma" if language == "c" else "!$"
    if line == NONE:
        return None
    refused = lambda reason: Judgement("refuted", reason, "reader of directives")
    if not line.lower().startswith(sentinel) or "\n" in line:
        return refused("It is no directive of one line.")
    try:
        pragma = parse_pragma(line[len(sentinel) :], language)
    except Outside as outside:
        return refused(str(outside))
    if pragma is None or pragma.directive not in ("parallel for", "parallel for simd"):
        return refused("It is no directive that makes a loop parallel.")
    clauses = tuple(_whole_arrays(clause) for clause in pragma.clauses)
    if reason := _misnamed(program, pragma._replace(clauses=clauses), language):
        return refused(reason)
    return pragma._replace(clauses=clauses)


def _whole_arrays(clause: Clause) -> Clause:
    """A clause whose sections of arrays are the arrays, as a `Clause` has them."""
    if clause.name != "reduction":
        return clause
    names = tuple(str(argument).partition("[")[0].strip() for argument in clause.arguments)
    return clause._replace(arguments=names)


def _misnamed(program: Program, pragma: Pragma, language: str) -> str:
    """Why a directive's lists of names are wrong; empty if they are right."""
    declared = set(dtypes(program))
    if language == "fortran":
        declared |= {s.var for _, s in walk(program.body) if isinstance(s, For)}
    clauses = {name: pragma.named(name) for name in SHARING}
    for name, listed in clauses.items():
        for variable in listed:
            if variable not in declared:
                return f"The clause {name} names {variable}, which is not declared."
            others = [other for other, more in clauses.items() if variable in more]
            if listed.count(variable) > 1 or (len(others) > 1 and set(others) != COPIES):
                return f"The clauses name {variable} twice."
    return ""


def _none(program: Program, path: Path) -> Verified:
    """Whether "no directive makes it right" is so, by the enumeration."""
    proposal = propose(program, path)
    if proposal.pragma is not None:
        judgement = Judgement("refuted", "A directive makes the loop right.", TOOL)
    elif proposal.trace.unknown or proposal.order:
        order = f"The order of critical sections may decide {proposal.order}."
        judgement = Judgement("cannot tell", proposal.trace.unknown or order, TOOL)
    else:
        judgement = Judgement("confirmed", "No choice of clauses makes the loop right.", TOOL)
    reach: Reach | Literal[""] = "these sizes" if judgement.verdict == "confirmed" else ""
    return Verified(judgement.verdict, judgement.reason, reach, {"clauses": judgement})
