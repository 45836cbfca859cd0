"""Factors of low-rank matrices: products, norms and best approximations without the product.

    P Q = sum_i p_i A_i B_i,   P = [p_1 A_1, p_2 A_2, ...],   Q = [B_1; B_2; ...]

Of P = U R and Q = S^T V^T (both by QR), the small R S^T has the norm and the singular values of
P Q. Where P has as many columns as the product has rows or columns, the product is no larger and is
taken itself.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxfm.model import Array


class Pair(NamedTuple):
    """A product of two factors at one place.

    Attributes:
      a: f32[in, rank].
      b: f32[rank, out].
    """

    a: Array
    b: Array


class Stack(NamedTuple):
    """The factors of all clients of a round at one place, those of lower rank filled with zeros.

    Attributes:
      a: f32[n, in, rank].
      b: f32[n, rank, out].
      share: f32[n], p_i, of the examples of all; 0 of an absent client.
      held: f32[n, rank], 1 where the client's own factors have that column.
    """

    a: Array
    b: Array
    share: Array
    held: Array

    def share_of_held(self, share: Array) -> Array:
        """f32[n, rank]: shares f32[n] of each column among the clients that have it."""
        own = share[:, None] * self.held
        total = own.sum(0)[None]
        return own / jnp.where(total > 0, total, 1)

    def mean(self, weight: Array) -> Pair:
        """Sums of weight * factors, A and B apart; weight f32[n, rank] or [n, 1]."""
        return Pair((self.a * weight[:, None]).sum(0), (self.b * weight[..., None]).sum(0))

    def product(self, weight: Array) -> Pair:
        """The sum of the products weight A_i B_i in factors; weight f32[n, rank] or [n, 1]."""
        a = self.a * weight[:, None]
        return Pair(
            a.transpose(1, 0, 2).reshape(a.shape[1], -1), self.b.reshape(-1, self.b.shape[-1])
        )


def plus(*pairs: Pair) -> Pair:
    """The sum of products in factors."""
    return Pair(
        jnp.concatenate([pair.a for pair in pairs], 1),
        jnp.concatenate([pair.b for pair in pairs], 0),
    )


def minus(pair: Pair) -> Pair:
    """The product with the other sign."""
    return Pair(-pair.a, pair.b)


def length(pair: Pair) -> Array:
    """f32[]: the Frobenius norm of a product."""
    if _is_wide(pair):
        return jnp.linalg.norm(pair.a @ pair.b)
    return jnp.linalg.norm(jnp.linalg.qr(pair.a, mode="r") @ jnp.linalg.qr(pair.b.T, mode="r").T)


def closest(pair: Pair, rank: int, size: Array | float = 1.0) -> Pair:
    """The product of a lower rank that is closest to this one (Eckart and Young 1936).

    Singular values come in descending order, so that the first k columns of A and rows of B are the
    closest product of rank k. Columns of A are orthogonal and of length `size`, those of singular
    value zero included, so that B has a gradient there; their largest entries are positive.
    """
    if _is_wide(pair):
        u, s, v = jnp.linalg.svd(pair.a @ pair.b, full_matrices=False)
    else:
        (left, r), (right, t) = (jnp.linalg.qr(x) for x in (pair.a, pair.b.T))
        u, s, v = jnp.linalg.svd(r @ t.T, full_matrices=False)
        u, v = left @ u, v @ right.T
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    largest = jnp.take_along_axis(u, jnp.abs(u).argmax(0)[None], 0)[0]
    sign = jnp.where(largest < 0, -1, 1).astype(u.dtype)
    return Pair(u * (size * sign)[None], v * (s * sign / size)[:, None])


def _is_wide(pair: Pair) -> bool:
    return pair.a.shape[1] >= min(pair.a.shape[0], pair.b.shape[1])
