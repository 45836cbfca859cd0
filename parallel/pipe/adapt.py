"""A pipe that chooses its own settings: those that a model of its speed finds fastest.

After each piece of a text (`jaxfm.parallel.generation.stream`) the policy knows what a tick costs
without drafts, with drafts of single tokens and with wide packets, and how often the right token
was the draft's first candidate, its second, ... It then takes the settings that
`jaxfm.parallel.pipe.speed.choose` finds fastest, if they promise more than `margin` over the
present ones. What the present settings cannot show is tried again for one piece, less and less
often while that changes nothing. So speculation that does not pay is switched off, and switched on
again when it would pay.

The probability that the right token is among w candidates is estimated as survival times are, since
a narrow draft says nothing about the candidates that it leaves out (Kaplan and Meier 1958):

    1 - prod over r < w of (1 - h_r),   h_r = times it was candidate r / times it was none before

Limits are arrays, so nothing is compiled again, and the tokens are the same whatever is chosen. The
published policy is fixed: `limits_published`.
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
    """What a policy has measured, and what it has chosen.

    Attributes:
      hits: f64[w] how often the right token was each candidate; older observations count less.
      tries: f64[w] how often it was none of the candidates before.
      latest: hits and tries of the last piece only.
      tick_s: seconds of a tick in the latest pieces of each kind.
      choice: the settings that are fastest by the model.
      now: the settings of the present piece: the choice, or a trial.
      pieces: number of pieces so far.
      due: the piece at which the next trial is made.
      interval: pieces between that trial and the next.
      before: counts at the end of the last piece, and the number of wrong guesses until then.
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
      decoder: of `pipeinfer`, with a drafter; its limits are the widest that are allowed.
      margin: share by which the expected speed must grow for a change.
      memory: tokens after which an observation counts half.
      price: `(counts of a piece, its seconds) -> cost`, if the cost is not the time (but energy,
        say, or a given cost a tick); None: the seconds.
    Raises:
      ValueError: a decoder without a draft, or a setting out of range.
    """
    if not isinstance(decoder.variables, Arrays):
        raise ValueError("Only a pipe can adapt: give a decoder of `pipeinfer`.")
    most = jax.device_get(decoder.variables.limits)
    if most.width < 1:
        raise ValueError(
            "The pipe has no draft (or a width of 0), so nothing can be chosen; give a drafter."
        )
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


def limits_published(*, width: int = 3, levels: int = 1) -> Limits:
    """The published program's settings for a draft that agrees well with its target: cut-offs 0.1
    and 0.9, no recovery. Source: the repository of arXiv 2407.11798, its script for 8 nodes.

    Args:
      width, levels: branches, and tokens of one a tick; no more than the pipe was made for.
    """
    return scheduler.limits(width=width, levels=levels, accept=0.1, branch=0.9)


def _step(
    widest: Choice, margin: float, memory: int, price: Price, state: PolicyState, arrays: Arrays,
    counters: Counters, stats: Stats, seconds: float,
) -> tuple[PolicyState, Arrays]:  # fmt: skip
    """The policy's state after a piece, and the arrays with the limits of the next one."""
    state = _observe(state, memory, price, counters, stats, seconds)
    state = decide(state, widest, margin, stages=len(counters.executed))
    limits = _limits(arrays.limits, state.now)
    return state, arrays._replace(limits=limits)


def _observe(
    state: PolicyState, memory: int, price: Price, counters: Counters, stats: Stats, seconds: float
) -> PolicyState:
    misses = int(stats.drafted.sum() - stats.accepted.sum())
    old, old_misses = state.before or (jax.tree.map(np.zeros_like, counters), 0)
    piece: Counters = jax.tree.map(np.subtract, counters, old)
    hits, tries = count(np.asarray(piece.places)[: len(state.hits)], misses - old_misses, state.now)
    kept = 0.5 ** (tries[0] / memory)
    tick_s = list(state.tick_s)
    # The first piece waits for the prompt and the compiler.
    if state.before is not None and piece.ticks > 0:
        one = price(piece, seconds) / int(piece.ticks)
        tick_s[kind(state.now)] = (*tick_s[kind(state.now)], one)[-_KEPT:]
    return state._replace(
        hits=kept * state.hits + hits,
        tries=kept * state.tries + tries,
        latest=(hits, tries),
        tick_s=tuple(tick_s),
        pieces=state.pieces + 1,
        before=(counters, misses),
    )


