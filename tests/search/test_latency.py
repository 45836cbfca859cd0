"""The laws of latency as a budget, on timings that are made up: what is fitted comes back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfm.search import counts_of, fit_latency, full, latency, network, projection
from jaxfm.search.strategies.project import within

# A fixed cost, multiply-adds and values moved: of convolutions, grouped ones, matrix products.
SECONDS = np.array([1e-4, 2e-5, 5e-5, 2e-9, 8e-9, 1e-9, 3e-9, 5e-9, 4e-9])


def depthwise(params, x):
    """A convolution, a depthwise one and a matrix product."""
    for weight, groups in ((params["full"], 1), (params["each"], params["each"].shape[-1])):
        x = jax.lax.conv_general_dilated(
            x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip
        x = jax.nn.relu(x)
    return jax.nn.relu(x.mean((1, 2)) @ params["hidden"]) @ params["head"]


@functools.cache
def small():
    shapes = {"full": (3, 3, 3, 16), "each": (3, 3, 1, 16), "hidden": (16, 24), "head": (24, 5)}
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    return network(depthwise, params, np.zeros((2, 6, 6, 3), np.float32)), params


def fitted(monkeypatch, coefficients, **options):
    net, params = small()
    table = latency.features(net)

    def measure(network, params, kept, inputs, repeats):
        return float(table(counts_of(network, kept)) @ coefficients)

    monkeypatch.setattr(latency, "measure", measure)
    return net, table, fit_latency(net, params, *net.example, **options)


def test_the_table_gives_back_the_timings_that_it_was_fitted_to(monkeypatch):
    net, table, found = fitted(monkeypatch, SECONDS)
    assert found.error < 1e-6 and (found.coefficients >= 0).all()
    rng = np.random.default_rng(1)
    for counts in (net.sizes, *(rng.integers(1, net.sizes + 1) for _ in range(5))):
        counts = counts.astype(np.int64)
        expected = table(counts) @ SECONDS
        np.testing.assert_allclose(found.seconds(counts), expected, rtol=1e-6)
        traced = found.seconds(jnp.asarray(counts, jnp.float32))
        np.testing.assert_allclose(traced, expected, rtol=1e-5)
    assert found.dense_s == pytest.approx(table(net.sizes.astype(np.int64)) @ SECONDS)


def test_timings_that_fall_with_width_do_not_make_a_budget_that_fails(monkeypatch):
    """Coefficients stay at least 0, whatever was measured, and the error owns up to it."""
    _, _, found = fitted(monkeypatch, SECONDS * [20, 20, 20, -20, 1, 1, 1, 1, 1])
    assert (found.coefficients >= 0).all() and found.error > 0.01


@functools.cache
def table_of_small():
    with pytest.MonkeyPatch.context() as patch:
        net, _, found = fitted(patch, SECONDS)
    budget = found.budget(0.75)
    return net, found, budget, jax.jit(projection(net.sizes, (budget,)))


@given(st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=2))
def test_every_candidate_is_within_a_budget_of_seconds(logits):
    net, found, budget, project = table_of_small()
    counts = np.asarray(project(np.array(logits, np.float32)))
    assert within((budget,), jnp.asarray(counts, jnp.float32))
    assert found.seconds(counts.astype(np.int64)) <= 0.75 * found.dense_s * (1 + 1e-5)
    for group in np.flatnonzero(counts < net.sizes):  # and as slow as it may be
        more = counts.astype(np.float32)
        more[group] += 1
        assert not within((budget,), jnp.asarray(more))


def test_a_limit_is_a_share():
    _, found, _, _ = table_of_small()
    assert found.budget(0.5).limit == pytest.approx(0.5 * found.dense_s)
    with pytest.raises(ValueError, match=r"share=1\.5"):
        found.budget(1.5)


def test_what_cannot_be_fitted_or_met_is_refused():
    net, params = small()
    for options in ({"samples": 4}, {"samples": 8, "held_out": 0.0}):
        with pytest.raises(ValueError, match=f"samples={options['samples']}"):
            fit_latency(net, params, *net.example, **options)
    _, found, _, _ = table_of_small()
    with pytest.raises(ValueError, match="latency cannot be met"):
        projection(net.sizes, (found.budget(0.01),))


def test_a_measurement_is_the_median_of_calls_after_the_first(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    calls = []
    assert latency.seconds(lambda: calls.append(1), repeats=3) == 2.0
    assert len(calls) == 4


def test_the_compiled_slice_is_what_is_timed():
    net, params = small()
    images = np.zeros(net.example[0].shape, np.float32)
    assert 0 < latency.measure(net, params, full(net), [images], repeats=1) < 10
