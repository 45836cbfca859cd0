"""What a run costs its clients: bytes, operations and memory, from the trees really sent.

Costs of one client follow from the shapes of its bucket's download, upload and program; a round's
costs are those times who took part, as the round itself reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.cost import count_flops, loop_bytes, loop_flops, num_bytes
from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Known
from jaxfm.federated.rounds import Population
from jaxfm.model import PyTree, Variables, count_parameters


class ClientCost(NamedTuple):
    """One client of a bucket.

    Attributes:
      bytes_down, bytes_up: of one download and one upload.
      parameters: that it trains.
      memory_bytes: that training holds from step to step (parameters, optimizer state, statistics)
        and one gradient; activations come on top.
      flops_per_step: of one local step.
      flops_per_round: beside them, once a round: a search, predictions on public data.
    """

    bytes_down: int
    bytes_up: int
    parameters: int
    memory_bytes: int
    flops_per_step: int
    flops_per_round: int = 0


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
      public: as given to `rounds`.
    """
    server = jax.eval_shape(algorithm.init, variables)
    return tuple(_cost(bucket, population, server, public) for bucket in algorithm.buckets)


def client_shapes(
    bucket: Bucket, population: Population, server: PyTree, public: PyTree = None
) -> tuple[PyTree, ...]:
    """Shapes of what `bucket.client` takes: download, memory, data, profile, key.

    Args:
      server: shapes of the algorithm's state.
      public: as given to `rounds`.
    """
    federation = population.federation
    shape: Any = jax.ShapeDtypeStruct
    data = ClientData(
        jax.tree.map(lambda x: shape(x.shape, x.dtype), dict(federation.examples)),
        shape(federation.index.shape[1:], jnp.int32),
        shape((), jnp.int32),
    )
    profile = jax.tree.map(lambda x: shape((), jnp.asarray(x).dtype), population.profiles)
    key = jax.eval_shape(lambda: jax.random.key(0))
    download = jax.eval_shape(bucket.send, server, public)
    if population.held is not None:
        rows = shape(population.held.index.shape[1:], jnp.int32)
        data = data._replace(held_index=rows, held_count=data.count)
    memory = jax.eval_shape(bucket.init_client, download, data, profile, key)
    return download, memory, data, profile, key


def _cost(bucket: Bucket, population: Population, server: PyTree, public: PyTree) -> ClientCost:
    args = client_shapes(bucket, population, server, public)
    download, memory = args[:2]
    upload, _, _ = jax.eval_shape(bucket.client, *args)
    personal = jax.eval_shape(bucket.personal, server, memory)
    a_step = loop_flops(bucket.client, *args)
    sent = jax.tree.map(_travels, download, is_leaf=lambda x: isinstance(x, Variables | Known))
    return ClientCost(
        bytes_down=num_bytes(sent),
        bytes_up=num_bytes(upload),
        parameters=count_parameters(personal.params),
        memory_bytes=loop_bytes(bucket.client, *args) + num_bytes((personal.params, personal.live)),
        flops_per_step=a_step,
        flops_per_round=count_flops(bucket.client, *args) - a_step,
    )


def _travels(part: Any) -> Any:
    """What of a part of a download goes over the wire."""
    if isinstance(part, Known):
        return ()
    # Which channels are live is structure, known to both sides.
    return (part.params, part.stats) if isinstance(part, Variables) else part


def round_costs(costs: tuple[ClientCost, ...], info: Mapping) -> dict[str, float]:
    """Bytes and operations of the rounds that `info` (of `Rounds.run`) reports, summed.

    Whoever was selected got the download; whoever reported, with a finite update or not, sent an
    upload. A bucket that reports "bytes_up" or "flops" of its own is believed.

    Returns:
      "bytes_down", "bytes_up", "flops": of all clients together.
    """
    return {name: float(part.sum()) for name, part in _spent(costs, info)._asdict().items()}


def _spent(costs: tuple[ClientCost, ...], info: Mapping) -> Work:
    """What the clients of each bucket did together, f64[buckets]."""
    per_bucket = lambda name: np.asarray(info[name], np.float64).reshape(-1, len(costs)).sum(0)
    selected = per_bucket("selected")
    reported = per_bucket("clients") + per_bucket("non_finite")
    own = lambda name: per_bucket(name) if name in info else np.zeros(len(costs))
    up = np.where(own("bytes_up") > 0, own("bytes_up"), reported * [c.bytes_up for c in costs])
    flops = own("steps") * [cost.flops_per_step for cost in costs]
    flops = flops + reported * [cost.flops_per_round for cost in costs]
    return Work(
        bytes_down=selected * [cost.bytes_down for cost in costs],
        flops=np.where(own("flops") > 0, own("flops"), flops),
        bytes_up=up,
    )


def client_work(
    costs: tuple[ClientCost, ...],
    bucket: np.ndarray,
    steps: np.ndarray,
    drawn: np.ndarray,
    reports: np.ndarray,
    info: Mapping,
) -> Work:
    """Deals what `round_costs` says of one round out to the clients of each bucket.

    Operations go by local steps, those of `flops_per_round` and uploads evenly; whoever fails has
    downloaded in vain. The sums over clients are those of `round_costs`.

    Args:
      bucket: i32[C].
      steps: i32[C], local steps of a client in a round; 0 without data.
      drawn, reports: of `rounds.draw`.
      info: of one round.
    Raises:
      ValueError: the rounds of `info` are several.
    """
    shape = np.shape(info["selected"])
    if int(np.prod(shape)) != len(costs):
        raise ValueError(
            f"info['selected'] has shape {shape}; give one round of {len(costs)} buckets at a time."
        )
    bucket, steps = np.asarray(bucket), np.asarray(steps, np.float64)
    is_drawn = np.zeros(len(bucket), bool)
    is_drawn[np.asarray(drawn)] = True
    present = is_drawn & np.asarray(reports) & (steps > 0)
    spent, work = _spent(costs, info), Work(*np.zeros((3, len(bucket))))
    for b, cost in enumerate(costs):
        took = present & (bucket == b)
        work.bytes_down[is_drawn & (bucket == b)] = cost.bytes_down
        if took.any():
            each = 0 if "flops" in info else cost.flops_per_round
            by_step = spent.flops[b] - each * took.sum()
            work.flops[took] = by_step * steps[took] / steps[took].sum() + each
            work.bytes_up[took] = spent.bytes_up[b] / took.sum()
    return work
