"""The largest entries of each chunk, with error feedback, in 2 bits and 12 bits of place.

    p = u + b e_i;   sent = Q(top k of each chunk of p);   e_i <- p - sent

Q keeps an entry's sign and whether it is large: it becomes plus or minus the mean magnitude of the
entries of its chunk that are above their mean, or of those that are not. With 64 of 4,096 entries a
chunk costs 116 bytes in the place of 16,384.
Source: Sarfi et al. 2025 (SparseLoCo), algorithm 1 and section 3 (1 to 3% of the entries, b = 0.95,
an outer step without momentum, since the error feedback takes its place).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxfm.federated.wrappers.methods import Method, joined_bits, split_bits
from jaxfm.model import Array, Key

_LARGEST_CHUNK = 2**12  # whose places take 12 bits


class Sparse(NamedTuple):
    """What travels of a leaf of n entries in R chunks, k entries of each.

    Attributes:
      places: u8, of the entries in their chunks, 12 bits each; in chunks of up to 256 entries 8.
      codes: u8[ceil(R k / 4)], the lower bit the sign, the upper one which of the two levels.
      levels: bfloat16[R, 2], magnitudes, the small one first.
    """

    places: Array
    codes: Array
    levels: Array


def sparse(fraction: float, *, chunk: int = 4096, decay: float = 0.95) -> Method:
    """The largest entries of each chunk of a leaf in 2 bits, with error feedback.

    Args:
      fraction: of the entries of a chunk, in (0, 1]; k = max(1, round(fraction * chunk)).
      chunk: entries of a chunk, up to 4,096; a smaller leaf is one chunk.
      decay: the share of what was left out that a client keeps to its next round.
    Raises:
      ValueError: a value out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}.")
    if not 1 <= chunk <= _LARGEST_CHUNK:
        raise ValueError(f"chunk must be from 1 to {_LARGEST_CHUNK}, got {chunk}.")
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}.")

    def sizes(n: int) -> tuple[int, int, int]:
        """(chunks, entries of a chunk, entries sent of each)."""
        size = min(chunk, n)
        return -(-n // size), size, max(1, round(fraction * size))

    def pack(x: Array, dtype: Any, key: Key | None) -> Sparse:
        chunks, size, k = sizes(x.size)
        rows = jnp.pad(x, (0, chunks * size - x.size)).reshape(chunks, size)
        places = lax.top_k(jnp.abs(rows), k)[1]
        values = jnp.take_along_axis(rows, places, axis=1)
        magnitude = jnp.abs(values)
        is_large = magnitude > magnitude.mean(1, keepdims=True)
        levels = jnp.stack([_mean(magnitude, ~is_large), _mean(magnitude, is_large)], axis=1)
        codes = (values < 0).astype(jnp.uint8) + jnp.uint8(2) * is_large.astype(jnp.uint8)
        return Sparse(
            _packed(places, size), joined_bits(codes.reshape(-1), 2), levels.astype(jnp.bfloat16)
        )

    def unpack(payload: Sparse, n: int) -> Array:
        chunks, size, k = sizes(n)
        places = _unpacked(payload.places, size, chunks * k).reshape(chunks, k)
        codes = split_bits(payload.codes, 2, chunks * k).reshape(chunks, k)
        levels = payload.levels.astype(jnp.float32)
        magnitude = jnp.where(codes > 1, levels[:, 1:], levels[:, :1])
        values = jnp.where(codes % 2 == 1, -magnitude, magnitude)
        row = jnp.arange(chunks)[:, None]
        whole = jnp.zeros((chunks, size), jnp.float32)
        return whole.at[row, places].set(values, unique_indices=True).reshape(-1)[:n]

    return Method(pack, unpack, feedback=True, decay=decay)


def _mean(values: Array, where: Array) -> Array:
    """f[R]: the mean of each row over some of its entries; 0 over none."""
    count = where.sum(1, dtype=values.dtype)
    return jnp.where(where, values, 0).sum(1) / jnp.maximum(count, 1)


def _packed(places: Array, size: int) -> Array:
    """u8: places below `size` in 8 bits each, or two of them in 3 bytes."""
    flat = places.reshape(-1)
    if size <= 256:
        return flat.astype(jnp.uint8)
    first, second = jnp.pad(flat, (0, flat.size % 2)).reshape(-1, 2).T
    parts = (first & 255, (first >> 8) | ((second & 15) << 4), second >> 4)
    return jnp.stack(parts, axis=1).astype(jnp.uint8).reshape(-1)


def _unpacked(packed: Array, size: int, n: int) -> Array:
    """i32[n]: the places that `_packed` packed."""
    if size <= 256:
        return packed.astype(jnp.int32)
    low, middle, high = packed.astype(jnp.int32).reshape(-1, 3).T
    pairs = (low | ((middle & 15) << 8), (middle >> 4) | (high << 4))
    return jnp.stack(pairs, axis=1).reshape(-1)[:n]
