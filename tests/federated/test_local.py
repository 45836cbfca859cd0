"""A client's own training: how rows are shuffled, what they weigh, what 16 bits would lose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import MODEL, TASK, examples, federation, loss_gradient, start

from jaxfm.data.federation import client_weights
from jaxfm.federated.algorithm import ClientData, Exact, Mean, mean, weighted
from jaxfm.federated.averaging import moved
from jaxfm.federated.local import UNLIMITED_STEPS, Local, _shuffled, examples_of, local_fit
from jaxfm.federated.local import objective as loss_of
from jaxfm.model import Variables
from jaxfm.tasks import classification

LR = 0.1


def client(count: int, rows: int = 6, **leaves) -> ClientData:
    return ClientData(examples(rows) | leaves, jnp.arange(rows), jnp.int32(count))


def trained(data: ClientData, variables=None, epochs: int = 1):
    fit = jax.jit(local_fit(loss_of(MODEL, TASK), Local(optax.sgd(LR), 6, epochs)))
    variables = start() if variables is None else variables
    return fit(variables, data, UNLIMITED_STEPS, jax.random.key(0))


@pytest.mark.parametrize("batched", [False, True])
def test_an_order_is_that_of_the_whole_table_sorted(batched):
    """As many rows are sorted as a client needs; the order is what it always was."""
    rows, key = 5000, jax.random.key(1)
    draws = np.asarray(jax.random.bits(key, (rows,)))
    counts = np.array([0, 1, 255, 256, 257, 2047, 2049, 4999, 5000])
    order = lambda count: _shuffled(key, ClientData({}, jnp.zeros(rows, jnp.int32), count))
    run = jax.jit(jax.vmap(order) if batched else order)
    orders = run(counts) if batched else map(run, counts)
    for count, found in zip(counts, orders, strict=True):
        expected = np.argsort(draws[:count], kind="stable")
        np.testing.assert_array_equal(np.asarray(found)[:count], expected)


def test_rows_weigh_in_training_as_in_evaluation():
    """Two clients' steps, averaged, are one step on the weighted mean over all their rows."""
    weight = np.array([2, 0.5, 0, 1, 3, 0.25], np.float32)
    data = federation((4, 2))._replace(examples=examples(6) | {"weight": weight})
    np.testing.assert_allclose(client_weights(data), [3.5, 3.25])
    parts = []
    for client, count in enumerate(data.count):
        own = ClientData(data.examples, data.index.padded(client), jnp.asarray(count))
        after, info = trained(own)
        move = jax.tree.map(jnp.subtract, after.params, start().params)
        parts.append(weighted(info.examples, move))
    total = jax.tree.map(lambda *x: sum(x), *parts)
    before, all_rows = jax.tree.map(np.asarray, start().params), examples(6)
    gradients = [loss_gradient(before, {k: v[[i]] for k, v in all_rows.items()}) for i in range(6)]
    expected = jax.tree.map(
        lambda *g: -LR * sum(w * x for w, x in zip(weight, g)) / weight.sum(), *gradients
    )
    for found, right in zip(jax.tree.leaves(mean(total)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 130, 300])
def test_a_client_counts_by_its_own_weights(count):
    weight = np.random.default_rng(0).uniform(size=300).astype(np.float32)
    rows = np.random.default_rng(1).permutation(300)
    found = examples_of(ClientData({"weight": jnp.asarray(weight)}, jnp.asarray(rows), count))
    np.testing.assert_allclose(found, weight[rows[:count]].sum(), rtol=1e-5)


def test_small_steps_are_not_rounded_away():
    """Each of these steps is below half of what bfloat16 tells apart; together they are not."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), start())
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)

    def after_60_steps(variables, dtype):
        task = classification(3, inputs="x", transform=lambda x, key: x.astype(dtype))
        fit = local_fit(loss_of(MODEL, task), Local(optax.sgd(3e-4), 6, 60))
        return jax.jit(fit)(variables, client(6), UNLIMITED_STEPS, jax.random.key(0))[0]

    after, right = after_60_steps(half, jnp.bfloat16), after_60_steps(wide, jnp.float32)
    for name in ("dense1", "dense2"):
        kernels = [v.params[name]["kernel"] for v in (half, after, right)]
        before, found, exact = (np.asarray(x, np.float64) for x in kernels)
        assert kernels[1].dtype == jnp.bfloat16
        gap = np.abs(found - exact).max()
        assert gap <= np.abs(exact).max() / 128 < np.abs(exact - before).max() * 8
        assert np.corrcoef((found - before).ravel(), (exact - before).ravel())[0, 1] > 0.7


def test_a_large_client_of_float16_does_not_overflow():
    move = {"x": jnp.full(3, 2, jnp.float16)}
    one = weighted(jnp.float32(200_000), move)
    np.testing.assert_array_equal(mean(one)["x"], [2, 2, 2])
    start = Variables({"x": jnp.zeros(3, jnp.float16)}, {}, {})
    after = moved(start, (mean(one), {})).params["x"]
    assert after.dtype == jnp.float16 and after.tolist() == [2, 2, 2]


def test_counts_are_averaged_to_the_nearest_whole_number():
    """Of one client that counted 2 and weighs 0.4, and one that counted 3 and weighs 0.7."""
    parts = [weighted(jnp.float32(w), {"n": jnp.int32(n)}) for w, n in ((0.4, 2), (0.7, 3))]
    total = jax.tree.map(jnp.add, *parts)
    variables = Variables({}, {"n": jnp.int32(5)}, {})
    after = moved(variables, ({}, mean(Mean(total.num, Exact(total.den.value))))).stats["n"]
    assert after.dtype == jnp.int32 and after == 5 + round((0.4 * 2 + 0.7 * 3) / 1.1)


@pytest.mark.parametrize("count", [0, 5, 6])
def test_a_step_in_pieces_is_the_same_step(count):
    """Pieces hold unequal weights; with 5 rows, one of them is short."""
    weight = np.array([2, 0.5, 0, 1, 3, 0.25], np.float32)
    data = client(count, weight=weight)
    whole, info = trained(data)
    fit = jax.jit(local_fit(loss_of(MODEL, TASK), Local(optax.sgd(LR), 6, microbatch=2)))
    pieces, same = fit(start(), data, UNLIMITED_STEPS, jax.random.key(0))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (pieces, same), (whole, info))


def test_pieces_are_equal_parts_of_a_batch():
    with pytest.raises(ValueError, match="microbatch=4 must divide batch_size=6"):
        local_fit(loss_of(MODEL, TASK), Local(optax.sgd(LR), 6, microbatch=4))
