"""Who comes back when, by a simulated clock: plans of asynchronous and of synchronous rounds.

A client that starts takes its seconds, which follow from its machine (`client_seconds`), times a
factor of its own each time where `jitter` is given. It is lost if it cannot be reached any more
before it is done. Nothing depends on what is learned, so a plan is made once, on the host.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np

from jaxfm.federated.accounting.ledger import ClientCost
from jaxfm.federated.accounting.resources import Device
from jaxfm.federated.asynchronous.availability import Availability, always


class Schedule(NamedTuple):
    """The arrivals of S server steps, up to K of each.

    Attributes:
      client: i32[S, K], who arrives; -1 in a place that stays empty.
      version: i32[S, K], server steps that were done when it started; at most its step's number.
      again: i32[S, K], how often it had started at this version before.
      seconds: f64[S], when each server step happens.
      started, lost: i64[S], clients that have started, and that were lost, by then.
    """

    client: np.ndarray
    version: np.ndarray
    again: np.ndarray
    seconds: np.ndarray
    started: np.ndarray
    lost: np.ndarray

    @property
    def behind(self) -> np.ndarray:
        """i32[S, K]: server steps between an update's start and its arrival; 0 in empty places."""
        steps = np.arange(len(self.client), dtype=np.int32)[:, None]
        return np.where(self.client >= 0, steps - self.version, 0)


def client_seconds(machines: Device, cost: ClientCost, steps: np.ndarray) -> np.ndarray:
    """f64[C]: what a client needs for a download, its local steps and the upload.

    Args:
      machines: fields f64[C].
      cost: of a client, see `client_costs`.
      steps: i32[C], local steps.
    """
    flops = cost.flops_per_round + np.asarray(steps) * cost.flops_per_step
    return (
        cost.bytes_down / machines.down_bytes_per_s
        + flops / machines.flops_per_s
        + cost.bytes_up / machines.up_bytes_per_s
    )


def buffered(
    seconds: np.ndarray,
    *,
    concurrency: int,
    buffer_size: int,
    num_steps: int,
    when: Availability | None = None,
    max_staleness: int | None = None,
    jitter: float = 0.0,
    seed: int = 0,
) -> Schedule:
    """The server steps whenever K updates have arrived (FedBuff; K = 1 is FedAsync's).

    `concurrency` clients are at work at any time, as far as so many can be reached; for each that
    comes back or is lost another one starts, drawn among those that are idle. One whose update
    waits in the buffer is not drawn, so a step has no client twice. What happens at one instant is
    settled before anybody starts, from the newest model.

    Args:
      seconds: f64[C], see `client_seconds`.
      concurrency: clients at work at a time.
      buffer_size: K.
      num_steps: S.
      when: who can be reached; None: everybody.
      max_staleness: updates of models of more steps ago are lost; None: none is.
      jitter: deviation of the logarithm of the factor on a client's seconds.
      seed: of all that is drawn.
    Raises:
      ValueError: a number out of range, or a point at which nobody is at work and nobody can ever
        be reached again.
    """
    seconds = _checked_seconds(seconds)
    num_clients = len(seconds)
    _check_whole(concurrency=concurrency, buffer_size=buffer_size, num_steps=num_steps)
    _check_jitter(jitter)
    if buffer_size > num_clients:
        raise ValueError(
            f"buffer_size={buffer_size} updates of different clients never come from {num_clients}."
        )
    when = always(num_clients) if when is None else when
    clock = _Clock(seconds, when, jitter, np.random.default_rng(seed))
    found = _empty(num_steps, buffer_size)
    waiting: list[tuple[int, int, int]] = []
    done = 0
    while done < num_steps:
        clock.start(min(concurrency, num_clients) - len(clock.at_work), done)
        for arrival in clock.advance():
            if max_staleness is not None and done - arrival[1] > max_staleness:
                clock.lost += 1
                continue
            waiting.append(arrival)
            clock.busy.add(arrival[0])
            if len(waiting) == buffer_size:
                found.client[done], found.version[done], found.again[done] = np.array(waiting).T
                found.seconds[done] = clock.now
                found.started[done], found.lost[done] = clock.started, clock.lost
                done += 1
                clock.busy -= {client for client, _, _ in waiting}
                waiting = []
                if done == num_steps:
                    break
    return found


