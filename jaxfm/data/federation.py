"""Many clients over one flat store of examples.

Clients own unequal numbers of examples. The examples stay flat, each once, and a list of row
numbers, client after client, says whose they are, so a compiled round gathers a client's batch with
two indexing operations, and a new partition of the same data changes only numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RowIndex:
    """Whose rows are whose; a pytree of as many numbers as clients have rows.

    Attributes:
      values: i32[T + longest], the rows of clients, one client's after another's. What follows
        them only lets a piece of `longest` numbers begin anywhere.
      start: i32[C], where each client's rows begin.
      size: i32[C], how many there are.
      longest: the length of a padded row: no client has more.
    """

    values: Array
    start: Array
    size: Array
    longest: int = dataclasses.field(metadata={"static": True})

    def padded(self, client: Array | int) -> Array:
        """i32[longest]: the rows of one client, then zeros; traceable."""
        start, size = self.start[client], self.size[client]
        rows = lax.dynamic_slice(jnp.asarray(self.values), (start,), (self.longest,))
        return jnp.where(jnp.arange(self.longest) < size, rows, 0)


def row_index(parts: Sequence[np.ndarray], longest: int | None = None) -> RowIndex:
    """Joins the rows of each client, each i[n], into a `RowIndex` of host arrays.

    Args:
      parts: by client.
      longest: the length of a padded row; None: the largest client's, at least 1.
    """
    size = np.array([len(rows) for rows in parts], np.int32)
    longest = max(1, size.max(initial=0)) if longest is None else longest
    filling = np.zeros(longest, np.int32)
    values = np.concatenate([*parts, filling]).astype(np.int32)
    start = np.cumsum(size, dtype=np.int64) - size
    return RowIndex(values, start.astype(np.int32), size, int(longest))


class Federation(NamedTuple):
    """Ragged clients over flat examples; a pytree.

    `federate` fills it with NumPy arrays. Place it once with `jax.device_put` (or with a sharding):
    host arrays handed to a compiled function are copied at every call.
    """

    examples: dict[str, Array]  # leaves [N, ...]
    # These two names hide methods of tuple that nobody needs here.
    index: RowIndex  # type: ignore[assignment]  # the rows of each client
    count: Array  # type: ignore[assignment]  # i32[C] how many of them count, the first ones

    def rows_of(self, client: int) -> np.ndarray:
        """i32[n]: the rows that one client owns; on the host."""
        start = int(self.index.start[client])
        return np.asarray(self.index.values)[start : start + int(self.count[client])]


def federate(examples: Mapping[str, np.ndarray], partition: Sequence[np.ndarray]) -> Federation:
    """Joins examples with a partition of their rows into a `Federation` of host arrays.

    Args:
      examples: arrays of equal leading size N.
      partition: for each client the rows that it owns, each i[n]; may be empty (count 0). Clients
        may share rows.
    Raises:
      ValueError: unequal leading sizes, no client, rows that are not in [0, N).
      TypeError: row numbers that are not integers.

    >>> federation = federate({"label": np.array([3, 1, 2])}, [np.array([2, 0]), np.array([1])])
    >>> [federation.rows_of(client).tolist() for client in range(2)]
    [[2, 0], [1]]
    """
    num_examples = leading_size(examples)
    rows = [np.asarray(client) for client in partition]
    if not rows:
        raise ValueError("The partition has no client; give one array of rows for each client.")
    for number, client in enumerate(rows):
        _check_rows(number, client, num_examples)
    index = row_index(rows)
    leaves: dict[str, Array] = {name: np.asarray(leaf) for name, leaf in examples.items()}
    return Federation(leaves, index, index.size)


def leading_size(examples: Mapping[str, Any]) -> int:
    """Returns the number of examples and checks that every leaf agrees on it."""
    if not examples:
        raise ValueError(
            "There is no leaf among the examples; give a dict of arrays, each [N, ...]."
        )
    shapes = {name: np.shape(leaf) for name, leaf in examples.items()}
    sizes = {shape[0] if shape else None for shape in shapes.values()}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(f"Every leaf must have the same leading size; got shapes {shapes}.")
    return next(iter(shapes.values()))[0]


def select_clients(federation: Federation, clients: Sequence[int] | np.ndarray) -> Federation:
    """Returns the given clients, in the given order, over the same examples."""
    num_clients = len(federation.count)
    clients = np.asarray(clients, np.int64)
    if clients.size == 0 or clients.min() < 0 or clients.max() >= num_clients:
        raise ValueError(
            f"clients must be a non-empty list of 0..{num_clients - 1}; got {clients}."
        )
    rows = all_rows(federation)
    index = row_index([rows[client] for client in clients])
    return Federation(federation.examples, index, index.size)


def of_one_shape(federations: Sequence[Federation]) -> list[Federation]:
    """Returns the federations with indices of equal shapes: rounds compile once for all of them."""
    longest = max(federation.index.longest for federation in federations)
    total = longest + max(
        len(federation.index.values) - federation.index.longest for federation in federations
    )

    def widened(federation: Federation) -> Federation:
        values = np.asarray(federation.index.values)
        values = np.pad(values, (0, total - len(values)))
        index = dataclasses.replace(federation.index, values=values, longest=longest)
        return federation._replace(index=index)

    return [widened(federation) for federation in federations]


def client_weights(federation: Federation) -> np.ndarray:
    """Returns f64[C]: what each client's rows weigh together, one each if they have no "weight"."""
    if "weight" not in federation.examples:
        return np.asarray(federation.count).astype(np.float64)
    weight = np.asarray(federation.examples["weight"], np.float64)
    return np.array([weight[rows].sum() for rows in all_rows(federation)])


