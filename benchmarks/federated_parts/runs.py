"""One algorithm at one learning rate, round by round, and the best learning rate of a ladder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from federated_parts.rows import Row
from federated_parts.work import TASK, Work, accuracy, setting_of
from jaxfm.federated import (
    Algorithm,
    Local,
    Population,
    client_costs,
    client_metrics,
    compile_rounds,
    profiles,
    round_costs,
)

LAST = 3  # rounds whose mean counts
VALIDATION, TEST, OWN = range(3)  # columns of a curve


class Run(NamedTuple):
    """One algorithm at one learning rate.

    Attributes:
      rate: the learning rate of the clients.
      curve: f64[seeds, rounds, 3], the accuracy on validation rows, on test rows, and on the
        clients' own test rows. The first column is of the last rounds only, and of the clients' own
        validation rows where there is no global model. NaN: not measured.
      bytes: the mean of a round, both ways.
      ends: the last state of each seed, on the host.
      algorithm: what was run.
    """

    rate: float
    curve: np.ndarray
    bytes: float
    ends: list[Any]
    algorithm: Algorithm

    def score(self) -> float:
        """What learning rates are chosen by."""
        return float(self.curve[:, -LAST:, VALIDATION].mean())

    def end(self, column: int) -> float:
        """The mean of a column over the last rounds and seeds."""
        return float(self.curve[:, -LAST:, column].mean())

    def bytes_to(self, column: int, target: float) -> float:
        """Bytes until the mean curve of a column reaches a target; infinite if it never does."""
        reached = np.flatnonzero(self.curve[:, :, column].mean(0) >= target)
        return self.bytes * (reached[0] + 1) if len(reached) else float("inf")


def tune(
    row: Row,
    work: Work,
    rates: Sequence[float],
    *,
    num_rounds: int,
    num_seeds: int,
    watch_own: bool = False,
) -> Run:
    """Climbs the ladder of learning rates with the first seed, and runs all seeds at the best one.

    Args:
      row: the algorithm.
      work: its data and network.
      rates: the ladder, from low to high; the climb starts in its middle.
      num_rounds: of each run.
      num_seeds: of the run at the best rate.
      watch_own: look at the clients' own test rows in every round, not only in the last ones.
    """
    runs: dict[int, Run] = {}

    def at(i: int) -> float:
        if i not in runs:
            runs[i] = play(row, work, rates[i], range(1), num_rounds, watch_own)
        return runs[i].score()

    best = len(rates) // 2
    at(best)
    for step in (-1, 1):
        while 0 <= best + step < len(rates) and at(best + step) > at(best):
            best += step
    first = runs[best]
    if num_seeds == 1:
        return first
    rest = play(row, work, first.rate, range(1, num_seeds), num_rounds, watch_own)
    return first._replace(
        curve=np.concatenate([first.curve, rest.curve]),
        bytes=(first.bytes + rest.bytes * (num_seeds - 1)) / num_seeds,
        ends=first.ends + rest.ends,
    )


def play(
    row: Row, work: Work, rate: float, seeds: range, num_rounds: int, watch_own: bool = False
) -> Run:
    """Runs an algorithm at one learning rate with each of the seeds; arguments as of `tune`."""
    local = Local(optax.sgd(rate, momentum=0.9), work.size.batch, work.size.epochs)
    algorithm = row.make(setting_of(work, local, num_rounds))
    model, bucket = algorithm.model or work.model, bucket_of(algorithm, work.size.clients)
    people = [Population(f, profiles(work.size.clients), bucket) for f in work.train]
    engine = compile_rounds(algorithm, people[0], cohort_size=work.size.cohort)
    look = _observer(algorithm, bucket, work, watch_own)
    curves, ends, wire = [], [], []
    for seed in seeds:
        start = model.init(jax.random.key(seed))
        priced = client_costs(algorithm, people[seed], start)
        state = engine.init(start, jax.random.key(100 + seed))
        points = []
        for done in range(1, num_rounds + 1):
            state, info = engine.run(state, people[seed])
            spent = round_costs(priced, info)
            wire.append(spent["bytes_up"] + spent["bytes_down"])
            points.append(look(state, seed, num_rounds - done < LAST))
        curves.append(points)
        ends.append(jax.device_get(state))
    return Run(rate, np.array(curves), float(np.mean(wire)), ends, algorithm)


def bucket_of(algorithm: Algorithm, num_clients: int) -> np.ndarray:
    """i32[C]: the buckets that the algorithm has planned, or else all of them in turn."""
    if algorithm.assignment is not None:
        return algorithm.assignment
    return np.arange(num_clients, dtype=np.int32) % len(algorithm.buckets)


def _observer(algorithm: Algorithm, bucket: np.ndarray, work: Work, watch_own: bool):
    """Returns `look(state, seed, late) -> (validation, test, own test)`, a point of the curve."""
    own = client_metrics(algorithm, bucket, TASK, batch_size=64)
    personal = algorithm.model is None or algorithm.is_personal is not None

    def whole(state, rows: Mapping) -> float:
        return accuracy(algorithm.model, state.server.variables, rows)

    def each(state, rows) -> float:
        return float(np.nanmean(own(state, rows)["accuracy"]))

    def look(state, seed: int, late: bool) -> tuple[float, float, float]:
        validation = test = mine = np.nan
        if late:
            held = work.choice[seed]
            validation = each(state, held) if personal else whole(state, work.validation)
        if not personal:
            test = whole(state, work.test)
        if late or personal or watch_own:
            mine = each(state, work.own[seed])
        return validation, test, mine

    return look