def count(places: np.ndarray, misses: int, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
    """How often each candidate was right, and how often none before it was, in one piece."""
    hits = places.astype(np.float64)
    later = hits[::-1].cumsum()[::-1]
    offered = np.arange(len(hits)) < choice.width
    return hits, np.where(offered, later + misses, 0.0)


def kind(choice: Choice) -> int:
    """The kind of ticks that settings lead to."""
    if choice.width == 0:
        return OFF
    return SINGLE if choice.width * choice.levels == 1 else WIDE


def among(state: PolicyState) -> np.ndarray:
    """f64[w] probability that the right token is among the first 1, 2, ... w candidates; one half
    for each candidate that was never tried."""
    hazard = (state.hits + 0.5) / (state.tries + 1.0)
    return 1 - np.cumprod(1 - np.clip(hazard, 0, 1))


def measured(state: PolicyState, stages: int) -> Pipe:
    """The pipe as measured, by the medians of the ticks' times.

    A kind of tick that has not been seen yet is assumed to cost nothing more, so that it is tried.
    """
    mean = lambda i, otherwise: statistics.median(state.tick_s[i]) if state.tick_s[i] else otherwise
    seen = [t for times in state.tick_s for t in times]
    off = mean(OFF, min(seen, default=1.0))
    single = max(mean(SINGLE, off), off)
    wide = max(mean(WIDE, single), off)
    # Where only wide packets were drafted, their whole extra cost is attributed to them.
    extra = max(wide - single, 0.0) / off
    cost = lambda tokens: 1.0 + (extra if tokens > 1 else 0.0)
    return Pipe(stages, stage_s=off, draft_s=single - off, link_s=0.0, cost=cost)


def decide(state: PolicyState, widest: Choice, margin: float, *, stages: int) -> PolicyState:
    """Chooses the next piece's settings: the fastest known, or a trial of others."""
    pipe = measured(state, stages)
    pick = lambda right: choose(pipe, right, levels=widest.levels, rate=lockstep_rate)
    worth = (1 + margin) * _rate(pipe, among(state), state.choice)
    anew = state._replace(hits=state.latest[0], tries=state.latest[1])
    if state.choice.width == 0 < state.now.width and pick(among(anew)).rate > worth:
        state = anew  # a trial that contradicts what was known: the text has changed
    right = among(state)
    best, rate = pick(right), _rate(pipe, right, state.choice)
    better = best.rate > (1 + margin) * rate
    choice = best if better else state.choice._replace(rate=rate)
    kinds = {OFF: Choice(0, 1, 1, 0.0), SINGLE: Choice(1, 1, widest.window, 0.0), WIDE: widest}
    untried = [k for k in {kind(widest), SINGLE, OFF} if not state.tick_s[k]]
    if untried:
        return state._replace(choice=choice, now=kinds[max(untried)], due=state.pieces + _FIRST)
    interval = _FIRST if better and kind(best) != kind(state.choice) else state.interval
    if state.pieces < state.due:
        return state._replace(choice=choice, now=choice, interval=interval)
    # The widest settings show all that drafts can do; a piece without drafts shows what they cost.
    trial = widest if kind(choice) != kind(widest) else kinds[OFF]
    return state._replace(
        choice=choice, now=trial, due=state.pieces + interval,
        interval=min(2 * interval, _LONGEST),
    )  # fmt: skip


def _rate(pipe: Pipe, right: np.ndarray, choice: Choice) -> float:
    if choice.width == 0:
        return plain_rate(pipe)
    share = float(right[choice.width - 1])
    return lockstep_rate(pipe, share, levels=choice.levels, width=choice.width)


def _limits(old: Limits, choice: Choice) -> Limits:
    """The limits of a choice, on the devices of the old ones, so that nothing is compiled again."""
    changed: dict[str, Any] = {
        "width": choice.width, "levels": choice.levels, "window": max(choice.window, 1),
    }  # fmt: skip
    put = lambda name, value: jax.device_put(
        np.asarray(value, np.int32), getattr(old, name).sharding
    )
    return old._replace(**{name: put(name, value) for name, value in changed.items()})
