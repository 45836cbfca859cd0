"""Numbers as words modulo 2^32 that can be added up: fixed point.

    w_i = round(x_i / step) mod 2^32;    sum_i x_i ~ step * signed(sum_i w_i mod 2^32)

With n clients at most and numbers of at most `limit`, a power of two,

    step = limit / 2^b,    n 2^b < 2^31

so that no sum wraps. Scaling by a power of two is exact, and what remains is rounding:

    |sum - exact sum| <= n step / 2 + 2^-24 |sum|

or n step where numbers are cut towards zero, so that none grows (a norm that they were clipped to
then holds for what is sent, too). What is `Exact`, and every scalar, takes two words: the second
holds what the first one left out, at a step that is 2^(b + 1) times smaller, and numbers up to 2^24
fit. Whole ones, such as counts of examples, are summed exactly.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.algorithm import Exact, full_width
from jaxfm.model import Array, PyTree

EXACT_LIMIT = 2.0**24  # up to which float32 holds whole numbers
_MOST_CLIENTS = 2**20


class Encoded(NamedTuple):
    """An encoded tree.

    Attributes:
      words: a tree with `Words` for leaves.
      clipped: u32[], entries beyond their limit.
      largest: f32[], the largest magnitude among numbers of one word, before it was clipped.
    """

    words: PyTree
    clipped: Array
    largest: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Words:
    """An encoded leaf, or a sum of some.

    Attributes:
      words: u32[...], of the leaf's shape; of two words u32[2, ...].
      dtype: in which the leaf is summed without this wrapper.
      is_exact: whether there are two words.
    """

    words: Array
    dtype: Any = dataclasses.field(metadata={"static": True})
    is_exact: bool = dataclasses.field(metadata={"static": True})


def word_bits(num_clients: int) -> int:
    """b, the bits of one client's words without their sign: n 2^b < 2^31.

    Raises:
      ValueError: n is out of range.
    """
    if not 1 <= num_clients <= _MOST_CLIENTS:
        raise ValueError(
            f"num_clients={num_clients} must be from 1 to {_MOST_CLIENTS}: a word of 32 bits "
            "holds the sum of all of them."
        )
    return ((2**31 - 1) // num_clients).bit_length() - 1


def encode(tree: PyTree, limit: Array | float, bits: int, cut: bool = False) -> Encoded:
    """The tree in words.

    Args:
      tree: leaves float32 or integers; what is `Exact`, or a scalar, takes two words.
      limit: f32[], a power of two: of numbers of one word, in magnitude; larger ones are clipped.
      bits: of `word_bits`.
      cut: towards zero, instead of rounding to the nearest.
    """
    clipped, largest = [jnp.zeros((), jnp.uint32)], [jnp.zeros((), jnp.float32)]

    def count(x: Array, most: Array | float) -> None:
        clipped.append((jnp.abs(x) > most).sum(dtype=jnp.uint32))

    def whole(x: Array) -> Words:
        number = x.astype(jnp.int32)
        count(number, 2**bits)
        code = jnp.clip(number, -(2**bits), 2**bits)
        dtype = x.dtype if x.dtype.itemsize == 4 else number.dtype
        return Words(code.astype(jnp.uint32), dtype, False)

    def leaf(x: Array, is_exact: bool) -> Words:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return whole(x)
        x = full_width(x)
        number = x.astype(jnp.float32)
        most = EXACT_LIMIT if is_exact else limit
        count(number, most)
        first, rest = _word(jnp.clip(number, -most, most), most * 2.0**-bits, cut and not is_exact)
        if not is_exact:
            largest.append(jnp.abs(number).max(initial=0))
            return Words(first, x.dtype, False)
        second, _ = _word(rest, EXACT_LIMIT * 2.0 ** (-2 * bits - 1), cut)
        return Words(jnp.stack([first, second]), x.dtype, True)

    def part(x: Any) -> Any:
        if isinstance(x, Exact):
            return Exact(jax.tree.map(lambda y: leaf(y, True), x.value))
        return leaf(x, not x.ndim)

    words = jax.tree.map(part, tree, is_leaf=lambda x: isinstance(x, Exact))
    total = jnp.minimum(jnp.stack(clipped).sum(dtype=jnp.uint32), jnp.uint32(2**bits))
    return Encoded(words, total, jnp.stack(largest).max())


def decode(words: PyTree, limit: Array | float, bits: int) -> PyTree:
    """The numbers of a tree of `Words`, or of their sums modulo 2^32."""

    def leaf(x: Words) -> Array:
        signed = x.words.astype(jnp.int32)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return signed.astype(x.dtype)
        number = signed.astype(jnp.float32)
        if x.is_exact:
            number = number[0] + number[1] * 2.0 ** (-bits - 1)
        return (number * ((EXACT_LIMIT if x.is_exact else limit) * 2.0**-bits)).astype(x.dtype)

    return jax.tree.map(leaf, words, is_leaf=lambda x: isinstance(x, Words))


def error_bound(
    total: Any, num_clients: int, limit: float, bits: int, *, cut: bool = False
) -> np.ndarray:
    """By how much decoded sums of one word may be off, where nothing was clipped.

    Args:
      total: the exact sums, f64[...].
      num_clients: that were added up.
      limit, bits, cut: as in `encode`.
    """
    off = num_clients * limit * 2.0**-bits * (1 if cut else 0.5)
    return off + 2.0**-24 * (np.abs(total) + off)


def _word(x: Array, step: Array | float, cut: bool) -> tuple[Array, Array]:
    """(x in steps, u32 modulo 2^32; what is left of x), of f32 numbers within the limit."""
    step = jnp.asarray(step, jnp.float32)
    code = jnp.trunc(x / step) if cut else jnp.round(x / step)
    return code.astype(jnp.int32).astype(jnp.uint32), x - code * step
