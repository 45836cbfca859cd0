"""Gradients that are private by example: clipped one by one, exactly, with the noise stated."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import (
    BATCH_NORM,
    MODEL,
    TASK,
    examples,
    federation,
    loss_gradient,
    make,
    population,
    run_new,
    start,
)

from jaxfm.federated import Local
from jaxfm.federated.accounting.epsilon import Sampling, epsilon_of
from jaxfm.federated.accounting.privacy import example_epsilons
from jaxfm.federated.algorithm import ClientData
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.local import local_fit, objective
from jaxfm.federated.parts.private_gradient import (
    ExamplePrivacy,
    places,
    poisson_batch,
    private_gradient,
)

CLIP, ROWS = 0.3, 12


def batch(**changes):
    return {name: jnp.asarray(x[:ROWS]) for name, x in examples(24).items()} | changes


@functools.cache
def gradient(noise: float = 0.0, chunk: int = 4):
    loss = objective(MODEL, TASK)
    return jax.jit(private_gradient(loss, ExamplePrivacy(CLIP, noise, chunk), 10))


def by_hand(rows, real) -> dict:
    """The sum of each row's gradient, clipped, over 10, in NumPy."""
    params = jax.tree.map(np.asarray, start().params)
    total = jax.tree.map(np.zeros_like, params)
    for i in np.flatnonzero(real):
        one = loss_gradient(params, {name: np.asarray(x)[i : i + 1] for name, x in rows.items()})
        norm = math.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(one)))
        total = jax.tree.map(lambda s, x, n=norm: s + x * min(1, CLIP / n), total, one)
    return jax.tree.map(lambda x: x / 10, total)


@pytest.mark.parametrize("chunk", [1, 4, 12])
def test_each_example_is_clipped_by_itself(chunk):
    real = (jnp.arange(ROWS) < 9).astype(jnp.float32)
    (_, (_, total, count)), grads = gradient(chunk=chunk)(
        start().params, start(), batch(), real, jax.random.key(0)
    )
    chex.assert_trees_all_close(grads, by_hand(batch(), real), atol=1e-6)
    assert count == 9 and total > 0


@pytest.mark.parametrize("own", [1e3, -1e3, np.nan, np.inf], ids=str)
def test_an_example_moves_the_sum_by_the_norm_at_most(own):
    rows, key = batch(), jax.random.key(0)
    wild = batch(x=rows["x"].at[0].set(own))
    there = jnp.arange(ROWS) < 8
    made = lambda rows, there: gradient()(
        start().params, start(), rows, there.astype(jnp.float32), key
    )[1]
    with_it, without = made(wild, there), made(rows, there & (jnp.arange(ROWS) > 0))
    change = jax.tree.map(lambda a, b: 10 * np.subtract(a, b, dtype=float), with_it, without)
    norm = math.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(change)))
    assert norm <= CLIP * (1 + 1e-5) and (math.isfinite(own) or norm == 0)


def test_its_noise_is_as_large_as_stated():
    nobody = jnp.zeros(ROWS)
    draw = jax.jit(
        jax.vmap(lambda key: gradient(noise=1.5)(start().params, start(), batch(), nobody, key)[1])
    )
    drawn = draw(jax.random.split(jax.random.key(2), 300))
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(drawn)])
    assert abs(np.std(values) / (1.5 * CLIP / 10) - 1) < 0.02


def test_batches_hold_each_row_by_itself():
    data = ClientData({}, jnp.arange(100, 140, dtype=jnp.int32), jnp.int32(30))
    size = places(6, 40, 4)
    rows, real = jax.jit(jax.vmap(lambda key: poisson_batch(data, 6, size, key)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    rows, real = np.asarray(rows), np.asarray(real) > 0
    often = np.array([(rows[real] == row).sum() for row in range(100, 140)]) / 4000
    np.testing.assert_allclose(often[:30], 0.2, atol=4 * math.sqrt(0.16 / 4000))
    assert often[30:].sum() == 0 and abs(real.sum(1).var() - 30 * 0.16) < 0.5
    few = data._replace(count=jnp.int32(3))
    rows, real = poisson_batch(few, 6, size, jax.random.key(0))
    assert set(np.asarray(rows)[:3]) == {100, 101, 102} and real.sum() == 3


def test_places_are_enough_and_whole_chunks():
    from scipy.stats import binom

    assert places(6, 10_000, 4) % 4 == 0 and places(6, 8, 8) == 8
    for n in (40, 200, 10_000):
        assert binom.sf(places(6, n, 1), n, 6 / n) <= 1e-16


def test_without_noise_or_clipping_and_all_rows_a_step_is_that_of_gradient_descent():
    private = ExamplePrivacy(1e6, 0.0, 2)
    local = Local(optax.sgd(0.1), 6, 1, private)
    fit = local_fit(objective(MODEL, TASK), local)
    data = {name: jnp.asarray(x) for name, x in examples(24).items()}
    client = ClientData(data, jnp.arange(6, dtype=jnp.int32), jnp.int32(6))
    trained, info = jax.jit(fit)(start(), client, jnp.int32(9), jax.random.key(0))
    grads = loss_gradient(
        jax.tree.map(np.asarray, start().params), {k: np.asarray(x)[:6] for k, x in data.items()}
    )
    step = jax.tree.map(lambda x, g: np.asarray(x) - 0.1 * g, start().params, grads)
    chex.assert_trees_all_close(trained.params, step, atol=1e-6)
    assert info.spent.steps == 1 and info.loss_count == 6


@pytest.mark.parametrize("name", ["fed_prox", "scaffold"])
def test_algorithms_train_with_private_gradients(name, monkeypatch):
    local = Local(optax.sgd(0.1), 4, 2, ExamplePrivacy(1.0, 0.5, 4))
    monkeypatch.setattr("laws.Local", lambda *args: local)
    state, info = run_new(make(name), population("fed_avg", federation()))
    assert info.counted.sum() == 6
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.server.variables))


def test_what_examples_have_spent_is_that_of_their_own_client():
    counts, steps = np.array([100, 10, 4, 0]), np.array([50, 50, 50, 0])
    spent = example_epsilons(counts, steps, batch_size=5, noise_multiplier=2.0, delta=1e-5)
    for i, (n, b) in enumerate([(100, 5), (10, 5), (4, 4)]):
        one = epsilon_of(2.0, 50, 1e-5, Sampling(n, b, "poisson"), accountant="rdp")
        assert spent[i] == one
    assert spent[0] < spent[1] < spent[2] and spent[3] == 0


def test_what_cannot_be_private_is_refused():
    local = Local(optax.sgd(0.1), 4, 1, ExamplePrivacy(1.0, 1.0))
    algorithm = fed_avg(BATCH_NORM, TASK, local)
    variables = BATCH_NORM.init(jax.random.key(0))
    with pytest.raises(ValueError, match="batch norm mix the examples of a batch"):
        run_new(algorithm, population("fed_avg", federation()), variables=variables)
    for private, message in (
        (ExamplePrivacy(0.0, 1.0), "clip=0.0 must be a norm above 0"),
        (ExamplePrivacy(1.0, -1.0), "noise_multiplier=-1.0 must be a number from 0"),
        (ExamplePrivacy(1.0, 1.0, 0), "chunk=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fed_avg(MODEL, TASK, local._replace(private=private))
