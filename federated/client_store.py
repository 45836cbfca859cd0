"""What clients keep between rounds, on disk: one sparse file, a record for each client.

    store = ClientStore("runs/large/memories", 1_000_000)
    memories, seen = store.read(clients, round, like)
    store.write(clients, round + 1, memories)
    store.keep(round)  # after a checkpoint of this round is whole

A record has room for two memories, each with the round that it was written after. The newest one
that a checkpoint may need is never written over, so that a run which is killed and goes on from its
last checkpoint finds each client as it was then. Records are read and written at their place: the
population takes room in the file, and none in memory.
"""

from __future__ import annotations

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import PyTree

_STAMP = 8  # bytes of a round's number, i64; 0: nothing was written


class ClientStore:
    """The memories of a population in a file; see the module."""

    def __init__(self, path: str | os.PathLike[str], num_clients: int):
        """Opens the file, or makes it.

        Args:
          path: of the file; what is beside it is left alone.
          num_clients: in all.
        """
        self.path, self.num_clients = pathlib.Path(path), num_clients
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self._kept = 0

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def keep(self, round: int) -> None:
        """Says that a checkpoint of the state after so many rounds is whole."""
        self._kept = round

    def read(self, clients: np.ndarray, round: int, like: PyTree) -> tuple[PyTree, np.ndarray]:
        """The memories of some clients as they were after so many rounds.

        Args:
          clients: i[K], distinct.
          round: rounds done.
          like: leaves [K, ...] of the same dtypes, of arrays or `jax.ShapeDtypeStruct`.
        Returns:
          Leaves [K, ...], zeros for clients that have none; and bool[K], who has one.
        Raises:
          ValueError: the file is of another population or other memories; a leaf is a typed key.
        """
        leaves, structure = jax.tree.flatten(like)
        sizes = [_bytes(leaf) for leaf in leaves]
        self._check_file(sum(sizes))
        stamps, slots = self._records(clients, sum(sizes))
        stamps = np.where(stamps <= round, stamps, 0)
        newest = slots[np.arange(len(clients)), stamps.argmax(1)]
        seen = stamps.max(1, initial=0) > 0
        newest[~seen] = 0
        ends = np.cumsum([0, *sizes])
        found = [
            np.ascontiguousarray(newest[:, a:b]).view(np.dtype(leaf.dtype)).reshape(leaf.shape)
            for leaf, a, b in zip(leaves, ends[:-1], ends[1:])
        ]
        return jax.tree.unflatten(structure, found), seen

    def write(self, clients: np.ndarray, round: int, memories: PyTree) -> None:
        """Writes the memories of some clients.

        Args:
          clients: i[K], distinct.
          round: rounds done, with the one that left these.
          memories: leaves [K, ...].
        """
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(memories)]
        size = sum(_bytes(leaf) for leaf in leaves)
        self._check_file(size)
        rows = np.concatenate([_as_bytes(leaf) for leaf in leaves], axis=1)
        stamps, _ = self._records(clients, size)
        needed = np.where(stamps <= self._kept, stamps, -1)
        slots = np.where(needed.max(1) > 0, 1 - needed.argmax(1), 0)
        stamp = np.int64(round).tobytes()
        for client, slot, row in zip(clients.tolist(), slots.tolist(), rows):
            place = (2 * client + slot) * (_STAMP + size)
            os.pwrite(self._file, stamp + row.tobytes(), place)

    def _records(self, clients: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """i64[K, 2] the stamps, and u8[K, 2, size] the memories."""
        length = 2 * (_STAMP + size)
        parts = [os.pread(self._file, length, client * length) for client in clients.tolist()]
        whole = np.frombuffer(b"".join(parts), np.uint8).reshape(len(parts), 2, _STAMP + size)
        stamps = np.ascontiguousarray(whole[:, :, :_STAMP]).view(np.int64)[:, :, 0]
        return stamps, whole[:, :, _STAMP:]

    def _check_file(self, size: int) -> None:
        """Makes a new file as long as all records, which takes no room, or checks a found one."""
        wanted, found = 2 * (_STAMP + size) * self.num_clients, os.fstat(self._file).st_size
        if not found:
            os.ftruncate(self._file, wanted)
        elif found != wanted:
            raise ValueError(
                f"{self.path} has {found:,} bytes, and {self.num_clients:,} clients with {size:,} "
                f"bytes each need {wanted:,}: it is another run's; give another path."
            )


def _bytes(leaf) -> int:
    """Of one client's part of a leaf [K, ...]."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError("A memory on disk holds arrays of numbers; keep jax.random.key_data.")
    return int(np.prod(leaf.shape[1:], dtype=np.int64)) * np.dtype(leaf.dtype).itemsize


def _as_bytes(leaf: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(leaf.reshape(len(leaf), -1))
    return flat.view(np.uint8).reshape(len(leaf), -1)