def all_rows(federation: Federation) -> list[np.ndarray]:
    """Returns the rows of each client, i32[n]; on the host."""
    hosted = federation._replace(index=jax.tree.map(np.asarray, federation.index))
    return [hosted.rows_of(client) for client in range(len(federation.count))]


def merge(federation: Federation) -> dict[str, np.ndarray]:
    """Returns all rows that clients own, client after client: the centralised data set."""
    rows = np.concatenate(all_rows(federation))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], federation.examples)


def summary(
    federation: Federation,
    labels: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    *,
    num_largest: int = 5,
) -> str:
    """Returns a readable table: how many clients, how unequal, how skewed, which are the largest.

    Args:
      federation: what to describe.
      labels: i[N], the class of each example; adds classes per client and the entropy of the
        clients' label distributions in bits (log2 of the number of classes where all are equal).
      names: the clients' names, in their order.
      num_largest: how many of the largest clients to list.
    """
    count = np.asarray(federation.count)
    if names is not None and len(names) != len(count):
        raise ValueError(f"{len(names)} names for {len(count)} clients; give one for each.")
    lines = [
        f"{'clients':<22}{len(count):>10,}",
        f"{'examples':<22}{count.sum():>10,}",
        f"{'  min/median/max':<22}{count.min():>10,} /{np.median(count):>9,.0f} /{count.max():>9,}",
    ]
    if (count == 0).any():
        lines.append(f"{'  clients with none':<22}{(count == 0).sum():>10,}")
    if labels is not None:
        lines += _label_lines(all_rows(federation), np.asarray(labels))
    largest = np.argsort(-count, kind="stable")[:num_largest]
    lines.append("largest")
    lines += [
        f"  {names[client] if names is not None else client!s:<20}{count[client]:>10,}"
        for client in largest
    ]
    return "\n".join(lines)


def _label_lines(parts: list[np.ndarray], labels: np.ndarray) -> list[str]:
    classes, dense = np.unique(labels, return_inverse=True)
    table = np.stack(
        [np.bincount(dense[rows], minlength=len(classes)) for rows in parts if len(rows)]
    )
    share = table / table.sum(axis=1, keepdims=True)
    entropy = np.sum(share * -np.log2(np.where(share > 0, share, 1.0)), axis=1) + 0.0  # no -0.0
    present = (table > 0).sum(axis=1)
    low, middle, high = present.min(), np.median(present), present.max()
    return [
        f"{'classes':<22}{len(classes):>10,}",
        f"{'  per client':<22}{low:>10,} /{middle:>9,.0f} /{high:>9,}",
        f"{'  label entropy (bit)':<22}{entropy.min():>10.2f} /{np.median(entropy):>9.2f}"
        f" /{entropy.max():>9.2f}",
    ]


def _check_rows(number: int, client: np.ndarray, num_examples: int) -> None:
    if client.ndim != 1:
        raise ValueError(
            f"Client {number}: rows must be one-dimensional; got shape {client.shape}."
        )
    if client.size == 0:
        return
    if not np.issubdtype(client.dtype, np.integer):
        raise TypeError(f"Client {number}: rows must be integers; got dtype {client.dtype}.")
    if client.min() < 0 or client.max() >= num_examples:
        raise ValueError(
            f"Client {number}: rows must be in 0..{num_examples - 1}; "
            f"got {client.min()}..{client.max()}."
        )
