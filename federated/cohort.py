"""Who takes part in a round, on which device, and what is reported of it."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.federated.algorithm import Algorithm, Info, Spent
from jaxfm.model import Array, Key


class Status(enum.IntEnum):
    """What became of a client that was drawn."""

    ABSENT = 0  # it dropped out, or has no data
    COUNTED = 1
    NON_FINITE = 2  # its update held an infinity or NaN, and was left out


class Cohort(NamedTuple):
    """The clients of a round, in the order drawn; leaves [cohort_size], or [R, cohort_size].

    Attributes:
      client: i32, who; -1 in a place that Poisson sampling left empty.
      status: i32, a `Status`.
      steps: f32, local steps; also of those whose update was left out.
      examples, loss_total, loss_count: f32, as in `Info`; 0 where the update was left out.
    """

    client: Array
    status: Array
    steps: Array
    examples: Array
    loss_total: Array
    loss_count: Array


class RoundInfo(NamedTuple):
    """What R rounds report; every leaf has a leading axis of rounds.

    Attributes:
      selected: f32[R, buckets], clients drawn.
      counted: f32[R, buckets], clients whose update counted.
      non_finite: f32[R, buckets], clients whose update was left out.
      spent: f32[R, buckets], the work of both; what a bucket leaves to the ledger is 0.
      examples, loss_total, loss_count: f32[R, buckets], sums over clients that counted.
      extra: f32[R] by name, the algorithm's own sums over clients.
      cohort: columns [R, cohort_size], a client each.
      server: f32[R] by name, figures of the server's step.
    """

    selected: Array
    counted: Array
    non_finite: Array
    spent: Spent
    examples: Array
    loss_total: Array
    loss_count: Array
    extra: Mapping[str, Array]
    cohort: Cohort
    server: Mapping[str, Array]


class Slots(NamedTuple):
    """The places at which the clients of one bucket run, device by device; leaves [slots].

    Taken slots come first on every device.

    Attributes:
      client: i32, who.
      taken: bool, whether anybody is there.
      place: i32, position in the cohort.
      row: i32, of its data on its device.
      memory: i32, of its memory; past the end in an empty slot, so that nothing is written.
    """

    client: Array
    taken: Array
    place: Array
    row: Array
    memory: Array


class Whereabouts(NamedTuple):
    """Tables i32[C] over all clients, on the host or on devices.

    Attributes:
      bucket: its bucket.
      row: the row of its data on its device.
      memory: the row of its memory among its bucket's.
      home: its device; None where all devices hold everybody's data.
    """

    bucket: Any
    row: Any
    memory: Any
    home: Any


class Report(NamedTuple):
    """What became of the client in a slot: f32[] each, or leaves [slots]."""

    counted: Array
    non_finite: Array
    info: Info


# Of `draw`: by itself with a probability, in turn, or so many.
Rate = float | Literal["in_turn"] | None
_TURNS = 2**32 - 2  # no round has this number


def round_keys(key: Key, number: Array | int) -> Array:
    """Keys of the choice of clients, of their failures, of the clients and of the server."""
    return jax.random.split(jax.random.fold_in(key, number), 4)


def draw(
    key: Key, number: Array | int, num_clients: int, cohort_size: int, drop_rate: Array | float,
    rate: Rate = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Draws the clients of a round without replacement, as a function of the run's key.

    Args:
      key: of the run, as given to `Rounds.init`.
      number: i32[], of the round; the first is 0.
      num_clients, cohort_size: how many there are, and how many are drawn.
      drop_rate: probability with which a client fails to report.
      rate: probability with which each is drawn by itself (Poisson sampling), for at most
        `cohort_size` places, which go to a random part of more; "in_turn": clients take turns, in
        an order that the run's key draws once; None: all places are taken, by anybody.
    Returns:
      The clients drawn, i32[cohort_size], -1 in empty places, and bool[num_clients], who reports
      if drawn (and has data).
    """
    choose_key, report_key, _, _ = round_keys(key, number)
    reports = jax.random.bernoulli(report_key, 1 - drop_rate, (num_clients,))
    if rate == "in_turn":
        turns = jax.random.permutation(jax.random.fold_in(key, _TURNS), num_clients)
        place = jnp.asarray(number, jnp.int32) % num_clients * cohort_size
        return turns[(place + jnp.arange(cohort_size)) % num_clients], reports
    order = jax.random.bits(choose_key, (num_clients,))
    if rate is None:
        return lax.top_k(order, cohort_size)[1], reports
    chosen = jax.random.bernoulli(jax.random.fold_in(choose_key, 1), rate, (num_clients,))
    drawn = lax.top_k(jnp.where(chosen, order, jnp.uint32(0)), cohort_size)[1]
    return jnp.where(chosen[drawn], drawn, -1), reports


