"""Shamir's secret sharing: any t shares give a secret back, and t - 1 say nothing of it.

    f(x) = s + a_1 x + ... + a_(t-1) x^(t-1)  mod p;    share of point x: f(x);    s = f(0)

with a_j uniform. A secret of 32 bytes is 18 numbers of 15 bits, each with a polynomial of its own
modulo p = 65521, the largest prime below 2^16: a share is 36 bytes, and a product of matrices in
float64, exact here, makes those of all points.
Source: Shamir 1979.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

PRIME = 65521
SECRET_BYTES = 32
SHARE_BYTES = 36
_BITS = 15
_PARTS = SHARE_BYTES // 2

Random = Callable[[int], bytes]  # so many random bytes, such as `os.urandom`


def split(secrets: Sequence[bytes], points: Sequence[int], threshold: int, random: Random):
    """Shares of some secrets of 32 bytes: for each point, a list of 36 bytes for each secret.

    Args:
      secrets: that are shared in the same way.
      points: x of each share, distinct, from 1 to p - 1.
      threshold: t, from 1 to as many as there are points.
      random: of the coefficients.
    Raises:
      ValueError: a threshold or a point out of range.
    """
    if not 1 <= threshold <= len(points):
        raise ValueError(
            f"threshold={threshold} must be at least 1 and at most {len(points)}, the shares that "
            "there are."
        )
    parts = np.concatenate([_parts_of(secret) for secret in secrets])
    shares = evaluate(
        np.concatenate([parts[None], uniform(random, (threshold - 1, parts.size))]), tuple(points)
    )
    return [[row.tobytes() for row in each] for each in shares.reshape(len(points), -1, _PARTS)]


def combine(shares: dict[int, bytes], threshold: int) -> bytes:
    """The secret of 32 bytes, from at least `threshold` of its shares by point.

    Raises:
      ValueError: too few shares, or what cannot be shares of a secret.
    """
    if len(shares) < threshold:
        raise ValueError(f"A secret needs {threshold} of its shares; there are {len(shares)}.")
    points = tuple(sorted(shares)[:threshold])
    if any(len(shares[x]) != SHARE_BYTES for x in points):
        raise ValueError(f"A share has {SHARE_BYTES} bytes; these are damaged.")
    values = np.stack([np.frombuffer(shares[x], "<u2") for x in points]).astype(np.int64)
    parts = interpolate(points, values) if (values < PRIME).all() else np.array([PRIME])
    number = sum(int(part) << (_BITS * i) for i, part in enumerate(parts))
    if (parts >= 2**_BITS).any() or number >> (8 * SECRET_BYTES):
        raise ValueError("These shares are of no common secret: some of them were changed.")
    return number.to_bytes(SECRET_BYTES, "little")


def evaluate(coefficients: np.ndarray, points: tuple[int, ...], prime: int = PRIME) -> np.ndarray:
    """u16[n, s]: polynomials i64[t, s], the constant first, at n points from 1 to prime - 1."""
    powers = _powers(points, len(coefficients), prime)
    # Products are below 2^32, so that sums of up to 2^21 of them are exact.
    values = powers @ np.asarray(coefficients, np.float64)
    return np.fmod(values, prime).astype(np.uint16)


def interpolate(points: tuple[int, ...], values: np.ndarray, prime: int = PRIME) -> np.ndarray:
    """i64[s]: at 0, the polynomials of degree t - 1 with values i64[t, s] at t points."""
    weights = _weights(points, prime)
    return np.fmod(weights @ np.asarray(values, np.float64), prime).astype(np.int64)


def uniform(random: Random, shape: tuple[int, ...], prime: int = PRIME) -> np.ndarray:
    """i64: numbers below the prime, each as likely; larger ones of 16 bits are drawn again."""
    size = int(np.prod(shape))
    drawn = np.zeros(0, np.uint16)
    while drawn.size < size:
        more = np.frombuffer(random(2 * (size - drawn.size) + 64), "<u2")
        drawn = np.concatenate([drawn, more[more < 65536 // prime * prime]])
    return (drawn[:size].astype(np.int64) % prime).reshape(shape)


@functools.lru_cache(maxsize=4)
def _powers(points: tuple[int, ...], count: int, prime: int) -> np.ndarray:
    """f64[n, t]: x^0, x^1, ... modulo the prime; the same for all clients of a complete graph."""
    if not all(0 < x < prime for x in points) or len(set(points)) < len(points):
        raise ValueError(f"Points of shares must be distinct numbers from 1 to {prime - 1}.")
    x, column = np.array(points, np.int64), np.ones(len(points), np.int64)
    powers = np.empty((len(points), count))
    for power in range(count):
        powers[:, power] = column
        column = column * x % prime
    return powers


@functools.lru_cache(maxsize=4)
def _weights(points: tuple[int, ...], prime: int) -> np.ndarray:
    """f64[t]: Lagrange's weights at 0, prod_(j != i) x_j / (x_j - x_i) modulo the prime."""
    x = np.array(points, np.int64)
    above, below = np.ones_like(x), np.ones_like(x)
    for i, other in enumerate(x):
        apart = np.arange(len(x)) != i
        above = np.where(apart, above * other % prime, above)
        below = np.where(apart, below * ((other - x) % prime) % prime, below)
    inverse, power, base = np.ones_like(x), prime - 2, below
    while power:  # Fermat: a^(p - 2) is 1 / a
        inverse = inverse * base % prime if power & 1 else inverse
        base, power = base * base % prime, power >> 1
    return (above * inverse % prime).astype(np.float64)


def _parts_of(secret: bytes) -> np.ndarray:
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"A secret has {SECRET_BYTES} bytes; this one has {len(secret)}.")
    number = int.from_bytes(secret, "little")
    return np.array([number >> (_BITS * i) & (2**_BITS - 1) for i in range(_PARTS)], np.int64)