def synchronous(
    seconds: np.ndarray,
    *,
    cohort_size: int,
    num_steps: int,
    more: float = 1.0,
    deadline_s: float = math.inf,
    when: Availability | None = None,
    jitter: float = 0.0,
    seed: int = 0,
) -> Schedule:
    """Rounds that wait: for the first `cohort_size` of all that started, or until a deadline.

    Args:
      seconds, num_steps, when, jitter, seed: as in `buffered`.
      cohort_size: updates of a round, K.
      more: over-selection: ceil(more K) clients start, and the last ones are in vain.
      deadline_s: after which a round ends with those that are back, if anybody is.
    Raises:
      ValueError: as of `buffered`.
    """
    seconds = _checked_seconds(seconds)
    _check_whole(cohort_size=cohort_size, num_steps=num_steps)
    _check_jitter(jitter)
    if not more >= 1 or not deadline_s > 0:
        raise ValueError(f"more={more} must be at least 1, and deadline_s={deadline_s} above 0.")
    wanted = math.ceil(more * cohort_size)
    if wanted > len(seconds):
        raise ValueError(f"{wanted} clients cannot be drawn of {len(seconds)}.")
    when = always(len(seconds)) if when is None else when
    clock = _Clock(seconds, when, jitter, np.random.default_rng(seed))
    found = _empty(num_steps, cohort_size)
    for step in range(num_steps):
        begin = clock.now
        waiting: list[tuple[int, int, int]] = []
        clock.start(wanted, step)
        begin = max(begin, clock.now)  # nobody could be reached before
        while len(waiting) < cohort_size and (clock.at_work or not waiting):
            if not clock.at_work:
                clock.start(wanted, step)
            if waiting and clock.next_time() > begin + deadline_s:
                clock.now = begin + deadline_s
                break
            waiting += clock.advance()
        waiting = waiting[:cohort_size]
        found.client[step, : len(waiting)] = [client for client, _, _ in waiting]
        found.version[step] = step
        found.seconds[step] = clock.now
        clock.stop()
        found.started[step], found.lost[step] = clock.started, clock.lost
    return found


class _Clock:
    """Clients at work, in the order in which they end."""

    def __init__(self, seconds, when: Availability, jitter: float, rng: np.random.Generator):
        self.seconds, self.when, self.jitter, self.rng = seconds, when, jitter, rng
        self.now, self.started, self.lost = 0.0, 0, 0
        self.at_work: list[tuple[float, int, bool, int, int, int]] = []
        self.busy: set[int] = set()  # who cannot start: at work, or with an update that waits
        self.starts: dict[tuple[int, int], int] = {}

    def start(self, number: int, version: int) -> None:
        """Starts so many of those that are idle and can be reached, or waits for one if none is."""
        while number > 0:
            until = self.when.until(self.now)
            idle = np.flatnonzero(until > self.now)
            idle = idle[[int(client) not in self.busy for client in idle]] if self.busy else idle
            if idle.size:
                chosen = self.rng.permutation(idle)[:number]
                for client in chosen.tolist():
                    self._start(client, version, until[client])
                return
            if self.at_work:
                return
            later = self.when.next_begin(self.now)
            if math.isinf(later):
                raise ValueError(
                    f"After {self.now:.3g} s nobody is at work and nobody can be reached again; "
                    "ask for fewer steps, or give other times of availability."
                )
            self.now = later

    def _start(self, client: int, version: int, until: float) -> None:
        factor = math.exp(self.jitter * self.rng.standard_normal()) if self.jitter else 1.0
        end = self.now + self.seconds[client] * factor
        again = self.starts.get((client, version), 0)
        self.starts[client, version] = again + 1
        self.started += 1
        self.busy.add(client)
        event = (min(end, until), self.started, end <= until, client, version, again)
        heapq.heappush(self.at_work, event)

    def next_time(self) -> float:
        """When the next client ends."""
        return self.at_work[0][0]

    def advance(self) -> list[tuple[int, int, int]]:
        """Goes to the next instant at which clients end; returns those that are done then."""
        self.now, arrived = self.next_time(), []
        while self.at_work and self.at_work[0][0] == self.now:
            _, _, is_done, client, version, again = heapq.heappop(self.at_work)
            self.busy.discard(client)
            if is_done:
                arrived.append((client, version, again))
            else:
                self.lost += 1
        return arrived

    def stop(self) -> None:
        """Sends everybody home that is still at work."""
        self.busy -= {event[3] for event in self.at_work}
        self.at_work = []


def _empty(num_steps: int, places: int) -> Schedule:
    table = np.zeros((num_steps, places), np.int32)
    counts = np.zeros(num_steps, np.int64)
    return Schedule(
        table - 1, table.copy(), table.copy(), np.zeros(num_steps), counts, counts.copy()
    )


def _checked_seconds(seconds: np.ndarray) -> np.ndarray:
    seconds = np.asarray(seconds, np.float64)
    if seconds.ndim != 1 or not len(seconds):
        raise ValueError(f"seconds must be [C], a number for each client; got {seconds.shape}.")
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        worst = seconds[~(np.isfinite(seconds) & (seconds > 0))][0]
        raise ValueError(f"A client's seconds must be finite and above 0; got {worst}.")
    return seconds


def _check_whole(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1.")


def _check_jitter(jitter: float) -> None:
    if not 0 <= jitter < math.inf:
        raise ValueError(f"jitter={jitter} must be 0 or more.")
