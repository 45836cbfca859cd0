"""How fast a pipe decodes: closed forms, and the settings that they find fastest.

Symbols: S stages, t_s seconds a stage takes for one token, l seconds a hop, T = S (t_s + l) one
trip, t_d seconds the draft takes for a token, a the share of drafts that are right, g the draft's
length, b(k) the cost of k tokens in a stage relative to one (1 where weights dominate, as on
accelerators). Source: Leviathan et al. 2023, theorem 3.8 for `speculative_rate`; `continuous_rate`
follows from a cycle of accepted tokens, one every tau, that a mismatch ends with one trip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Cost = Callable[[float], float]


def linear_cost(per_token: float) -> Cost:
    """The cost b(k) = 1 + per_token (k - 1): 0 if extra tokens are free, 1 if each costs a pass."""
    return lambda tokens: 1 + per_token * (tokens - 1)


class Pipe(NamedTuple):
    """The times of a pipe and its draft.

    Attributes:
      stages: S.
      stage_s: t_s.
      draft_s: t_d.
      link_s: l.
      cost: b.
    """

    stages: int
    stage_s: float = 1.0
    draft_s: float = 1.0
    link_s: float = 0.0
    cost: Cost = linear_cost(0.0)

    @property
    def trip_s(self) -> float:
        """T, seconds from launch to answer."""
        return self.stages * (self.stage_s + self.link_s)


def plain_rate(pipe: Pipe) -> float:
    """Tokens a second without drafts: 1 / T."""
    return 1 / pipe.trip_s


def speculative_rate(pipe: Pipe, right: float, length: int) -> float:
    """Tokens a second of draft-then-verify.

    A round gives (1 - a^(g+1)) / (1 - a) of them and takes g t_d + S (t_s b(g + 1) + l).
    """
    expected = sum(right**i for i in range(length + 1))
    verify = pipe.stages * (pipe.stage_s * pipe.cost(length + 1) + pipe.link_s)
    return expected / (length * pipe.draft_s + verify)


def best_length(pipe: Pipe, right: float, most: int = 64) -> int:
    """The draft length that makes draft-then-verify fastest; 0: drafting does not pay."""
    return max(range(most + 1), key=lambda length: speculative_rate(pipe, right, length))


def continuous_rate(pipe: Pipe, right: float, *, levels: int = 1, width: int = 1) -> float:
    """Tokens a second of continuous speculation: 1 / ((1 - a) T + a tau).

    tau = max(t_d, t_s b(k w) / k) for k levels of w candidates a packet.

    Args:
      right: probability that one of the w candidates is right.
    """
    tau = max(pipe.draft_s, pipe.stage_s * pipe.cost(levels * width) / levels)
    trip = pipe.stages * (pipe.stage_s * pipe.cost(width) + pipe.link_s)
    return 1 / ((1 - right) * trip + right * tau)


def lockstep_rate(pipe: Pipe, right: float, *, levels: int = 1, width: int = 1) -> float:
    """Tokens a second of continuous speculation where all nodes take a step together, as in
    `jaxfm.parallel.pipe.pipeinfer`: 1 / (tick ((1 - a) S + a / k)), tick = t_s b(k w) + l + t_d.

    Args:
      pipe: its draft time is how much longer a tick takes with a draft than without.
      right: probability that one of the w candidates is right.
    """
    tick = pipe.stage_s * pipe.cost(levels * width) + pipe.link_s + pipe.draft_s
    return 1 / (tick * ((1 - right) * pipe.stages + right / levels))


class Choice(NamedTuple):
    """Settings, and the speed that is expected with them.

    Attributes:
      width, levels: as in `jaxfm.parallel.pipe.scheduler.Limits`; a width of 0: do not speculate.
      window: packets in flight that keep the pipe full, T / tau + 1.
      rate: tokens a second.
    """

    width: int
    levels: int
    window: int
    rate: float


def choose(
    pipe: Pipe,
    right: Sequence[float] | np.ndarray,
    *,
    levels: int = 1,
    rate: Callable[..., float] = continuous_rate,
) -> Choice:
    """The settings with which a pipe is fastest, by the model.

    Args:
      pipe: measured.
      right: right[w - 1] is the measured probability that the next token is among w candidates.
      levels: most levels a packet.
      rate: the model: `continuous_rate`, or `lockstep_rate`.
    Raises:
      ValueError: a probability outside [0, 1].
    """
    for share in right:
        if not 0 <= share <= 1:
            raise ValueError(f"right={list(right)}: each must be a probability from 0 to 1.")
    best = Choice(0, 1, 1, plain_rate(pipe))
    for width, share in enumerate(right, start=1):
        for deep in range(1, levels + 1):
            speed = rate(pipe, share, levels=deep, width=width)
            if speed > best.rate:
                tau = max(pipe.draft_s * deep, pipe.stage_s * pipe.cost(deep * width))
                best = Choice(width, deep, int(pipe.trip_s / tau) + 2, speed)
    return best
