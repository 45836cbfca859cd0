"""Each rule holds its adversaries within the bound it states, on rows computed with by NumPy."""

import functools
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxfm.federated.wrappers import robust_rules as rules

SLOTS, WIDTH = 12, 5
BY_NAME = {
    "median": rules.median,
    "trimmed_mean": rules.trimmed_mean(0.3),
    "norm_bound": rules.norm_bound(),
    "krum": rules.krum(0.3),
    "multi_krum": rules.multi_krum(0.3),
    "geometric_median": rules.geometric_median(64),
}
every_rule = pytest.mark.parametrize("name", BY_NAME)
TRUST = jax.jit(rules.fl_trust)


@functools.cache
def compiled(name: str):
    return jax.jit(BY_NAME[name])


class Case(NamedTuple):
    """Honest and false rows, in random slots among empty ones."""

    rows: np.ndarray
    weights: np.ndarray
    honest: np.ndarray
    share: float  # of the weight that is false


def case(seed: int, present: int, false: int, alike: bool = False, far=(-2, 30)) -> Case:
    """Honest rows around a common centre; false ones of any size, together or apart."""
    rng = np.random.default_rng(seed)
    spread = 0 if alike else 10.0 ** rng.uniform(-2, 1)
    honest = rng.normal(size=WIDTH) + spread * rng.normal(size=(present - false, WIDTH))
    size = 10.0 ** rng.uniform(*far)
    wrong = size * rng.normal(size=(1 if rng.random() < 0.5 else false, WIDTH))
    rows, weights = np.full((SLOTS, WIDTH), 7.0), np.zeros(SLOTS)
    slots = rng.permutation(SLOTS)[:present]
    rows[slots] = np.concatenate([honest, np.broadcast_to(wrong, (false, WIDTH))])
    weights[slots] = rng.integers(1, 5, present)
    is_honest = np.isin(np.arange(SLOTS), slots[: present - false])
    is_false = np.isin(np.arange(SLOTS), slots[present - false :])
    share = weights[is_false].sum() / weights.sum()
    floats = lambda x: x.astype(np.float32)
    return Case(floats(rows), floats(weights), is_honest, float(share))


cases = st.builds(
    lambda seed, present, false: case(seed, present, int(false * present)),
    st.integers(0, 10**6),
    st.integers(3, SLOTS),
    st.sampled_from([0, 0.15, 0.3]),
)


def largest_distance(rows: np.ndarray, to: np.ndarray) -> float:
    return max(np.linalg.norm(rows.astype(np.float64) - to, axis=1))


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
@hypothesis.given(cases)
def test_each_coordinate_lies_among_the_honest(name, case):
    result = compiled(name)(case.rows, case.weights)
    honest = case.rows[case.honest]
    assert (result >= honest.min(0) - 1e-5 * abs(honest).max()).all()
    assert (result <= honest.max(0) + 1e-5 * abs(honest).max()).all()


