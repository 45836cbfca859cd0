"""A cluster emulated by sleeping threads: one a node, which sleeps instead of computing or sending.

It measures schedules by the clock on a machine that does not have the nodes: each stage, the draft
and every hop take the time that they are told to. Nodes run at their own pace (a draft may take one
and a half stages), get each other's packets through queues and learn of a cancellation while they
compute. The head is that of `jaxfm.parallel.simulation.simulator`, which predicts what should come
out here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from jaxfm.parallel.pipe.speed import Pipe
from jaxfm.parallel.simulation.heads import Head, Node, Packet
from jaxfm.parallel.simulation.simulator import Timing


class NodeFailure(RuntimeError):
    """A node of the cluster stopped."""


class _Cluster:
    """The nodes' shared memory: queues with times of arrival, under one lock."""

    def __init__(self, head: Head, pipe: Pipe, work: Callable[[int, Packet], None] | None):
        self.head, self.pipe, self.work = head, pipe, work
        self.changed = threading.Condition()
        self.inboxes: list[list[tuple[float, Packet]]] = [[] for _ in range(pipe.stages + 1)]
        self.idle = [True] * pipe.stages
        self.question: list[Node] | None = None
        self.answered: list[Node] | None = None
        self.stopped = False
        self.failure: tuple[str, BaseException] | None = None
        self.busy = self.wasted = 0.0

    def hold(self, seconds: float, wanted: Callable[[], bool]) -> float:
        """Waits, under the lock, as long as the outcome is wanted; returns the seconds it took."""
        start = time.monotonic()
        while not self.stopped and wanted():
            left = start + seconds - time.monotonic()
            if left <= 0:
                break
            self.changed.wait(left)
        return time.monotonic() - start

    def arrived(self, number: int) -> Packet | None:
        """The next packet for a node, once its hop is over; None: the cluster stops."""
        inbox = self.inboxes[number]
        while not self.stopped:
            left = inbox[0][0] - time.monotonic() if inbox else None
            if left is not None and left <= 0:
                return inbox.pop(0)[1]
            self.changed.wait(left)
        return None

    def stage(self, number: int) -> None:
        with self.changed:
            while (packet := self.arrived(number)) is not None:
                if packet.is_live():
                    live = sum(node.alive for node in packet.nodes)
                    right = any(node.right for node in packet.nodes)
                    began = time.monotonic()
                    if self.work is not None:
                        self.changed.release()
                        try:
                            self.work(number, packet)
                        finally:
                            self.changed.acquire()
                    rest = self.pipe.stage_s * self.pipe.cost(live) - (time.monotonic() - began)
                    self.hold(rest, packet.is_live)
                    spent = time.monotonic() - began
                    self.busy += spent
                    self.wasted += spent * (not right)
                self.idle[number] = not self.inboxes[number]
                self.inboxes[number + 1].append((time.monotonic() + self.pipe.link_s, packet))
                self.changed.notify_all()

    def draft(self, _: int) -> None:
        with self.changed:
            while not self.stopped:
                question = self.question
                if question is None:
                    self.changed.wait()
                    continue

                def valid(asked: list[Node] = question) -> bool:
                    return self.question is asked and any(node.alive for node in asked)

                self.hold(self.pipe.draft_s * self.head.levels, valid)
                if valid():
                    self.answered = question
                self.question = None
                self.changed.notify_all()

    def guarded(self, name: str, body: Callable[[int], None], number: int) -> None:
        try:
            body(number)
        except BaseException as error:  # the head must hear of whatever it was
            with self.changed:
                self.failure = (name, error)
                self.changed.notify_all()


def run_cluster(
    head: Head,
    pipe: Pipe,
    *,
    work: Callable[[int, Packet], None] | None = None,
    timeout_s: float = 120.0,
) -> Timing:
    """The times at which a cluster of threads knew a text's tokens, by the clock.

    Args:
      head: a fresh one, as in `jaxfm.parallel.simulation.simulator.simulate`.
      pipe: its times in seconds; below some milliseconds threads themselves take longer.
      work: `(stage, packet)`, what a stage really does; its time is padded to the stage's.
      timeout_s: seconds after which the cluster is given up.
    Raises:
      NodeFailure: a node raised (it is named), or the time was up.
    """
    cluster = _Cluster(head, pipe, work)
    nodes = [(f"stage {i}", cluster.stage, i) for i in range(pipe.stages)]
    threads = [
        threading.Thread(target=cluster.guarded, args=node, daemon=True)
        for node in [*nodes, ("the draft", cluster.draft, 0)]
    ]
    for thread in threads:
        thread.start()
    times: list[float] = []
    start = time.monotonic()
    try:
        with cluster.changed:
            while not head.done:
                _turn(cluster, times, start)
                if cluster.failure is not None:
                    name, error = cluster.failure
                    raise NodeFailure(f"{name} stopped: {error!r}") from error
                if time.monotonic() - start > timeout_s:
                    raise NodeFailure(f"After {timeout_s} s {len(times)} tokens are known.")
    finally:
        with cluster.changed:
            cluster.stopped = True
            cluster.changed.notify_all()
        for thread in threads:
            thread.join(timeout=5)
    known = np.array(times[: len(head.ranks)])
    return Timing(known, cluster.busy, cluster.wasted, head.accepted, pipe.stages)


def _turn(cluster: _Cluster, times: list[float], start: float) -> None:
    """What the head does when something has happened, then waits for the next."""
    head, answers = cluster.head, cluster.inboxes[-1]
    if cluster.answered is not None:
        head.insert(cluster.answered)
        cluster.answered = None
    while answers and answers[0][0] <= time.monotonic() and not head.done:
        count = head.settle(answers.pop(0)[1])
        times += [time.monotonic() - start] * count
    if head.done:
        return
    if cluster.idle[0] and (packet := head.launch()) is not None:
        cluster.idle[0] = False
        cluster.inboxes[0].append((time.monotonic(), packet))
    if cluster.question is None:
        cluster.question = head.propose()
    cluster.changed.notify_all()
    left = answers[0][0] - time.monotonic() if answers else 1.0
    if left > 0:
        cluster.changed.wait(left)
