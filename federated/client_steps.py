"""What the clients in the slots of one device do, one after another or some side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.data.federation import RowIndex
from jaxfm.federated.algorithm import Bucket, ClientData, Profile
from jaxfm.federated.cohort import Report
from jaxfm.model import Array, Key, PyTree


def client_after_client(
    one: Callable, inputs: PyTree, memories: PyTree, taken: Array, at_once: int,
    *, is_sum: bool = True,
) -> tuple[PyTree, PyTree, Report, PyTree]:  # fmt: skip
    """What the clients in the slots of one device do, `at_once` of them side by side.

    Args:
      one: `(*inputs, memory) -> (received, memory, report)` of one client.
      inputs: a tuple of trees, leaves [slots, ...].
      memories: leaves [slots, ...].
      taken: bool[slots]; taken slots come first, and groups without one are never run.
      is_sum: whether what is received is added up.
    Returns:
      (the sums, or (); what was received by slot, or (); reports and memories by slot).
    """
    run = jax.jit(one, inline=True)  # traced once, for its shapes and in the loop
    shapes = jax.eval_shape(run, *jax.tree.map(lambda x: x[0], (*inputs, memories)))
    summed, _, reported = shapes
    zeros = lambda tree, *lead: jax.tree.map(lambda x: jnp.zeros(lead + x.shape, x.dtype), tree)
    grouped = lambda x: x.reshape(-1, at_once, *x.shape[1:])
    groups = taken.shape[0] // at_once
    inputs = jax.tree.map(grouped, inputs)

    def step(i: Array, carry):
        sums, received, reports, memories = carry
        slot = jax.tree.map(lambda x: x[i], (*inputs, memories))
        if at_once == 1:
            slot = jax.tree.map(lambda x: x[0], slot)
            new = jax.tree.map(lambda x: x[None], run(*slot))
        else:
            new = jax.vmap(run)(*slot)
        write = lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0)
        if is_sum:
            sums = jax.tree.map(lambda x, y: x + y.sum(0), sums, new[0])
        else:
            received = jax.tree.map(write, received, new[0])
        return (
            sums, received, jax.tree.map(write, reports, new[2]),
            jax.tree.map(write, memories, new[1]),
        )  # fmt: skip

    start = (
        zeros(summed) if is_sum else (), () if is_sum else zeros(summed, groups, at_once),
        zeros(reported, groups, at_once), jax.tree.map(grouped, memories),
    )  # fmt: skip
    busy = (taken.sum(dtype=jnp.int32) + at_once - 1) // at_once
    sums, *columns = lax.fori_loop(0, busy, step, start)
    received, reports, own = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), columns)
    return sums, received, reports, own


def client_step(
    bucket: Bucket, download, server, public, people, key: Key,
    client: Array, row: Array, present: Array, memory: PyTree,
) -> tuple[PyTree, PyTree, Report]:  # fmt: skip
    """(what the server received, the new memory, the report) of one client."""
    data, profile = client_of(people, row)
    data = data._replace(count=jnp.where(present, data.count, 0))
    upload, new, info = bucket.client(
        download, memory, data, profile, jax.random.fold_in(key, client)
    )
    works = data.count > 0
    finite = jnp.array([jnp.isfinite(x).all() for x in _floats((upload, new))]).all()
    counted = works & finite
    keep = lambda x, otherwise: jnp.where(counted, x, otherwise)
    received = bucket.receive(server, public, upload)
    received = jax.tree.map(lambda x: keep(wide(x), 0), received)
    spend = lambda x: jnp.where(works & jnp.isfinite(x), x, 0)
    info = jax.tree.map(lambda x: keep(x, 0), info)._replace(spent=jax.tree.map(spend, info.spent))
    as_float = lambda x: x.astype(jnp.float32)
    report = Report(as_float(counted), as_float(works & ~finite), info)
    return received, jax.tree.map(keep, new, memory), report


def client_of(people, row: Array) -> tuple[ClientData, Profile]:
    """One client's part of (federation, profiles, index and count of validation rows)."""
    federation, profiles, validation = people
    held = () if validation is None else validation
    own: Any = [
        x.padded(row) if isinstance(x, RowIndex) else x[row] for x in (*federation[1:], *held)
    ]
    data = ClientData(federation.examples, *own)
    return data, jax.tree.map(lambda x: x[row], profiles)


def _floats(tree: PyTree) -> list[Array]:
    """The leaves that may be infinite; not keys, nor integers."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def wide(x: Array) -> Array:
    """The array in a dtype to sum in: bfloat16 forgets small terms, int8 overflows."""
    if x.dtype.itemsize >= 4:
        return x
    return x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)
