"""Every way of decoding the same text on the same simulated cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxfm.parallel.pipe.speed import Pipe
from jaxfm.parallel.simulation.heads import Head, RoundHead
from jaxfm.parallel.simulation.simulator import Timing, best_speculative, draw_ranks, simulate


def compare(
    pipe: Pipe,
    right: Sequence[float],
    *,
    tokens: int = 1000,
    width: int = 1,
    levels: int = 1,
    fixed_length: int = 8,
    factors: Sequence[float] | None = None,
    jitter: float = 0.0,
    seed: int = 0,
) -> dict[str, Timing]:
    """The timing of each way of decoding: plain, draft-then-verify, and continuous speculation.

    Args:
      pipe: the cluster's times.
      right: right[w - 1] is the probability that the next token is among the draft's first w.
      tokens: length of the text.
      width: candidates kept alive at each depth by the tree; 1: no tree is compared.
      levels: tokens of a path drafted at once.
      fixed_length: draft length of one of the two that draft and verify; the other has the best.
      factors, jitter: as in `jaxfm.parallel.simulation.simulator.simulate`.
      seed: of the text and the jitter.
    """
    ranks = draw_ranks(tokens, right, seed=seed)
    length, _ = best_speculative(ranks, pipe)
    # A draft of which only the best candidate is used is right where the rank is 0.
    ways: dict[str, Head] = {
        "plain": Head(ranks, width=0),
        f"draft-then-verify, best length {length}": RoundHead(ranks, length),
        f"draft-then-verify, length {fixed_length}": RoundHead(ranks, fixed_length),
        "continuous, as published": Head(ranks, levels=levels, duplicates=True),
        "continuous, chain": Head(ranks, levels=levels),
    }
    if width > 1:
        ways[f"continuous, tree of {width}"] = Head(ranks, width=width, levels=levels)
    times: dict[str, Any] = {"factors": factors, "jitter": jitter, "seed": seed}
    return {name: simulate(head, pipe, **times) for name, head in ways.items()}


def speed_ups(timings: Mapping[str, Timing]) -> dict[str, float]:
    """How much faster than plain decoding each way is, by its name without the best length."""
    plain = timings["plain"].rate
    short = lambda name: "draft-then-verify" if "best length" in name else name
    return {short(name): float(t.rate / plain) for name, t in timings.items() if name != "plain"}
