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

from jaxfm.cost import count_flops, loop_bytes, num_bytes
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
    """

    bytes_down: int
    bytes_up: int
    parameters: int
    memory_bytes: int
    flops_per_step: int


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


def _cost(bucket: Bucket, population: Population, server: PyTree, public: PyTree) -> ClientCost:
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
    args = (download, memory, data, profile, key)
    upload, _, _ = jax.eval_shape(bucket.client, *args)
    personal = jax.eval_shape(bucket.personal, server, memory)
    sent = jax.tree.map(_travels, download, is_leaf=lambda x: isinstance(x, Variables | Known))
    return ClientCost(
        bytes_down=num_bytes(sent),
        bytes_up=num_bytes(upload),
        parameters=count_parameters(personal.params),
        memory_bytes=loop_bytes(bucket.client, *args) + num_bytes((personal.params, personal.live)),
        flops_per_step=count_flops(bucket.client, *args),
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
    per_bucket = lambda name: np.asarray(info[name], np.float64).reshape(-1, len(costs)).sum(0)
    selected = per_bucket("selected")
    reported = per_bucket("clients") + per_bucket("non_finite")
    own = lambda name: per_bucket(name) if name in info else np.zeros(len(costs))
    up = np.where(own("bytes_up") > 0, own("bytes_up"), reported * [c.bytes_up for c in costs])
    flops = own("steps") * [cost.flops_per_step for cost in costs]
    return {
        "bytes_down": float(selected @ [cost.bytes_down for cost in costs]),
        "bytes_up": float(up.sum()),
        "flops": float(np.where(own("flops") > 0, own("flops"), flops).sum()),
    }