@pytest.mark.parametrize("name", ["krum", "multi_krum"])
@hypothesis.given(cases)
def test_krum_stays_near_the_honest_mean(name, case):
    m, f = int((case.weights > 0).sum()), int((case.weights > 0).sum() - case.honest.sum())
    hypothesis.assume(2 * f + 2 < m)
    assumed = min(int(0.3 * m), (m - 3) // 2)  # the rule's own f, at least as large
    honest = case.rows[case.honest]
    middle = honest.astype(np.float64).mean(0)
    apart = max(largest_distance(honest, row) for row in honest)
    bound = apart * (1 + np.sqrt((m - assumed - 2) / (m - assumed - f - 2)))
    result = compiled(name)(case.rows, case.weights)
    assert np.linalg.norm(result - middle) <= bound + 1e-4 * (1 + abs(middle).max())


@hypothesis.given(cases)
def test_the_geometric_median_stays_near_the_honest_mean(case):
    hypothesis.assume(case.share < 0.4)
    middle = np.average(case.rows[case.honest], axis=0, weights=case.weights[case.honest])
    factor = 2 * (1 - case.share) / (1 - 2 * case.share)
    bound = factor * largest_distance(case.rows[case.honest], middle)
    result = compiled("geometric_median")(case.rows, case.weights)
    assert np.linalg.norm(result - middle) <= 1.01 * bound + 1e-4


@pytest.mark.parametrize("bound", [None, 0.5])
@hypothesis.given(case=cases)
def test_a_norm_bound_limits_what_adversaries_move(bound, case):
    rule = compiled("norm_bound") if bound is None else bounded
    norms = np.linalg.norm(case.rows.astype(np.float64), axis=1)
    limit = np.median(norms[case.weights > 0]) if bound is None else bound
    scaled = case.rows * np.minimum(1, limit / norms)[:, None]
    clean = np.average(scaled[case.honest], axis=0, weights=case.weights[case.honest])
    result = rule(case.rows, case.weights)
    assert np.linalg.norm(result) <= limit * (1 + 1e-4)
    assert np.linalg.norm(result - clean) <= 2 * case.share * limit + 1e-4 * limit


bounded = jax.jit(rules.norm_bound(0.5))


@hypothesis.given(cases)
def test_trust_never_exceeds_the_root_nor_points_away_from_it(case):
    root = case.rows[case.honest].mean(0)
    result = np.asarray(TRUST(case.rows, case.weights, root), np.float64)
    length = np.linalg.norm(root)
    assert np.linalg.norm(result) <= length * (1 + 1e-4)
    assert result @ root >= -1e-5 * length**2


@every_rule
@hypothesis.given(seed=st.integers(0, 10**6), present=st.integers(1, SLOTS))
def test_equal_rows_give_their_mean(name, seed, present):
    some = case(seed, present, 0, alike=True)
    expected = some.rows[some.honest][0]
    result = compiled(name)(some.rows, some.weights)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    trusted = TRUST(some.rows, some.weights, jnp.asarray(expected))
    np.testing.assert_allclose(trusted, expected, rtol=1e-5, atol=1e-6)


@every_rule
@hypothesis.given(cases)
def test_neither_order_nor_empty_slots_matter(name, case):
    # Of three or four, Krum counts one neighbor, so the nearest two tie, and the first one wins.
    hypothesis.assume("krum" not in name or (case.weights > 0).sum() not in (3, 4))
    rng = np.random.default_rng(0)
    first = compiled(name)(case.rows, case.weights)
    order = rng.permutation(SLOTS)
    empty = (case.weights == 0)[:, None]
    other = np.where(empty, np.float32(-1e30), case.rows)[order]
    second = compiled(name)(other, case.weights[order])
    # Sums in another order differ in the last bits of the largest row that counts.
    np.testing.assert_allclose(first, second, rtol=2e-5, atol=2e-5 * abs(first).max() + 1e-6)


def test_rules_equal_their_definitions():
    some = case(3, 10, 3, far=(1, 2))
    present = some.weights > 0
    rows, weights = some.rows[present].astype(np.float64), some.weights[present]
    trimmed = np.sort(rows, axis=0)[3:7].mean(0)
    squares = np.square(rows[:, None] - rows[None]).sum(-1)
    scores = np.sort(squares, axis=1)[:, 1 : 1 + 10 - 3 - 2].sum(1)
    expected = {
        "median": np.median(rows, axis=0),
        "trimmed_mean": trimmed,
        "krum": rows[scores.argmin()],
        "multi_krum": rows[np.argsort(scores)[:7]].mean(0),
        "geometric_median": weiszfeld(rows, weights),
    }
    for name, value in expected.items():
        result = compiled(name)(some.rows, some.weights)
        np.testing.assert_allclose(result, value, rtol=1e-3, atol=1e-4, err_msg=name)


def weiszfeld(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    middle = np.median(rows, axis=0)
    for _ in range(64):
        pull = weights / np.maximum(np.linalg.norm(rows - middle, axis=1), 1e-6)
        middle = pull @ rows / pull.sum()
    return middle


@pytest.mark.parametrize("name", ["norm_bound", "geometric_median"])
def test_claims_beyond_the_range_of_floats_give_no_nan(name):
    some = case(5, 8, 2)
    weights = np.where(some.weights > 0, np.float32(3e38), 0)
    assert np.isfinite(compiled(name)(some.rows, weights)).all()


@pytest.mark.parametrize("fraction", [-0.1, 0.5, float("nan")])
@pytest.mark.parametrize("rule", [rules.trimmed_mean, rules.krum, rules.multi_krum])
def test_a_fraction_that_nobody_can_hold_is_refused(rule, fraction):
    with pytest.raises(ValueError, match=rf"fraction={fraction} must be a share .* below 0.5"):
        rule(fraction)


def test_other_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"bound=0 must be a number above 0"):
        rules.norm_bound(0)
    with pytest.raises(ValueError, match="iterations=0 must be at least 1"):
        rules.geometric_median(0)
