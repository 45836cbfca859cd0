"""What a cluster would do: continuous speculation played through in plain Python, event by event.

The head knows which draft will be right (a trace), so that no model is needed: it keeps the same
tree and takes the same decisions as `jaxfm.parallel.pipe.scheduler`, written as one reads them. With
stages and a draft that take one unit of time each it counts the ticks of the real engine exactly (a
test), and with measured times it answers what other clusters would make of the same text.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxfm.parallel.simulation.speed import Pipe


@dataclasses.dataclass(eq=False)
class Node:
    """A proposed token: its place in the text, whether it is right, and where it hangs."""

    position: int
    right: bool
    parent: Node | None
    alive: bool = True
    launched: bool = False
    answered: bool = False


@dataclasses.dataclass(eq=False)
class Run:
    """Nodes that go through the pipe together, and what they were when they were launched."""

    nodes: list[Node]
    size: int

    def is_live(self) -> bool:
        """Whether any of its nodes still may be right."""
        return any(node.alive for node in self.nodes)


class Head:
    """The scheduler of one text: the oracle of `jaxfm.parallel.pipe.scheduler`.

    Args:
      ranks: place of the right token among the draft's candidates, for each token to come; the
        width or more: it is not among them.
      width, levels, window: as `jaxfm.parallel.pipe.scheduler.Limits`.
      duplicates: launch every newly verified token on its own, even where a packet already holds
        it, as PipeInfer was published.
    """

    def __init__(
        self, ranks: Sequence[int], *, width: int = 1, levels: int = 1, window: int = 1 << 30,
        duplicates: bool = False,
    ):  # fmt: skip
        self.ranks, self.width, self.levels, self.window = list(ranks), width, levels, window
        self.duplicates = duplicates
        self.tip = Node(0, True, None)
        self.nodes = [self.tip]
        self.in_flight: list[Run] = []
        self.again = 0  # duplicate runs to be launched
        self.accepted = 0

    @property
    def done(self) -> bool:
        """Whether all tokens are known."""
        return self.tip.position >= len(self.ranks)

    def propose(self) -> list[Node] | None:
        """The nodes that the draft is asked to go on from; None: it is not asked."""
        alive = [node for node in self.nodes if node.alive]
        if self.done or not self.width or any(not node.launched for node in alive):
            return None
        deepest = max(node.position for node in alive)
        flying = sum(run.is_live() for run in self.in_flight)
        if deepest + 1 >= len(self.ranks) or flying >= self.window:
            return None
        return [node for node in alive if node.position == deepest]

    def insert(self, tips: list[Node]) -> None:
        """The draft answers: candidates below the tip that is right, or else below the first."""
        parents = tips
        for _ in range(self.levels):
            parent = next((node for node in parents if node.right), parents[0])
            position = parent.position + 1
            if position >= len(self.ranks):
                return
            rank = self.ranks[position - 1]
            parents = [
                Node(position, parent.right and rank == i, parent) for i in range(self.width)
            ]
            if parent.alive:
                self.nodes += parents
            else:
                for node in parents:
                    node.alive = False

    def settle(self, run: Run) -> int:
        """Answers come back; returns how many tokens they settle."""
        self.in_flight.remove(run)
        for node in run.nodes:
            node.answered = node.alive
        count = 0
        while self.tip.answered and self.tip.alive and not self.done:
            children = [node for node in self.nodes if node.alive and node.parent is self.tip]
            child = next((node for node in children if node.right), None)
            count += 1
            if child is None:
                child = Node(self.tip.position + 1, True, None)
                self.nodes.append(child)
            else:
                self.accepted += 1
                self.again += self.duplicates
            self.tip = child
            for node in self.nodes:
                node.alive = self._below_tip(node)
            self.nodes = [node for node in self.nodes if node.alive]
        if self.done:
            for node in self.nodes:
                node.alive = False
        return count

    def _below_tip(self, node: Node | None) -> bool:
        while node is not None and node is not self.tip:
            node = node.parent
        return node is self.tip

    def launch(self) -> Run | None:
        """The next packet, parents first; None: there is nothing to launch."""
        if self.done or sum(run.is_live() for run in self.in_flight) >= self.window:
            return None
        waiting = sorted(
            (node for node in self.nodes if node.alive and not node.launched),
            key=lambda node: node.position,
        )[: self.width * self.levels or 1]
        if self.again:
            self.again -= 1
            waiting = [Node(self.tip.position, False, self.tip)]
        if not waiting:
            return None
        for node in waiting:
            node.launched = True
        run = Run(waiting, len(waiting))
        self.in_flight.append(run)
        return run


class RoundHead(Head):
    """Draft-then-verify: `length` tokens are drafted while the pipe is empty, then all are checked
    in one packet. A length of 0 is plain decoding."""

    def __init__(self, ranks: Sequence[int], length: int):
        super().__init__(ranks, width=min(length, 1), levels=length)
        self.ready = length == 0

    def propose(self) -> list[Node] | None:
        busy = self.ready or self.in_flight or self.tip.launched
        return None if self.done or busy or self._at_end else [self.tip]

    @property
    def _at_end(self) -> bool:
        return self.tip.position + 1 >= len(self.ranks)

    def insert(self, tips: list[Node]) -> None:
        super().insert(tips)
        self.ready = True

    def launch(self) -> Run | None:
        if self.done or not (self.ready or self._at_end):
            return None
        waiting = [node for node in self.nodes if node.alive and not node.launched]
        if not waiting:
            return None
        self.ready = self.levels == 0
        for node in waiting:
            node.launched = True
        run = Run(waiting, len(waiting))
        self.in_flight.append(run)
        return run


class Played(NamedTuple):
    """What came of it; times in the units of the pipe's.

    Attributes:
      times: when each token was known.
      busy: stage time that was spent, over all stages.
      wasted: of this, on packets that turned out wrong.
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
        """Share of the stages' time that they computed."""
        return self.busy / (self.stages * self.times[-1])

    def between(self, percentile: float) -> float:
        """A percentile of the times between two tokens."""
        return float(np.percentile(np.diff(self.times), percentile))


