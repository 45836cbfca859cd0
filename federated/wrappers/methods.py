"""What one array becomes on the wire: its largest entries, or all of them in few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.model import Array, Key, PyTree


class Method(NamedTuple):
    """How one leaf is compressed.

    Attributes:
      pack: `(x float[n] of 32 bits or more, the leaf's own dtype, key) -> payload that travels`;
        rounding without a key is to the nearest.
      unpack: `(payload, n) -> float[n]`.
      feedback: whether clients keep what a round left out.
      decay: the share of what was left out that a client keeps to its next round.
    """

    pack: Callable[[Array, Any, Key | None], PyTree]
    unpack: Callable[[PyTree, int], Array]
    feedback: bool
    decay: float = 1.0


def top_k(fraction: float, bits: int | None = None) -> Method:
    """The entries of largest magnitude of each leaf and their i32 places, with error feedback.

    Args:
      fraction: of the entries of a leaf, in (0, 1]; k = max(1, round(fraction * n)).
      bits: 8 or 4, to round what is sent as `quantised` does; e_i takes that error in. None: no.
    Raises:
      ValueError: fraction out of range; other bits.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}.")
    inner = quantised(bits) if bits is not None else None
    count = lambda n: max(1, round(fraction * n))

    def pack(x: Array, dtype, key: Key | None) -> tuple[PyTree, Array]:
        index = lax.top_k(jnp.abs(x), count(x.size))[1]
        return inner.pack(x[index], dtype, key) if inner else x[index].astype(dtype), index

    def unpack(payload: tuple[PyTree, Array], n: int) -> Array:
        values, index = payload
        values = inner.unpack(values, count(n)) if inner else values
        return jnp.zeros(n, values.dtype).at[index].set(values, unique_indices=True)

    return Method(pack, unpack, feedback=True)


def quantised(bits: int, block: int | None = None) -> Method:
    """Unbiased random rounding to whole multiples of an f32 step.

    Args:
      bits: 8 (codes -127..127, i8[n]), 4 (codes -7..7) or 2 (codes -1..1), as `joined_bits` packs
        them.
      block: entries that share a step, so that one does not coarsen all; None: a whole leaf.
    Raises:
      ValueError: other bits; block below 1.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 8, 4 or 2, got {bits}.")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, or None for a whole leaf, got {block}.")
    largest = 2 ** (bits - 1) - 1

    def in_blocks(x: Array) -> Array:
        size = block or x.size
        return jnp.pad(x, (0, -x.size % size)).reshape(-1, size)

    def pack(x: Array, dtype, key: Key | None) -> tuple[Array, Array]:
        rows = in_blocks(x)
        step = (jnp.abs(rows).max(1) / largest).astype(jnp.float32)
        levels = rows / jnp.where(step > 0, step, 1).astype(x.dtype)[:, None]
        shift = 0.5 if key is None else jax.random.uniform(key, rows.shape, x.dtype)
        codes = jnp.floor(levels + shift)
        # The sum of the largest level and a number just below 1 may have been rounded up.
        codes = jnp.clip(codes, -largest, largest).astype(jnp.int8).reshape(-1)[: x.size]
        if bits < 8:
            codes = joined_bits((codes + largest + 1).astype(jnp.uint8), bits)
        return codes, step

    def unpack(payload: tuple[Array, Array], n: int) -> Array:
        codes, step = payload
        if bits < 8:
            codes = split_bits(codes, bits, n).astype(jnp.int8) - (largest + 1)
        return (in_blocks(codes).astype(jnp.float32) * step[:, None]).reshape(-1)[:n]

    return Method(pack, unpack, feedback=False)


def joined_bits(codes: Array, bits: int) -> Array:
    """u8[ceil(n * bits / 8)]: codes u8[n] of 4 or 2 bits, the first in the lowest bits."""
    each = 8 // bits
    rows = jnp.pad(codes, (0, -codes.size % each)).reshape(-1, each)
    return (rows << (bits * jnp.arange(each, dtype=jnp.uint8))[None]).sum(1, dtype=jnp.uint8)


def split_bits(packed: Array, bits: int, n: int) -> Array:
    """u8[n]: the codes that `joined_bits` packed."""
    shifts = bits * jnp.arange(8 // bits, dtype=jnp.uint8)
    codes = (packed[:, None] >> shifts[None]) & jnp.uint8(2**bits - 1)
    return codes.reshape(-1)[:n]
