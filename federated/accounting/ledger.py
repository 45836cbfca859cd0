"""What a run costs its clients: bytes, operations and memory, from the trees really sent.

Costs of one client follow from the shapes of its bucket's download, upload and program; a round's
costs are those times who took part, as the round itself reports.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.cost import count_flops, loop_bytes, loop_flops, num_bytes
from jaxfm.federated.algorithm import (
    Algorithm,
    Aside,
    Bucket,
    ClientData,
    Known,
    client_variables,
)
from jaxfm.federated.cohort import RoundInfo, Status
from jaxfm.federated.population import Population
from jaxfm.model import PyTree, Variables, count_parameters


class ClientCost(NamedTuple):
    """One client of a bucket.

    Attributes:
      bytes_down, bytes_up: of one download and one upload.
      parameters: that it trains.
      memory_bytes: that training holds from step to step (parameters, optimizer state, statistics)
        and one gradient; activations come on top, and are counted by `compiled_costs`.
      flops_per_step: of one local step.
      flops_per_round: beside them, once a round: a search, predictions on public data.
      bytes_once: of frozen parameters, which only a client's first download holds.
      most_caught_up: earlier downloads that it may take as well in one round, having missed them.
    """

    bytes_down: int
    bytes_up: int
    parameters: int
    memory_bytes: int
    flops_per_step: int
    flops_per_round: int = 0
    bytes_once: int = 0
    most_caught_up: int = 0


class Work(NamedTuple):
    """What clients did in a round: bytes received, operations, bytes sent.

    Leaves f64[C], zero for whoever was not drawn.
    """

    bytes_down: np.ndarray
    flops: np.ndarray
    bytes_up: np.ndarray


def client_costs(
    algorithm: Algorithm, population: Population, variables: Variables, public: PyTree = None
) -> tuple[ClientCost, ...]:
    """The costs of one client of each bucket, by shapes alone: nothing is computed.

    Args:
      variables: arrays or shapes of the full model.
      public: as given to `compile_rounds`.
    Raises:
      ValueError: what the aggregation of a bucket (`Bucket.combine`) refuses of its uploads.
    """
    server = jax.eval_shape(algorithm.init, variables)
    return tuple(_cost(bucket, population, server, public) for bucket in algorithm.buckets)


def client_shapes(
    bucket: Bucket, population: Population, server: PyTree, public: PyTree = None
) -> tuple[PyTree, ...]:
    """Shapes of what `bucket.client` takes: download, memory, data, profile, key.

    Args:
      server: shapes of the algorithm's state.
      public: as given to `compile_rounds`.
    """
    federation = population.federation
    shape: Any = jax.ShapeDtypeStruct
    data = ClientData(
        jax.tree.map(lambda x: shape(x.shape, x.dtype), dict(federation.examples)),
        shape((federation.index.longest,), jnp.int32),
        shape((), jnp.int32),
    )
    profile = jax.tree.map(lambda x: shape((), jnp.asarray(x).dtype), population.profiles)
    key = jax.eval_shape(lambda: jax.random.key(0))
    download = jax.eval_shape(bucket.send, server, public)
    if population.local_validation is not None:
        rows = shape((population.local_validation.index.longest,), jnp.int32)
        data = data._replace(validation_index=rows, validation_count=data.count)
    memory = jax.eval_shape(bucket.init_client, download, data, profile, key)
    return download, memory, data, profile, key


def _cost(bucket: Bucket, population: Population, server: PyTree, public: PyTree) -> ClientCost:
    args = client_shapes(bucket, population, server, public)
    download, memory = args[:2]
    upload, _, _ = jax.eval_shape(bucket.client, *args)
    if bucket.combine is not None:
        jax.eval_shape(functools.partial(_combined, bucket), server, public, upload)
    own = jax.eval_shape(lambda s, m: client_variables(bucket, s, m), server, memory)
    structure = (own.live, own.frozen, own.masks)
    a_step = loop_flops(bucket.client, *args)
    is_part = lambda x: isinstance(x, Variables | Known | Aside)
    parts = jax.tree.leaves(download, is_leaf=is_part)
    sent = jax.tree.map(_travels, download, is_leaf=is_part)
    return ClientCost(
        bytes_down=num_bytes(sent),
        bytes_up=num_bytes(upload),
        parameters=count_parameters(own.params),
        memory_bytes=loop_bytes(bucket.client, *args) + num_bytes((own.params, structure)),
        flops_per_step=a_step,
        flops_per_round=count_flops(bucket.client, *args) - a_step,
        bytes_once=num_bytes([part.frozen for part in parts if isinstance(part, Variables)]),
        most_caught_up=bucket.most_caught_up,
    )


def _combined(bucket: Bucket, server: PyTree, public: PyTree, upload: PyTree) -> PyTree:
    """What a bucket with a `combine` makes of one upload."""
    assert bucket.combine is not None
    received = jax.tree.map(lambda x: x[None], bucket.receive(server, public, upload))
    return bucket.combine(server, received, jnp.ones(1, bool))


def _travels(part: Any) -> Any:
    """What of a part of a download goes over the wire in every round."""
    if isinstance(part, Known | Aside):
        return ()
    # Masks are structure, known to both sides; frozen parameters are sent once.
    return (part.params, part.stats) if isinstance(part, Variables) else part


def round_costs(
    costs: tuple[ClientCost, ...], info: RoundInfo, first: np.ndarray | None = None
) -> dict[str, float]:
    """Bytes and operations of the rounds that `info` (of `Rounds.run`) reports, summed.

    Whoever was selected got the download; whoever reported, with a finite update or not, sent an
    upload. Values that a bucket reports (`Spent`) take precedence.

    Args:
      costs: by bucket.
      info: of any number of rounds.
      first: f64[buckets], clients that got their first download; None: frozen parameters are not
        counted.
    Returns:
      "bytes_down", "bytes_up", "flops": of all clients together.
    """
    totals = {name: float(part.sum()) for name, part in _spent(costs, info)._asdict().items()}
    if first is not None:
        totals["bytes_down"] += float(first @ np.array([cost.bytes_once for cost in costs]))
    return totals


def first_downloads(
    info: RoundInfo, bucket: np.ndarray, served: np.ndarray, num_buckets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts the clients that were drawn for the first time.

    Args:
      info: of any number of rounds.
      bucket: i32[C].
      served: bool[C], who was drawn in earlier rounds.
    Returns:
      f64[buckets], those clients by bucket, for `round_costs`, and the new `served`.
    """
    drawn = np.unique(np.asarray(info.cohort.client))
    drawn = drawn[drawn >= 0]
    new = drawn[~served[drawn]]
    now = served.copy()
    now[new] = True
    return np.bincount(np.asarray(bucket)[new], minlength=num_buckets).astype(np.float64), now


