"""What a verifier is, and those that there are.

    for tool in present():
        for judgement in tool.verify(programs):
            ...

Each says *confirmed*, *refuted* or *cannot tell*, with a reason and with its name and version. They
speak of different claims, and a confirmation is worth as much as its `reach`: a proof for all
sizes, one for the sizes of the program, or that nothing was seen in a few runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from jaxfm.tasks.hpc.program import Judgement, Program
from jaxfm.tasks.hpc.proofs import clauses, enumeration, integer_sets
from jaxfm.tasks.hpc.verifiers import archer, same_output, thread_sanitizer

Claim = Literal["race-free", "right", "same results"]
Reach = Literal["all sizes", "these sizes", "these runs"]


class Verifier(NamedTuple):
    """A proof or a tool.

    Attributes:
        name: For tables; a judgement's `tool` has the version, too.
        claim: What is confirmed or refuted: "race-free"; "same results" as the serial program; or
            "right", which is both.
        reach: What a confirmation holds for.
        executes: Whether it compiles and runs the program, in the sandbox.
        available: Why it cannot be used here, as a sentence, or None.
        verify: One judgement for each program; tools that execute take kernels of the harness,
            too.
    """

    name: str
    claim: Claim
    reach: Reach
    executes: bool
    available: Callable[[], str | None]
    verify: Callable[[Sequence], list[Judgement]]


def _each(judge: Callable[[Program], Judgement]) -> Callable[[Sequence[Program]], list[Judgement]]:
    return lambda programs: [judge(program) for program in programs]


VERIFIERS: dict[str, Verifier] = {
    tool.name: tool
    for tool in (
        Verifier(
            "integer sets", "race-free", "all sizes", False,
            integer_sets.available, _each(integer_sets.for_all_sizes),
        ),
        Verifier(
            "enumeration", "race-free", "these sizes", False,
            lambda: None, _each(enumeration.judge),
        ),
        Verifier("clauses", "right", "these sizes", False, lambda: None, _each(clauses.right)),
        Verifier(
            "ThreadSanitizer", "race-free", "these runs", True,
            thread_sanitizer.available, thread_sanitizer.verify,
        ),
        Verifier("Archer", "race-free", "these runs", True, archer.available, archer.verify),
        Verifier(
            "same output", "same results", "these runs", True,
            same_output.available, same_output.verify,
        ),
    )
}  # fmt: skip


def present() -> list[Verifier]:
    """The verifiers that can be used here."""
    return [tool for tool in VERIFIERS.values() if tool.available() is None]