# At equal times proposals come before answers, and these before what stages begin: as in a tick.
_DRAFTED, _ANSWERED, _ENTERS, _FREE = range(4)


class _Stage:
    """A node of the pipe: what waits for it, and until when it computes what."""

    def __init__(self, slow: float):
        self.slow, self.until = slow, 0.0
        self.queue: list[Run] = []
        self.run: Run | None = None


def play(
    head: Head,
    pipe: Pipe,
    *,
    factors: Sequence[float] | None = None,
    jitter: float = 0.0,
    seed: int = 0,
) -> Played:
    """Plays a text through a pipe.

    A packet that is cancelled while a stage computes it, and a draft whose question has become
    void, are given up at once (PipeInfer looks between two layers).

    Args:
      head: fresh.
      pipe: its times.
      factors: how much longer each stage takes than `pipe.stage_s`: unequal nodes.
      jitter: standard deviation of the logarithm of each time: stragglers.
      seed: of these.
    """
    rng = np.random.default_rng(seed)
    vary = lambda x: x * float(rng.lognormal(0, jitter)) if jitter else x
    stages = [_Stage(x) for x in ([1.0] * pipe.stages if factors is None else factors)]
    events: list = []
    order = itertools.count()
    times: list[float] = []
    busy = wasted = now = 0.0
    question: list[Node] | None = None

    def post(when: float, kind: int, *what) -> None:
        heapq.heappush(events, (when, kind, next(order), what))

    def begin(number: int) -> None:
        """A stage takes what waits for it; what was cancelled passes by at once."""
        nonlocal busy, wasted
        stage = stages[number]
        while stage.queue and stage.until <= now:
            run = stage.queue.pop(0)
            spent = 0.0
            if run.is_live():
                live = sum(node.alive for node in run.nodes)
                spent = vary(pipe.stage_s) * stage.slow * pipe.cost(live)
                stage.run, stage.until = run, now + spent
                post(stage.until, _FREE, number)
            busy += spent
            wasted += spent * (not any(node.right for node in run.nodes))
            last = number == pipe.stages - 1
            kind = _ANSWERED if last else _ENTERS
            post(now + spent + vary(pipe.link_s), kind, run, number + 1)

    def give_up() -> None:
        nonlocal busy, wasted
        for number, stage in enumerate(stages):
            if stage.until > now and stage.run is not None and not stage.run.is_live():
                busy -= stage.until - now
                wasted -= stage.until - now
                stage.until = now
                begin(number)

    while not head.done:
        while events and events[0][0] <= now and not head.done:
            _, kind, _, what = heapq.heappop(events)
            if kind == _DRAFTED and what[0] is question:
                head.insert(question)
                question = None
            elif kind == _ANSWERED:
                times += [now] * head.settle(what[0])
                give_up()
                if question is not None and not any(node.alive for node in question):
                    question = None
            elif kind == _ENTERS:
                run, number = what
                stages[number].queue.append(run)
                begin(number)
            elif kind == _FREE:
                begin(what[0])
        if stages[0].until <= now and (run := head.launch()) is not None:
            stages[0].queue.append(run)
            begin(0)
        if question is None and (question := head.propose()) is not None:
            post(now + vary(pipe.draft_s) * head.levels, _DRAFTED, question)
        if not head.done:
            now = events[0][0]
    return Played(np.array(times[: len(head.ranks)]), busy, wasted, head.accepted, pipe.stages)


def play_plain(tokens: int, pipe: Pipe) -> Played:
    """One token a trip."""
    return play(Head([0] * tokens, width=0), pipe)


def best_speculative(ranks: Sequence[int], pipe: Pipe, most: int = 24) -> tuple[int, Played]:
    """Draft-then-verify with the length that is best for this very text, found by trying all."""
    tried = {length: play(RoundHead(ranks, length), pipe) for length in range(most + 1)}
    best = max(tried, key=lambda length: tried[length].rate)
    return best, tried[best]


def trace(tokens: int, right: Sequence[float], *, seed: int = 0) -> list[int]:
    """Ranks of independent draws: right[w - 1] is the probability of being among w candidates."""
    draws = np.random.default_rng(seed).random(tokens)
    return np.searchsorted(np.asarray(right), draws, side="right").tolist()
