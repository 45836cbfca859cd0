"""What a core, its memory and the loopback do, in all processes of a job at once."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_parts.ceilings import chained_seconds
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm.parallel.mesh import make_mesh

PRODUCT, COPY, EXCHANGE = 1024, 2**27, 2**23  # side of a matrix; bytes
TINY = 1024  # bytes of an exchange that is all latency


def core(calls: int) -> dict[str, float]:
    """FLOP/s of a product of square matrices, and bytes/s read and written by a pass."""
    x, w = (jax.random.normal(key, (PRODUCT, PRODUCT)) for key in jax.random.split(_key()))
    product = jax.jit(lambda x: x @ (w / PRODUCT**0.5))
    row = jax.random.normal(_key(), (COPY // 4,))
    passing = jax.jit(jnp.negative, donate_argnums=0)
    return {
        "flops": 2 * PRODUCT**3 / chained_seconds(product, x, calls),
        "memory": 2 * COPY / chained_seconds(passing, row, max(2, calls // 4)),
    }


def exchange(calls: int) -> dict[str, float]:
    """Bytes/s of the link, from an all-reduce's 2 (n - 1) / n bytes, and seconds of a message."""
    devices = len(jax.devices())
    large, tiny = (_all_reduce_s(nbytes, calls) for nbytes in (EXCHANGE, TINY))
    deep = (devices - 1).bit_length()
    return {
        "link": 2 * (devices - 1) / devices * EXCHANGE / max(large - tiny, 1e-9),
        "latency": tiny / (2 * deep),
    }


def _all_reduce_s(nbytes: int, calls: int) -> float:
    devices = len(jax.devices())
    mesh = make_mesh(clients=devices)
    share = NamedSharding(mesh, P("clients"))
    shape = (devices, nbytes // 4)
    x = jax.make_array_from_callback(
        shape, share, lambda at: np.zeros((1, shape[1]), np.float32), dtype=np.float32
    )
    mean = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.pmean(x, "clients"), mesh=mesh, in_specs=P("clients"),
            out_specs=P("clients"),
        )
    )  # fmt: skip
    x = jax.block_until_ready(mean(mean(x)))
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        x = jax.block_until_ready(mean(x))
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def _key():
    return jax.random.key(0)