def _spent(costs: tuple[ClientCost, ...], info: RoundInfo) -> Work:
    """What the clients of each bucket did together, f64[buckets]."""
    per_bucket = lambda x: np.asarray(x, np.float64).reshape(-1, len(costs)).sum(0)
    selected, measured = per_bucket(info.selected), jax.tree.map(per_bucket, info.spent)
    reported = per_bucket(info.counted) + per_bucket(info.non_finite)
    flops = measured.steps * [cost.flops_per_step for cost in costs]
    flops = flops + reported * [cost.flops_per_round for cost in costs]
    sent = reported * [cost.bytes_up for cost in costs]
    return Work(
        bytes_down=(selected + measured.caught_up) * [cost.bytes_down for cost in costs],
        flops=np.where(measured.flops > 0, measured.flops, flops),
        bytes_up=np.where(measured.bytes_up > 0, measured.bytes_up, sent),
    )


def client_work(costs: tuple[ClientCost, ...], bucket: np.ndarray, info: RoundInfo) -> Work:
    """Deals what `round_costs` says of one round out to its clients.

    Operations go by local steps; those of `flops_per_round`, uploads and what was caught up on go
    evenly; a client that fails has downloaded in vain. The sums over clients are those of
    `round_costs`.

    Args:
      costs: by bucket.
      bucket: i32[C].
      info: of one round.
    Raises:
      ValueError: the rounds of `info` are several.
    """
    if np.size(info.selected) != len(costs):
        raise ValueError(
            f"info.selected has shape {np.shape(info.selected)}; give one round of {len(costs)} "
            "buckets at a time."
        )
    bucket = np.asarray(bucket)
    column = lambda x: np.asarray(x).reshape(-1)
    drawn, status, steps = map(column, info.cohort[:3])
    spent, work = _spent(costs, info), Work(*np.zeros((3, len(bucket))))
    measured = column(info.spent.flops) > 0
    for b, cost in enumerate(costs):
        mine = (bucket[drawn] == b) & (drawn >= 0)
        work.bytes_down[drawn[mine]] = cost.bytes_down
        worked = mine & (status != Status.ABSENT)
        if worked.any():
            missed = spent.bytes_down[b] - mine.sum() * cost.bytes_down
            work.bytes_down[drawn[worked]] += missed / worked.sum()
            each = 0 if measured[b] else cost.flops_per_round
            by_step = spent.flops[b] - each * worked.sum()
            share = steps[worked] / max(steps[worked].sum(), 1e-30)
            work.flops[drawn[worked]] = by_step * share + each
            work.bytes_up[drawn[worked]] = spent.bytes_up[b] / worked.sum()
    return work
