"""Rules that aggregate clients of which some lie: one pure function each.

    rule(rows f32[n, d], weights f32[n]) -> f32[d]

A row is what one client says, finite; weight 0 marks an absent one, and one weight is positive.
Of m present clients f are adversaries: any rows, chosen with knowledge of all others. Each rule
says how many it holds and what its result then is. All take a number of present clients that is an
array, so that no cohort compiles anew. A mean over the same rows can be moved anywhere by one.

Weights are what clients report (their examples). The median, the trimmed mean and Krum ignore them,
as their papers do: clients count alike. The geometric median and the norm bound use them, so f is
then a share of the weight, and a client that claims many examples counts for as many.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from jaxfm.model import Array

Rule = Callable[..., Array]


def median(rows: Array, weights: Array) -> Array:
    """The median of each coordinate; of an even number the mean of the middle two.

    Holds f < m / 2: each coordinate lies between the smallest and largest honest one.
    Source: Yin et al. 2018 (Byzantine-robust distributed learning), definition 1.
    """
    ordered, count = _ordered(rows, weights)
    return ordered[(count - 1) // 2] / 2 + ordered[count // 2] / 2


def trimmed_mean(fraction: float) -> Rule:
    """The mean of each coordinate without its floor(fraction * m) smallest and largest values.

    Holds f <= floor(fraction * m): each coordinate lies between the smallest and largest honest
    one.
    Source: Yin et al. 2018, definition 2.

    Args:
      fraction: of the clients, from 0 (the mean of clients that count alike) and below 1/2.
    Raises:
      ValueError: fraction out of range.
    """
    check_fraction(fraction)

    def rule(rows: Array, weights: Array) -> Array:
        ordered, count = _ordered(rows, weights)
        cut = jnp.minimum(_number(fraction, count), (count - 1) // 2)
        place = jnp.arange(rows.shape[0])[:, None]
        kept = (place >= cut) & (place < count - cut)
        return jnp.where(kept, ordered, 0).sum(0) / (count - 2 * cut).astype(jnp.float32)

    return rule


def norm_bound(bound: float | None = None) -> Rule:
    """The weighted mean of rows scaled down to a norm of at most `bound`.

        sum_i w_i x_i min(1, B / |x_i|) / sum_i w_i

    Adversaries of a share a of the weight move the result by at most 2 a B: it weakens an attack of
    any kind, and leaves the mean as it is where nobody exceeds B.
    Source: Sun et al. 2019 (Can you really backdoor federated learning?), section 4.

    Args:
      bound: B, of the movement of all parameters together; None: the median of the rows' norms,
        which then also scales down the longer half of honest rows.
    Raises:
      ValueError: bound is not a number above 0.
    """
    if bound is not None and not 0 < bound < float("inf"):
        raise ValueError(f"bound={bound} must be a number above 0, or None for the median norm.")

    def rule(rows: Array, weights: Array) -> Array:
        norms = _norms(rows)
        limit = median(norms[:, None], weights)[0] if bound is None else jnp.float32(bound)
        scale = jnp.where(norms > limit, limit / jnp.where(norms > limit, norms, 1), 1)
        share = _share(weights)
        return _weighted(share * scale, rows) / share.sum()

    return rule


def krum(fraction: float) -> Rule:
    """The row that is closest to its m - f - 2 nearest others, f = floor(fraction * m).

        argmin_i  sum of the m - f - 2 smallest |x_i - x_j|^2

    Holds f where 2 f + 2 < m: with D the largest distance of honest rows, the result is within
    D (1 + sqrt((m - f - 2) / (m - 2 f - 2))) of their mean. Of fewer clients a smaller f is taken.
    It costs m^2 d operations. One client's row is all that a round learns: where clients' data
    differ, `multi_krum` learns more.
    Source: Blanchard et al. 2017 (Machine learning with adversaries), section 4.

    Args:
      fraction: of the clients, from 0 and below 1/2.
    Raises:
      ValueError: fraction out of range.
    """
    check_fraction(fraction)

    def rule(rows: Array, weights: Array) -> Array:
        scores, _ = _krum_scores(rows, weights, fraction)
        return rows[jnp.argmin(scores)]

    return rule


def multi_krum(fraction: float) -> Rule:
    """The mean of the m - f rows that Krum's score prefers; holds what `krum` holds.

    Source: Blanchard et al. 2017, section 4.1, with as many rows as there are honest clients.

    Args:
      fraction: of the clients, from 0 and below 1/2.
    Raises:
      ValueError: fraction out of range.
    """
    check_fraction(fraction)

    def rule(rows: Array, weights: Array) -> Array:
        scores, keep = _krum_scores(rows, weights, fraction)
        chosen = jnp.argsort(jnp.argsort(scores)) < keep
        return _weighted(chosen.astype(jnp.float32), rows) / keep.astype(jnp.float32)

    return rule


def geometric_median(iterations: int = 16, smoothing: float = 1e-6) -> Rule:
    """The point whose weighted sum of distances to the rows is least, by smoothed Weiszfeld steps.

        v <- sum_i b_i x_i / sum_i b_i,   b_i = w_i / max(smoothing, |v - x_i|)

    Holds a share a < 1/2 of the weight: for any point z, such as the honest mean, the exact one is
    within 2 (1 - a) / (1 - 2 a) of the largest distance of an honest row to z. It starts at the
    median of each coordinate, which lies among the honest rows, and not far away at their mean. A
    row so long that its norm overflows counts for nothing.
    Source: Pillutla et al. 2022 (Robust aggregation for federated learning), algorithm 2.

    Args:
      iterations: Weiszfeld steps, each of which reads all rows.
      smoothing: the least distance that a row counts with.
    Raises:
      ValueError: iterations below 1; smoothing not above 0.
    """
    if iterations < 1 or not 0 < smoothing < float("inf"):
        raise ValueError(
            f"iterations={iterations} must be at least 1 and smoothing={smoothing} above 0."
        )

    def rule(rows: Array, weights: Array) -> Array:
        share = _share(weights)

        def step(_, middle: Array) -> Array:
            pull = share / jnp.maximum(smoothing, _norms(rows - middle[None]))
            return _weighted(pull, rows) / pull.sum()

        return lax.fori_loop(0, iterations, step, median(rows, weights))

    return rule


def fl_trust(rows: Array, weights: Array, root: Array) -> Array:
    """Rows by how far they agree with a row of the server's own, all brought to its length.

        t_i = max(0, cos(x_i, r));   sum_i t_i |r| x_i / |x_i|  /  sum_i t_i

    Holds any number of adversaries in that the result is never longer than r and never points away
    from it; zero where nobody agrees.
    Source: Cao et al. 2021 (FLTrust), algorithm 2.

    Args:
      rows, weights: as of every rule; weights only say who is present.
      root: r f32[d], what the server's own data say.
    """
    norms, length = _norms(rows), _norms(root[None])[0]
    sound = (norms > 0) & jnp.isfinite(norms)
    unit = rows / jnp.where(sound, norms, jnp.inf)[:, None]
    cosine = (unit * (root / jnp.where(length > 0, length, 1))[None]).sum(1)
    trust = jnp.where((weights > 0) & sound, jnp.maximum(cosine, 0), 0)
    total = trust.sum()
    return _weighted(trust, unit) * length / jnp.where(total > 0, total, 1)


def check_fraction(fraction: float, prefix: str = "") -> None:
    """Raises ValueError for a fraction of adversaries that no rule can hold."""
    if not 0 <= fraction < 0.5:
        raise ValueError(
            f"{prefix}fraction={fraction} must be a share of the clients from 0 and below 0.5: "
            "against a majority no rule can tell who is honest."
        )


def _ordered(rows: Array, weights: Array) -> tuple[Array, Array]:
    """Each column sorted, absent clients last, and i32[], how many are present."""
    present = weights > 0
    values = jnp.where(present[:, None], rows, jnp.inf)
    return jnp.sort(values, axis=0), present.sum(dtype=jnp.int32)


def _number(fraction: float, count: Array) -> Array:
    """i32[]: floor(fraction * count), where 0.3 of 10 is 3 in spite of rounding."""
    return jnp.floor(fraction * count.astype(jnp.float32) + 1e-3).astype(jnp.int32)


def _krum_scores(rows: Array, weights: Array, fraction: float) -> tuple[Array, Array]:
    """Krum's scores f32[n], infinite for absent clients, and i32[], m - f."""
    present = weights > 0
    count = present.sum(dtype=jnp.int32)
    f = jnp.clip(_number(fraction, count), 0, jnp.maximum((count - 3) // 2, 0))
    # By differences and not by a product of rows: near rows would cancel to nothing.
    squares = lax.map(lambda row: jnp.square(rows - row[None]).sum(1), rows)
    others = present[None] & ~jnp.eye(rows.shape[0], dtype=bool)
    nearest = jnp.sort(jnp.where(others, squares, jnp.inf), axis=1)
    near = jnp.arange(rows.shape[0]) < jnp.maximum(count - f - 2, 1)
    scores = jnp.where(near[None], nearest, 0).sum(1)
    # Somebody who is present is chosen even where all distances overflow.
    largest = jnp.finfo(jnp.float32).max
    return jnp.where(present, jnp.minimum(scores, largest), jnp.inf), count - f


def _norms(rows: Array) -> Array:
    return jnp.sqrt(jnp.square(rows).sum(1))


def _share(weights: Array) -> Array:
    """Weights relative to the largest; claims near the largest float would overflow a sum."""
    claims = jnp.minimum(weights, 1e30)
    return claims / claims.max()


def _weighted(weights: Array, rows: Array) -> Array:
    """f32[d]: the sum of weights * rows; a product, which reads rows faster than a masked sum."""
    return jnp.matmul(weights, rows, precision="highest")