def cohorts_of(algorithm: Algorithm, num_clients: int, cohort_size: int) -> tuple[int, Rate]:
    """How many places a cohort has, and the rate of Poisson sampling; as `draw` takes them.

    Args:
      algorithm: whose privacy, if it has any, says how cohorts are drawn.
      num_clients: all that there are.
      cohort_size: clients drawn a round.
    Raises:
      ValueError: the privacy accounts for other cohorts.
    """
    if algorithm.privacy is None:
        return cohort_size, None
    sampling = algorithm.privacy.sampling
    if (num_clients, cohort_size) != (sampling.num_clients, sampling.cohort_size):
        raise ValueError(
            f"This run draws {cohort_size} of {num_clients} clients, but its privacy accounts for "
            f"{sampling.cohort_size} of {sampling.num_clients}; give the same numbers to both."
        )
    rates: dict[str, Rate] = {"fixed": None, "poisson": sampling.rate, "in_turn": "in_turn"}
    return sampling.places, rates[sampling.kind]


def times_drawn(
    key: Key, rounds: int, num_clients: int, cohort_size: int, rate: Rate = None
) -> np.ndarray:
    """In how many of the first `rounds` rounds each client was drawn: i64[C], as `draw` has it."""
    one = lambda number: draw(key, number, num_clients, cohort_size, 0.0, rate)[0]
    drawn = np.asarray(lax.map(jax.jit(one), jnp.arange(rounds)))
    return np.bincount(drawn[drawn >= 0], minlength=num_clients)


def deal(drawn: Array, where: Whereabouts, b: int, count: int, devices: int, past: int) -> Slots:
    """Deals the drawn clients of bucket b to `count` slots.

    Clients with a home run there; others are spread evenly, buckets beginning from either end in
    turn.

    Args:
      drawn: i32[cohort_size]; -1: nobody.
      where: the tables of all clients.
      b: the number of the bucket.
      count: slots on all devices together.
      devices: along the mesh axis "clients".
      past: a row past the end of the bucket's memories.
    """
    mine = (where.bucket[drawn] == b) & (drawn >= 0)
    if where.home is None:
        first = _fitted(jnp.argsort(~mine, stable=True), count)
        place = first.reshape(-1, devices)[:, :: (-1) ** b].T.reshape(-1)
        taken = jnp.arange(count).reshape(-1, devices)[:, :: (-1) ** b].T.reshape(-1) < mine.sum()
    else:
        here = mine[None] & (where.home[drawn][None] == jnp.arange(devices)[:, None])
        order = lambda own: _fitted(jnp.argsort(~own, stable=True), count // devices)
        place = jax.vmap(order)(here).reshape(-1)
        taken = jnp.arange(count // devices)[None] < here.sum(1)[:, None]
        taken = taken.reshape(-1)
    client = drawn[place]
    memory = jnp.where(taken, where.memory[client], past)
    return Slots(client, taken, place, where.row[client], memory)


def count_slots(
    cohort_size: int, ids: np.ndarray, devices: int, at_once: int | None, lives_at_home: bool
) -> tuple[int, int]:
    """(slots of a bucket on all devices, clients at once): whole groups on every device."""
    if lives_at_home:  # all that are drawn may live on one device
        per_device = max(1, min(cohort_size, len(ids) // devices))
    else:
        per_device = max(1, math.ceil(min(cohort_size, len(ids)) / devices))
    at_once = per_device if at_once is None else min(at_once, per_device)
    return math.ceil(per_device / at_once) * at_once * devices, at_once


def _fitted(order: Array, count: int) -> Array:
    return jnp.pad(order[:count], (0, max(0, count - order.shape[0])))


def joined(
    drawn: Array, slots: list[Slots | None], reports: list[Report | None], figures: dict
) -> RoundInfo:
    """The report of one round from those of its buckets; None stands for an empty bucket."""
    size = drawn.shape[0]
    zeros = jnp.zeros(size, jnp.float32)
    cohort = Cohort(drawn, jnp.zeros(size, jnp.int32), zeros, zeros, zeros, zeros)
    columns: list[tuple] = []
    extra: dict[str, Array] = {}
    for own, report in zip(slots, reports, strict=True):
        if own is None or report is None:
            columns.append((jnp.zeros((), jnp.float32),) * 10)
            continue
        info, spent = report.info, report.info.spent
        status = Status.COUNTED * report.counted + Status.NON_FINITE * report.non_finite
        seen = Cohort(
            own.client, status.astype(jnp.int32), spent.steps,
            info.examples, info.loss_total, info.loss_count,
        )  # fmt: skip
        at = jnp.where(own.taken, own.place, size)
        cohort = jax.tree.map(lambda x, new, at=at: x.at[at].set(new, mode="drop"), cohort, seen)
        optional = lambda x: jnp.zeros(()) if x is None else x
        columns.append(tuple(x.sum(dtype=jnp.float32) for x in (
            own.taken, report.counted, report.non_finite,
            *map(optional, spent),
            info.examples, info.loss_total, info.loss_count,
        )))  # fmt: skip
        for name, value in (info.extra or {}).items():
            extra[name] = extra.get(name, jnp.zeros((), jnp.float32)) + value.sum()
    table = [jnp.stack(column) for column in zip(*columns)]
    return RoundInfo(
        selected=table[0],
        counted=table[1],
        non_finite=table[2],
        spent=Spent(*table[3:7]),
        examples=table[7],
        loss_total=table[8],
        loss_count=table[9],
        extra=extra,
        cohort=cohort,
        server=figures,
    )
