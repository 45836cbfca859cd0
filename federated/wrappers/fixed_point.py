"""Numbers as words modulo 2^32 that can be added up: fixed point.

    w_i = round(x_i / step) mod 2^32;    sum_i x_i ~ step * signed(sum_i w_i mod 2^32)

With n clients at most and numbers of at most `limit`,

    step = the smallest power of two with  limit / step <= L,    L = floor((2^31 - 1) / n)

so that no sum wraps. Scaling by a power of two is exact, and what remains is rounding:

    |sum - exact sum| <= n step / 2 + 2^-24 |sum|

What is `Exact`, and every scalar, takes two words: the second holds what the first one left out, at
a step that is about 2 L times smaller, and numbers up to 2^24 fit. Whole ones, such as counts of
examples, are summed exactly.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.algorithm import Exact, full_width
from jaxfm.model import Array, PyTree

EXACT_LIMIT = 2.0**24  # up to which float32 holds whole numbers
_MOST_CLIENTS = 2**20


class FixedPoint(NamedTuple):
    """Numbers as words modulo 2^32, of which so many can be added up without wrapping.

    Attributes:
      most: L, of the magnitude of one client's word.
      limit: of the magnitude of numbers of one word; larger ones are clipped.
      step: of one word.
      exact_step: of the first of two words.
    """

    most: int
    limit: float
    step: float
    exact_step: float

    @property
    def rest_step(self) -> float:
        """The step of the second of two words."""
        return self.exact_step / 2.0 ** math.floor(math.log2(2 * self.most))


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


def fixed_point(num_clients: int, limit: float) -> FixedPoint:
    """The finest steps at which the words of so many clients can be added up.

    Args:
      num_clients: n.
      limit: of the magnitude of one client's numbers of one word.
    Raises:
      ValueError: n or the limit is out of range.
    """
    if not 1 <= num_clients <= _MOST_CLIENTS:
        raise ValueError(
            f"num_clients={num_clients} must be from 1 to {_MOST_CLIENTS}: a word of 32 bits "
            "holds the sum of all of them."
        )
    if not 2.0**-60 <= limit <= 2.0**60:
        raise ValueError(
            f"limit={limit} must be a number from 2^-60 to 2^60, above what a client uploads."
        )
    most = (2**31 - 1) // num_clients
    return FixedPoint(most, float(limit), _step(limit, most), _step(EXACT_LIMIT, most))


def encode(fixed: FixedPoint, tree: PyTree) -> tuple[PyTree, Array]:
    """The tree with `Words` for leaves, and how many of its entries were clipped, u32[].

    Args:
      tree: leaves float32 or integers; what is `Exact`, or a scalar, takes two words.
    """
    clipped = []

    def leaf(x: Array, is_exact: bool) -> Words:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x if x.dtype.itemsize == 4 else x.astype(jnp.int32)
            clipped.append((jnp.abs(x) > fixed.most).sum(dtype=jnp.uint32))
            whole = jnp.clip(x, -fixed.most, fixed.most).astype(jnp.int32)
            return Words(whole.astype(jnp.uint32), x.dtype, False)
        wide = full_width(x)
        small = wide.astype(jnp.float32)
        limit = EXACT_LIMIT if is_exact else fixed.limit
        clipped.append((jnp.abs(small) > limit).sum(dtype=jnp.uint32))
        if not is_exact:
            return Words(_word(small, fixed.step, limit)[0], wide.dtype, False)
        first, rest = _word(jnp.clip(small, -limit, limit), fixed.exact_step, limit)
        second, _ = _word(rest, fixed.rest_step, fixed.exact_step / 2)
        return Words(jnp.stack([first, second]), wide.dtype, True)

    def part(x: Any) -> Any:
        if isinstance(x, Exact):
            return Exact(jax.tree.map(lambda y: leaf(y, True), x.value))
        return leaf(x, not x.ndim)

    words = jax.tree.map(part, tree, is_leaf=lambda x: isinstance(x, Exact))
    total = sum(clipped, jnp.zeros((), jnp.uint32))
    return words, jnp.minimum(total, jnp.uint32(fixed.most))


def decode(fixed: FixedPoint, tree: PyTree) -> PyTree:
    """The numbers of a tree of `Words`, or of their sums modulo 2^32."""

    def leaf(x: Words) -> Array:
        signed = x.words.astype(jnp.int32)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return signed.astype(x.dtype)
        number = signed.astype(jnp.float32)
        if x.is_exact:
            value = number[0] * fixed.exact_step + number[1] * fixed.rest_step
        else:
            value = number * fixed.step
        return value.astype(x.dtype)

    return jax.tree.map(leaf, tree, is_leaf=lambda x: isinstance(x, Words))


def error_bound(fixed: FixedPoint, num_clients: int, total: Any, is_exact: bool = False) -> Any:
    """By how much a decoded sum may be off, where nothing was clipped: n step / 2 + 2^-24 |sum|.

    Args:
      total: the exact sum, f[...].
      is_exact: of two words: three numbers are rounded to float32, the two and their sum.
    """
    step = fixed.rest_step if is_exact else fixed.step
    rounded = 3 if is_exact else 1
    return num_clients * step / 2 + rounded * 2.0**-24 * (np.abs(total) + num_clients * step)


def _word(x: Array, step: float, limit: float) -> tuple[Array, Array]:
    """(u32 round(x / step), clipped, modulo 2^32; what it leaves of x), of f32 arrays."""
    most = np.float32(math.floor(limit / step))
    if most > math.floor(limit / step):
        most = np.nextafter(most, np.float32(0))
    code = jnp.clip(jnp.round(x / np.float32(step)), -most, most)
    return code.astype(jnp.int32).astype(jnp.uint32), x - code * np.float32(step)


def _step(limit: float, most: int) -> float:
    """The smallest power of two that fits into the limit at most so many times."""
    step = 2.0 ** math.floor(math.log2(limit / most))
    while limit / step > most:
        step *= 2
    return step
