"""What a core, its memory and the loopback do, in all processes of a job at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm.parallel.mesh import make_mesh
from scale_parts.clocks import Seconds, chained

PRODUCT, COPY, EXCHANGE = 1024, 2**27, 2**23  # side of a matrix; bytes
TINY = 1024  # bytes of an exchange that is all latency


def machine(calls: int) -> dict[str, Seconds]:
    """Rates by clock: FLOP/s of a product of square matrices; bytes/s read and written by a pass;
    bytes/s of the link, from an all-reduce's 2 (n - 1) / n bytes; and seconds of a message."""
    x, w = (jax.random.normal(key, (PRODUCT, PRODUCT)) for key in jax.random.split(_key()))
    product = chained(jax.jit(lambda x: x @ (w / PRODUCT**0.5)), x, calls)
    row = jax.random.normal(_key(), (COPY // 4,))
    passed = chained(jax.jit(jnp.negative, donate_argnums=0), row, calls)
    large, tiny = (_all_reduce(nbytes, calls) for nbytes in (EXCHANGE, TINY))
    devices = len(jax.devices())
    sent, deep = 2 * (devices - 1) / devices * EXCHANGE, (devices - 1).bit_length()
    return {
        clock: {
            "flops": 2 * PRODUCT**3 / product[clock],
            "memory": 2 * COPY / passed[clock],
            "link": sent / max(large[clock] - tiny[clock], 1e-9),
            "latency": tiny[clock] / (2 * deep),
        }
        for clock in product
    }


def _all_reduce(nbytes: int, calls: int) -> Seconds:
    devices = len(jax.devices())
    mesh = make_mesh(clients=devices)
    shape = (devices, nbytes // 4)
    x = jax.make_array_from_callback(
        shape, NamedSharding(mesh, P("clients")),
        lambda at: np.zeros((1, shape[1]), np.float32), dtype=np.float32,
    )  # fmt: skip
    mean = jax.shard_map(
        lambda x: jax.lax.pmean(x, "clients"), mesh=mesh, in_specs=P("clients"),
        out_specs=P("clients"), check_vma=False,
    )  # fmt: skip
    return chained(jax.jit(mean), x, calls)


def _key():
    return jax.random.key(0)
