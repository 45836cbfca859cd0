"""What XLA says of a program that it has compiled: operations, bytes and collectives.

>>> import jax, jax.numpy as jnp
>>> x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
>>> program = read_program(jax.jit(lambda x: x @ x.T).lower(x).compile())
>>> program.flops, program.collectives
(2048.0, ())
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple, get_args

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all"]

_CALL = re.compile(rf"= (.+?) ({'|'.join(get_args(Kind))})(?:-start)?\(")
_SHAPE = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """An exchange between devices.

    Attributes:
      kind: XLA's name.
      nbytes: of what leaves it on one device; of a reduce-scatter, of what enters it.
    """

    kind: Kind
    nbytes: float


class Program(NamedTuple):
    """What one device does when a program runs once.

    The body of a loop counts once, however often it runs.

    Attributes:
      flops: floating-point operations.
      nbytes: read and written in memory, as XLA counts them after fusion.
      collectives: in the order of the text.
    """

    flops: float
    nbytes: float
    collectives: tuple[Collective, ...] = ()

    def part(self, share: float) -> Program:
        """A program with this share of the operations and bytes, and of each exchange."""
        parts = tuple(c._replace(nbytes=c.nbytes * share) for c in self.collectives)
        return Program(self.flops * share, self.nbytes * share, parts)


def read_program(compiled: Any) -> Program:
    """Reads a compiled program (`jax.stages.Compiled`).

    Raises:
      ValueError: a collective stands in a loop or a branch, so that nobody knows how often it runs.
    """
    costs = compiled.cost_analysis()
    return Program(
        max(0.0, costs.get("flops", 0.0)), costs.get("bytes accessed", 0.0),
        read_collectives(compiled.as_text()),
    )  # fmt: skip


def read_collectives(text: str) -> tuple[Collective, ...]:
    """The collectives of an HLO text, those that XLA has combined as one.

    Raises:
      ValueError: as of `read_program`.
    """
    found: list[Collective] = []
    is_entry = False
    for line in text.splitlines():
        if line and not line[0].isspace():  # the head of a computation, or its end
            is_entry = line.startswith("ENTRY")
        if (call := _CALL.search(line)) is None:
            continue
        if not is_entry:
            raise ValueError(
                f"This program has a collective ({call[2]}) in a loop or a branch: give one whose "
                "collectives each run once, as a single step with its layers taken apart."
            )
        kind: Any = call[2]
        found.append(Collective(kind, sum(map(_nbytes, _SHAPE.finditer(call[1])))))
    return tuple(found)


def _nbytes(shape: re.Match[str]) -> float:
    """The bytes of an array as HLO writes its type: f32[8,16]."""
    size = 1.0
    for dim in filter(None, shape[3].split(",")):
        size *= int(dim)
    return size * (1 if shape[1] == "pred" else int(shape[2]) / 8)
