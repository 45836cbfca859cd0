"""Where clients' data and memories lie: on every device, or each on a device of its own.

Without homes all arrays of a population are replicated. With `Population.home` each device holds a
block: its clients' examples, tables and memories, padded to the largest block, so that the arrays
are sharded along the mesh axis "clients" and no process ever holds the data of another's clients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm.data.federation import Federation, RowIndex, row_index
from jaxfm.federated.cohort import Whereabouts
from jaxfm.federated.population import Population
from jaxfm.model import PyTree
from jaxfm.parallel.mesh import put


def find(
    population: Population, num_buckets: int, devices: int
) -> tuple[Whereabouts, tuple[np.ndarray, ...]]:
    """Finds the rows at which each client's data and memory lie.

    Returns:
      The tables of all clients, and per bucket i32[rows], the client of each row of its memories;
      -1 for rows that only fill a block.
    """
    bucket = np.asarray(population.bucket, np.int32)
    num_clients = len(bucket)
    memory = np.zeros(num_clients, np.int32)
    if population.home is None:
        members = tuple(np.flatnonzero(bucket == b).astype(np.int32) for b in range(num_buckets))
        for ids in members:
            memory[ids] = np.arange(len(ids))
        return Whereabouts(bucket, np.arange(num_clients, dtype=np.int32), memory, None), members
    home = np.asarray(population.home, np.int32)
    row = np.zeros(num_clients, np.int32)
    for ids in _blocks(home, devices):
        row[ids] = np.arange(len(ids))
    members = ()
    for b in range(num_buckets):
        blocks = [ids[bucket[ids] == b] for ids in _blocks(home, devices)]
        table = np.full((devices, max(map(len, blocks))), -1, np.int32)
        for device, ids in enumerate(blocks):
            memory[ids] = np.arange(len(ids))
            table[device, : len(ids)] = ids
        members += (table.reshape(-1),)
    return Whereabouts(bucket, row, memory, home), members


def settle(population: Population, mesh: Mesh) -> PyTree:
    """Puts (federation, profiles, index and count of validation rows) on their devices."""
    validation = population.local_validation
    if population.home is None:
        everywhere = NamedSharding(mesh, P())
        people = (population.federation, population.profiles, validation and validation[1:])
        return jax.tree.map(lambda x: put(x, everywhere), people)
    devices = mesh.shape["clients"]
    blocks = _blocks(np.asarray(population.home), devices)
    most = max(map(len, blocks))
    tables = [population.federation] + ([] if validation is None else [validation])
    rows = [_rows(tables, ids) for ids in blocks]
    num_rows = _largest(max(map(len, rows)))
    spread = NamedSharding(mesh, P("clients"))

    def sharded(shape: tuple[int, ...], dtype: Any, block: Callable[[int], np.ndarray]):
        """An array of one padded block a device; only this process's blocks are ever made."""

        def part(index) -> np.ndarray:
            device = (index[0].start or 0) // shape[0]
            own = block(device)
            return np.pad(own, [(0, shape[0] - len(own))] + [(0, 0)] * (own.ndim - 1))

        whole = (devices * shape[0], *shape[1:])
        return jax.make_array_from_callback(whole, spread, part, dtype=dtype)

    def of_clients(x):
        x = np.asarray(x)
        return sharded((most, *x.shape[1:]), x.dtype, lambda device: x[blocks[device]])

    def of_examples(x):
        x = np.asarray(x)
        return sharded((num_rows, *x.shape[1:]), x.dtype, lambda device: x[rows[device]])

    def index_of(table: Federation) -> RowIndex:
        longest = _largest(table.index.longest)

        def block(device: int) -> RowIndex:
            own = [np.searchsorted(rows[device], table.rows_of(i)) for i in blocks[device]]
            return row_index(own, longest)

        total = longest + _largest(max(int(np.asarray(table.count)[ids].sum()) for ids in blocks))
        part = lambda name, size: sharded(
            (size,), np.dtype(np.int32), lambda device: getattr(block(device), name)
        )
        return RowIndex(part("values", total), part("start", most), part("size", most), longest)

    own = [(index_of(table), of_clients(table.count)) for table in tables]
    examples = {name: of_examples(leaf) for name, leaf in population.federation.examples.items()}
    profiles = jax.tree.map(of_clients, population.profiles)
    return Federation(examples, *own[0]), profiles, own[1] if validation is not None else None


def _blocks(home: np.ndarray, devices: int) -> list[np.ndarray]:
    """The clients of each device."""
    return [np.flatnonzero(home == device) for device in range(devices)]


def _rows(tables: list[Federation], ids: np.ndarray) -> np.ndarray:
    """The rows of the examples that some clients own, sorted; at least one."""
    parts = [np.zeros(0, np.int64)]
    for table in tables:
        parts += [table.rows_of(client) for client in ids]
    rows = np.unique(np.concatenate(parts))
    return rows if len(rows) else np.zeros(1, np.int64)


def _largest(size: int) -> int:
    """The largest of a number over all processes, which must agree on the shapes of blocks."""
    if jax.process_count() == 1:
        return size
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int64(size))))
