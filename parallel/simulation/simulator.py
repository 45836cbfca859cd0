"""What a cluster would do: decoding through a pipe of stages, simulated event by event.

Which drafts are right is given by ranks (`draw_ranks`), so that no model is needed. With stages and
a draft that take one unit of time each, the simulator counts the ticks of the real engine exactly
(a test); with measured times it predicts what other clusters would do with the same text.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxfm.parallel.pipe.speed import Pipe
from jaxfm.parallel.simulation.heads import Head, Node, Packet, RoundHead


class Timing(NamedTuple):
    """When the tokens of a text were known, and what the stages spent; in the pipe's unit of time.

    Attributes:
      times: [N] when each token was known.
      busy: time that the stages computed, summed over them.
      wasted: the part of it spent on packets that turned out wrong.
      accepted: tokens that the draft had proposed.
      stages: S.
    """

    times: np.ndarray
    busy: float
    wasted: float
    accepted: int
    stages: int

    @property
    def rate(self) -> float:
        """Tokens a unit of time."""
        return len(self.times) / self.times[-1]

    @property
    def first(self) -> float:
        """Time to the first token."""
        return self.times[0]

    @property
    def utilisation(self) -> float:
        """The share of the stages' time in which they computed."""
        return self.busy / (self.stages * self.times[-1])

    def between(self, percentile: float) -> float:
        """A percentile of the times between two tokens."""
        return float(np.percentile(np.diff(self.times), percentile))


def simulate(
    head: Head,
    pipe: Pipe,
    *,
    factors: Sequence[float] | None = None,
    jitter: float = 0.0,
    seed: int = 0,
) -> Timing:
    """The times at which a pipe would know a text's tokens, found event by event.

    A packet that is cancelled while a stage computes it, and a draft whose question has become
    void, are given up at once (PipeInfer looks between two layers).

    Args:
      head: a fresh one; it knows the text.
      pipe: its times.
      factors: slowdown factor of each stage, for unequal nodes; None: 1 for all.
      jitter: standard deviation of the logarithm of each time, for stragglers.
      seed: of the jitter.
    """
    return _Simulation(head, pipe, factors, jitter, seed).run()


# At equal times proposals come before answers, and these before what stages begin: as in a tick.
_DRAFTED, _ANSWERED, _ENTERS, _FREE = range(4)


class _Stage:
    """A node of the pipe: what waits for it, what it computes, and until when."""

    def __init__(self, slow: float):
        self.slow, self.until = slow, 0.0
        self.queue: list[Packet] = []
        self.packet: Packet | None = None


class _Simulation:
    """The stages, the draft and the events to come."""

    def __init__(
        self, head: Head, pipe: Pipe, factors: Sequence[float] | None, jitter: float, seed: int
    ):
        self.head, self.pipe, self.jitter = head, pipe, jitter
        self.rng = np.random.default_rng(seed)
        self.stages = [_Stage(x) for x in ([1.0] * pipe.stages if factors is None else factors)]
        self.events: list = []
        self.order = itertools.count()
        self.now = self.busy = self.wasted = 0.0
        self.question: list[Node] | None = None
        self.times: list[float] = []

    def vary(self, seconds: float) -> float:
        return seconds * float(self.rng.lognormal(0, self.jitter)) if self.jitter else seconds

    def post(self, when: float, kind: int, *what) -> None:
        heapq.heappush(self.events, (when, kind, next(self.order), what))

    def begin(self, number: int) -> None:
        """A stage takes what waits for it; what was cancelled passes by at once."""
        stage, pipe = self.stages[number], self.pipe
        while stage.queue and stage.until <= self.now:
            packet = stage.queue.pop(0)
            spent = 0.0
            if packet.is_live():
                live = sum(node.alive for node in packet.nodes)
                spent = self.vary(pipe.stage_s) * stage.slow * pipe.cost(live)
                stage.packet, stage.until = packet, self.now + spent
                self.post(stage.until, _FREE, number)
            self.busy += spent
            self.wasted += spent * (not any(node.right for node in packet.nodes))
            kind = _ANSWERED if number == pipe.stages - 1 else _ENTERS
            self.post(self.now + spent + self.vary(pipe.link_s), kind, packet, number + 1)

    def give_up(self) -> None:
        """Stages stop computing what has been cancelled."""
        for number, stage in enumerate(self.stages):
            if stage.until > self.now and stage.packet is not None and not stage.packet.is_live():
                self.busy -= stage.until - self.now
                self.wasted -= stage.until - self.now
                stage.until = self.now
                self.begin(number)

    def run(self) -> Timing:
        head = self.head
        while not head.done:
            while self.events and self.events[0][0] <= self.now and not head.done:
                _, kind, _, what = heapq.heappop(self.events)
                self.handle(kind, what)
            if self.stages[0].until <= self.now and (packet := head.launch()) is not None:
                self.stages[0].queue.append(packet)
                self.begin(0)
            if self.question is None and (asked := head.propose()) is not None:
                self.question = asked
                self.post(self.now + self.vary(self.pipe.draft_s) * head.levels, _DRAFTED, asked)
            if not head.done:
                self.now = self.events[0][0]
        times = np.array(self.times[: len(head.ranks)])
        return Timing(times, self.busy, self.wasted, head.accepted, self.pipe.stages)

    def handle(self, kind: int, what: tuple) -> None:
        """One event."""
        if kind == _DRAFTED and what[0] is self.question:
            self.head.insert(self.question)
            self.question = None
        elif kind == _ANSWERED:
            self.times += [self.now] * self.head.settle(what[0])
            self.give_up()
            if self.question is not None and not any(node.alive for node in self.question):
                self.question = None
        elif kind == _ENTERS:
            packet, number = what
            self.stages[number].queue.append(packet)
            self.begin(number)
        elif kind == _FREE:
            self.begin(what[0])


def best_speculative(ranks: Sequence[int], pipe: Pipe, most: int = 24) -> tuple[int, Timing]:
    """The length of draft-then-verify that is best for this very text, and its timing.

    All lengths up to `most` are tried.
    """
    tried = {length: simulate(RoundHead(ranks, length), pipe) for length in range(most + 1)}
    best = max(tried, key=lambda length: tried[length].rate)
    return best, tried[best]


def draw_ranks(tokens: int, right: Sequence[float], *, seed: int = 0) -> list[int]:
    """The rank of each right token among a draft's candidates, drawn independently.

    Args:
      tokens: how many.
      right: right[w - 1] is the probability that the right token is among the first w.
      seed: of the draws.
    """
    draws = np.random.default_rng(seed).random(tokens)
    return np.searchsorted(np.asarray(right), draws, side="right").tolist()
