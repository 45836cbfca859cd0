"""The heads of a simulated pipe: schedulers of one text in plain Python.

The head knows which drafts will be right, so that no model is needed. It keeps the same tree and
takes the same decisions as `jaxfm.parallel.pipe.scheduler`, of which it is the oracle in tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


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
class Packet:
    """Nodes that go through the pipe together, and how many they were when they were launched."""

    nodes: list[Node]
    size: int

    def is_live(self) -> bool:
        """Whether any of its nodes may still be right."""
        return any(node.alive for node in self.nodes)


class Head:
    """The scheduler of one text: continuous speculation, or plain decoding with a width of 0.

    Args:
      ranks: for each token to come, the place of the right token among the draft's candidates; at
        or above the width, it is not among them.
      width, levels, window: as in `jaxfm.parallel.pipe.scheduler.Limits`.
      duplicates: launch every newly verified token on its own, even where a packet already holds
        it, as in the published PipeInfer.
    """

    def __init__(
        self, ranks: Sequence[int], *, width: int = 1, levels: int = 1, window: int = 1 << 30,
        duplicates: bool = False,
    ):  # fmt: skip
        self.ranks, self.width, self.levels, self.window = list(ranks), width, levels, window
        self.duplicates = duplicates
        self.tip = Node(0, True, None)
        self.nodes = [self.tip]
        self.in_flight: list[Packet] = []
        self.again = 0  # duplicate runs to be launched
        self.accepted = 0

    @property
    def done(self) -> bool:
        """Whether all tokens are known."""
        return self.tip.position >= len(self.ranks)

    def propose(self) -> list[Node] | None:
        """The nodes that the draft is asked to continue; None if it is not asked."""
        alive = [node for node in self.nodes if node.alive]
        if self.done or not self.width or any(not node.launched for node in alive):
            return None
        deepest = max(node.position for node in alive)
        flying = sum(packet.is_live() for packet in self.in_flight)
        if deepest + 1 >= len(self.ranks) or flying >= self.window:
            return None
        return [node for node in alive if node.position == deepest]

    def insert(self, tips: list[Node]) -> None:
        """Adds the draft's candidates below the tip that is right, or else below the first."""
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

    def settle(self, packet: Packet) -> int:
        """Takes a packet's answers; returns how many tokens are known by them."""
        self.in_flight.remove(packet)
        for node in packet.nodes:
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

    def launch(self) -> Packet | None:
        """The next packet, parents first; None if there is nothing to launch."""
        if self.done or sum(packet.is_live() for packet in self.in_flight) >= self.window:
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
        packet = Packet(waiting, len(waiting))
        self.in_flight.append(packet)
        return packet


class RoundHead(Head):
    """The scheduler of draft-then-verify.

    `length` tokens are drafted while the pipe is empty, then all are checked in one packet. A
    length of 0 is plain decoding.
    """

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

    def launch(self) -> Packet | None:
        if self.done or not (self.ready or self._at_end):
            return None
        waiting = [node for node in self.nodes if node.alive and not node.launched]
        if not waiting:
            return None
        self.ready = self.levels == 0
        for node in waiting:
            node.launched = True
        packet = Packet(waiting, len(waiting))
        self.in_flight.append(packet)
        return packet
