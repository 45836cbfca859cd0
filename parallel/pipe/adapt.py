"""A pipe that chooses its own settings: the fastest by the model, from what it measures.

After each piece of a text (`jaxfm.parallel.generation.stream`) the policy knows what a tick costs
without drafts, with drafts of single tokens and with wide packets, and how often the right token
was the draft's first candidate, its second, ... It then takes the settings that
`jaxfm.parallel.pipe.speed.choose` finds fastest, if they promise more than `margin` over the
present ones. What the present settings do not show is tried again for one piece, ever more seldom
while that changes nothing: so speculation that does not pay is switched off, and on again when it
would.

The probability that the right token is among w candidates is estimated as survival times are, since
a narrow draft says nothing about the candidates that it leaves out (Kaplan and Meier 1958):

    1 - prod over r < w of (1 - h_r),   h_r = times it was candidate r / times it was none before

Limits are arrays, so nothing is compiled again, and the tokens are the same whatever is chosen.
Compare with the published, fixed policy: `published`.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfm.parallel.decode import Decoder, Policy
from jaxfm.parallel.pipe import scheduler
from jaxfm.parallel.pipe.scheduler import Limits
from jaxfm.parallel.pipe.speed import Choice, Pipe, choose, lockstep_rate, plain_rate
from jaxfm.parallel.pipe.state import Arrays, Counters
from jaxfm.parallel.verification import Stats

OFF, SINGLE, WIDE = range(3)  # kinds of tick: no drafts, packets of one token, of several
_KEPT = 5  # pieces of each kind whose times are remembered
_FIRST, _LONGEST = 16, 128  # pieces between two trials

Price = Callable[[Counters, float], float]


class PolicyState(NamedTuple):
    """What a policy knows.

    Attributes:
      hits: f64[w] times that the right token was each candidate, old ones counting less.
      tries: f64[w] times that it was none of the candidates before.
      latest: hits and tries of the last piece alone.
      tick_s: seconds of a tick in the latest pieces of each kind.
      choice: the present settings by the model.
      now: what the present piece is run with: the choice, or a trial.
      pieces: pieces so far.
      due: piece at which the next trial is.
      interval: pieces until the one after it.
      before: counts at the end of the last piece, and guesses that failed.
    """

    hits: np.ndarray
    tries: np.ndarray
    latest: tuple[np.ndarray, np.ndarray]
    tick_s: tuple[tuple[float, ...], ...]
    choice: Choice
    now: Choice
    pieces: int
    due: int
    interval: int
    before: tuple[Counters, int] | None


def adapt(
    decoder: Decoder, *, margin: float = 0.03, memory: int = 256, price: Price | None = None
) -> Decoder:
    """The pipe with settings that follow what is measured.

    Args:
      decoder: of `jaxfm.parallel.pipe.pipeinfer`, with a draft; its limits are the widest allowed.
      margin: by how much the expected speed must grow for a change.
      memory: tokens after which an observation counts half.
      price: `(counts of a piece, its seconds) -> cost`, if it is something else than the seconds
        (energy, say, or a given cost a tick).
    Raises:
      ValueError: a decoder without a draft, or a setting out of range.
    """
    if not isinstance(decoder.variables, Arrays):
        raise ValueError("Only a pipe adapts: give a decoder of `pipeinfer`.")
    most = jax.device_get(decoder.variables.limits)
    if most.width < 1:
        raise ValueError("The pipe has no draft (or a width of 0), so there is nothing to choose.")
    if not 0 <= margin < 1:
        raise ValueError(f"margin={margin}: give a share from 0 to below 1.")
    if memory < 1:
        raise ValueError(f"memory={memory}: give at least 1 token.")
    widest = Choice(int(most.width), int(most.levels), int(most.window), 0.0)
    nothing = np.zeros(widest.width)
    start = PolicyState(
        hits=nothing,
        tries=nothing,
        latest=(nothing, nothing),
        tick_s=((), (), ()),
        choice=widest,
        now=widest,
        pieces=0,
        due=0,
        interval=_FIRST,
        before=None,
    )
    step = functools.partial(_step, widest, margin, memory, price or (lambda _, seconds: seconds))
    return decoder._replace(policy=Policy(start, step))


def published(*, width: int = 3, levels: int = 1) -> Limits:
    """The published program's settings for a draft that agrees well with its target: cut-offs 0.1
    and 0.9, no recovery. Source: the repository of arXiv 2407.11798, its script for 8 nodes.

    Args:
      width, levels: branches, and tokens of one a tick; no more than the pipe was made for.
    """
    return scheduler.limits(width=width, levels=levels, accept=0.1, branch=0.9)


def _step(
    widest: Choice, margin: float, memory: int, price: Price, known: PolicyState, arrays: Arrays,
    counters: Counters, stats: Stats, seconds: float,
) -> tuple[PolicyState, Arrays]:  # fmt: skip
    """After a piece: learns, and sets the limits of the next one."""
    known = _observe(known, memory, price, counters, stats, seconds)
    known = decide(known, widest, margin, stages=len(counters.executed))
    limits = _limits(arrays.limits, known.now)
    return known, arrays._replace(limits=limits)


def _observe(
    known: PolicyState, memory: int, price: Price, counters: Counters, stats: Stats, seconds: float
) -> PolicyState:
    misses = int(stats.drafted.sum() - stats.accepted.sum())
    old, old_misses = known.before or (jax.tree.map(np.zeros_like, counters), 0)
    piece: Counters = jax.tree.map(np.subtract, counters, old)
    hits, tries = count(np.asarray(piece.places)[: len(known.hits)], misses - old_misses, known.now)
    kept = 0.5 ** (tries[0] / memory)
    tick_s = list(known.tick_s)
    # The first piece waits for the prompt and the compiler.
    if known.before is not None and piece.ticks > 0:
        one = price(piece, seconds) / int(piece.ticks)
        tick_s[kind(known.now)] = (*tick_s[kind(known.now)], one)[-_KEPT:]
    return known._replace(
        hits=kept * known.hits + hits,
        tries=kept * known.tries + tries,
        latest=(hits, tries),
        tick_s=tuple(tick_s),
        pieces=known.pieces + 1,
        before=(counters, misses),
    )


def count(places: np.ndarray, misses: int, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
    """How often each candidate was right, and how often none before it was, in one piece."""
    hits = places.astype(np.float64)
    later = hits[::-1].cumsum()[::-1]
    offered = np.arange(len(hits)) < choice.width
    return hits, np.where(offered, later + misses, 0.0)


def kind(choice: Choice) -> int:
    """What kind of ticks settings lead to."""
    if choice.width == 0:
        return OFF
    return SINGLE if choice.width * choice.levels == 1 else WIDE


def among(known: PolicyState) -> np.ndarray:
    """f64[w] probability that the right token is among the first 1, 2, ... w candidates; one half
    for each candidate that was never tried."""
    hazard = (known.hits + 0.5) / (known.tries + 1.0)
    return 1 - np.cumprod(1 - np.clip(hazard, 0, 1))


def measured(known: PolicyState, stages: int) -> Pipe:
    """The pipe as the model takes it: medians of the ticks' times; before a kind of tick was seen
    it is thought to cost nothing more, so that it gets tried."""
    mean = lambda i, otherwise: statistics.median(known.tick_s[i]) if known.tick_s[i] else otherwise
    seen = [t for times in known.tick_s for t in times]
    off = mean(OFF, min(seen, default=1.0))
    single = max(mean(SINGLE, off), off)
    wide = max(mean(WIDE, single), off)
    # Where only wide packets were drafted, all that they cost counts as theirs.
    extra = max(wide - single, 0.0) / off
    cost = lambda tokens: 1.0 + (extra if tokens > 1 else 0.0)
    return Pipe(stages, stage_s=off, draft_s=single - off, link_s=0.0, cost=cost)


def decide(known: PolicyState, widest: Choice, margin: float, *, stages: int) -> PolicyState:
    """The next piece's settings: the fastest known, or a trial of what was not seen for long."""
    pipe = measured(known, stages)
    pick = lambda right: choose(pipe, right, levels=widest.levels, rate=lockstep_rate)
    worth = (1 + margin) * _rate(pipe, among(known), known.choice)
    anew = known._replace(hits=known.latest[0], tries=known.latest[1])
    if known.choice.width == 0 < known.now.width and pick(among(anew)).rate > worth:
        known = anew  # a trial that contradicts what was known: the text has changed
    right = among(known)
    best, rate = pick(right), _rate(pipe, right, known.choice)
    better = best.rate > (1 + margin) * rate
    choice = best if better else known.choice._replace(rate=rate)
    kinds = {OFF: Choice(0, 1, 1, 0.0), SINGLE: Choice(1, 1, widest.window, 0.0), WIDE: widest}
    untried = [k for k in {kind(widest), SINGLE, OFF} if not known.tick_s[k]]
    if untried:
        return known._replace(choice=choice, now=kinds[max(untried)], due=known.pieces + _FIRST)
    interval = _FIRST if better and kind(best) != kind(known.choice) else known.interval
    if known.pieces < known.due:
        return known._replace(choice=choice, now=choice, interval=interval)
    # All that drafts can do shows in the widest; what drafts cost shows without.
    trial = widest if kind(choice) != kind(widest) else kinds[OFF]
    return known._replace(
        choice=choice, now=trial, due=known.pieces + interval,
        interval=min(2 * interval, _LONGEST),
    )  # fmt: skip


def _rate(pipe: Pipe, right: np.ndarray, choice: Choice) -> float:
    if choice.width == 0:
        return plain_rate(pipe)
    share = float(right[choice.width - 1])
    return lockstep_rate(pipe, share, levels=choice.levels, width=choice.width)


def _limits(old: Limits, choice: Choice) -> Limits:
    """The limits of a choice, where the old ones are: a program sees no difference."""
    changed: dict[str, Any] = {
        "width": choice.width, "levels": choice.levels, "window": max(choice.window, 1),
    }  # fmt: skip
    put = lambda name, value: jax.device_put(
        np.asarray(value, np.int32), getattr(old, name).sharding
    )
    return old._replace(**{name: put(name, value) for name, value in changed.items()})
