"""The schedule of a pre-training run, as data.

    central phase:    x <- x - step on rows of public data
    federated phase:  x <- x + sum_i p_i (y_i - x), or what the algorithm makes of it

>>> phases_of(["central:120", "federated:2"])
(Phase(kind='central', length=120), Phase(kind='federated', length=2))
>>> units(phases_of(["central:120", "federated:2"]), chunk=50)[1:]
[Phase(kind='central', length=50), Phase(kind='central', length=20), \
Phase(kind='federated', length=1), Phase(kind='federated', length=1)]

Source: Yu et al. 2023 (Federated Foundation Models), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

Kind = Literal["central", "federated"]


class Phase(NamedTuple):
    """A part of a schedule.

    Attributes:
      kind: "central", on the server's public rows, or "federated", on the clients' own.
      length: steps of a central phase, rounds of a federated one.
    """

    kind: Kind
    length: int


def phases_of(texts: Sequence[str]) -> tuple[Phase, ...]:
    """The phases of a command line, each "central:STEPS" or "federated:ROUNDS".

    Raises:
      ValueError: a text that is neither.
    """
    return tuple(map(_phase, texts))


def check_phases(phases: Sequence[Phase]) -> None:
    """Raises ValueError where there is no phase, or one of no length or of an unknown kind."""
    if not phases:
        raise ValueError("A schedule has at least one phase, such as Phase('federated', 10).")
    for phase in phases:
        if phase.kind not in get_args(Kind) or phase.length < 1:
            raise ValueError(
                f"{phase} is no phase: give the kind central or federated and a length from 1."
            )


def units(phases: Sequence[Phase], chunk: int) -> list[Phase]:
    """The schedule in the steps of a run: single rounds, and up to `chunk` central steps.

    Raises:
      ValueError: as of `check_phases`; chunk below 1.
    """
    check_phases(phases)
    if chunk < 1:
        raise ValueError(f"central_chunk={chunk} must be at least 1.")
    result: list[Phase] = []
    for kind, length in phases:
        most = 1 if kind == "federated" else chunk
        whole, rest = divmod(length, most)
        result += [Phase(kind, most)] * whole + [Phase(kind, rest)] * bool(rest)
    return result


def behind(done: Sequence[Phase]) -> tuple[int, int]:
    """(rounds, central steps) of these units."""
    of = lambda kind: sum(unit.length for unit in done if unit.kind == kind)
    return of("federated"), of("central")


def _phase(text: str) -> Phase:
    kind, _, length = text.partition(":")
    for known in get_args(Kind):
        if kind == known and length.isdecimal() and int(length):
            return Phase(known, int(length))
    raise ValueError(
        f"phases={text!r} is no phase; give central:STEPS or federated:ROUNDS, as central:200."
    )
