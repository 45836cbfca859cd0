"""Shamir's shares: t of them give the secret back, and fewer say nothing of it."""

import itertools
from collections import Counter

import numpy as np
import pytest

from jaxfm.federated.secure.shamir import (
    PRIME,
    SHARE_BYTES,
    combine,
    evaluate,
    interpolate,
    split,
    uniform,
)

RANDOM = np.random.default_rng(0).bytes


@pytest.mark.parametrize(("count", "threshold"), [(1, 1), (5, 2), (9, 9), (200, 120)])
def test_any_shares_above_the_threshold_give_the_secrets_back(count, threshold):
    secrets = [RANDOM(32), bytes(32), b"\xff" * 32]
    points = np.random.default_rng(1).choice(np.arange(1, PRIME), count, replace=False).tolist()
    shares = split(secrets, points, threshold, RANDOM)
    assert all(len(part) == SHARE_BYTES for row in shares for part in row)
    for seed in range(5):
        chosen = np.random.default_rng(seed).permutation(count)[: max(threshold, count - seed)]
        for k, secret in enumerate(secrets):
            assert combine({points[i]: shares[i][k] for i in chosen}, threshold) == secret


@pytest.mark.parametrize("threshold", [2, 3])
def test_fewer_shares_are_consistent_with_every_secret_alike(threshold):
    """In a small field, for all polynomials there are: t - 1 shares leave each secret as likely."""
    prime, points = 5, (1, 2, 3, 4)
    polynomials = np.array(list(itertools.product(range(prime), repeat=threshold))).T
    shares = evaluate(polynomials, points, prime)
    for seen in itertools.combinations(range(len(points)), threshold - 1):
        views = Counter(
            (*shares[list(seen), i].tolist(), int(polynomials[0, i]))
            for i in range(polynomials.shape[1])
        )
        assert len(views) == prime**threshold  # every view with every secret
        assert set(views.values()) == {1}  # equally often


def test_shares_are_the_values_of_a_polynomial():
    """Against Python's own integers."""
    coefficients = uniform(RANDOM, (6, 3))
    points = (1, 7, 65520, 300, 12345, 2)
    value = lambda column, x: sum(int(a) * x**power for power, a in enumerate(column)) % PRIME
    expected = [[value(column, x) for column in coefficients.T] for x in points]
    got = evaluate(coefficients, points)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(interpolate(points, got), coefficients[0])


def test_drawn_numbers_are_uniform():
    """None is preferred where 16 bits are cut to the field: chi-square over a small prime."""
    prime, size = 5, 50_000
    counts = np.bincount(uniform(RANDOM, (size,), prime), minlength=prime)
    statistic = ((counts - size / prime) ** 2 / (size / prime)).sum()
    assert len(counts) == prime and statistic < 23.5  # 4 degrees of freedom: 1 in 10,000
    assert uniform(lambda n: b"\xff" * n if n > 100 else bytes(n), (3, 1)).max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shares: dict(list(shares.items())[:2]), "needs 3 of its shares; there are 2"),
        (lambda shares: shares | {1: bytes(35)}, "has 36 bytes; these are damaged"),
        (lambda shares: shares | {1: b"\xff" * 36}, "no common secret: some of them were changed"),
    ],
)
def test_what_are_no_shares_is_refused(change, message):
    shares = {i + 1: row[0] for i, row in enumerate(split([RANDOM(32)], [1, 2, 3, 4], 3, RANDOM))}
    with pytest.raises(ValueError, match=message):
        combine(change(shares), 3)


@pytest.mark.parametrize(
    ("secret", "points", "threshold", "message"),
    [
        (bytes(32), [1, 2], 3, "threshold=3 must be at least 1 and at most 2"),
        (bytes(32), [1, 2], 0, "threshold=0 must be at least 1"),
        (bytes(32), [0, 2], 2, "distinct numbers from 1 to 65520"),
        (bytes(32), [2, 2], 2, "distinct numbers from 1 to 65520"),
        (bytes(31), [1, 2], 2, "has 32 bytes; this one has 31"),
    ],
)
def test_settings_out_of_range_are_refused(secret, points, threshold, message):
    with pytest.raises(ValueError, match=message):
        split([secret], points, threshold, RANDOM)
