"""HeteroFL: each coordinate is averaged over those who cover it; what slices and scalers do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import (
    LOCAL,
    LR,
    MODEL,
    TASK,
    TIERS,
    assert_is_fed_avg,
    federation,
    loss_gradient,
    make,
    population,
    run_new,
    start,
)

from jaxfm.federated.algorithm import client_variables
from jaxfm.federated.algorithms.hetero_fl import hetero_fl
from jaxfm.subnet import Subnet


def test_one_full_tier_is_fed_avg():
    assert_is_fed_avg(hetero_fl(MODEL, TASK, LOCAL, [TIERS[0]]), 1e-7)


def test_each_coordinate_is_averaged_over_those_who_cover_it():
    people = population("hetero_fl", federation())
    state, _ = run_new(make("hetero_fl", batch_size=6, epochs=1), people)
    full = jax.tree.map(np.asarray, start().params)
    num = jax.tree.map(np.zeros_like, full)
    den = jax.tree.map(np.zeros_like, full)
    data = people.federation
    for client, (count, bucket) in enumerate(zip(data.count, people.bucket)):
        h = (8, 4, 2)[bucket]
        window = lambda tree, h=h: [
            tree["dense1"]["kernel"][:, :h], tree["dense1"]["bias"][:h],
            tree["dense2"]["kernel"][:h], tree["dense2"]["bias"][:],
        ]  # fmt: skip
        k1, b1, k2, b2 = window(full)
        own = {"dense1": {"kernel": k1, "bias": b1}, "dense2": {"kernel": k2, "bias": b2}}
        rows = {n: x[data.rows_of(client)] for n, x in data.examples.items()}
        gradient = loss_gradient(own, rows)
        for total, weight, g in zip(window(num), window(den), window(gradient)):
            total += count * -LR * g
            weight += count
    expected = jax.tree.map(lambda x, n, d: x + n / np.maximum(d, 1), full, num, den)
    chex.assert_trees_all_close(state.server.variables.params, expected, rtol=1e-5, atol=1e-6)


def test_with_the_scaler_half_of_equal_units_are_the_whole():
    variables = MODEL.init(jax.random.key(0))
    first = jax.tree.map(lambda x: jnp.repeat(x[..., :4], 2, -1), variables.params["dense1"])
    second = variables.params["dense2"]
    second = second | {"kernel": jnp.repeat(second["kernel"][:4], 2, 0)}
    variables = variables._replace(params={"dense1": first, "dense2": second})
    half = Subnet({"hidden1": np.arange(0, 8, 2)})
    algorithm = hetero_fl(MODEL, TASK, LOCAL, [half], scaler=True)
    (bucket,) = algorithm.buckets
    small = client_variables(bucket, algorithm.init(variables), ())
    x = jnp.ones((2, 6))
    there = bucket.model.apply(small, x)[0]
    np.testing.assert_allclose(there, MODEL.apply(variables, x)[0], rtol=1e-5)
    assert not np.allclose(there, MODEL.apply(small, x)[0])


def test_a_coordinate_that_nobody_covers_does_not_move():
    algorithm = hetero_fl(MODEL, TASK, LOCAL, TIERS[1:], optimizer=optax.adam(0.1))
    people = population("fed_avg", federation())._replace(bucket=np.arange(6) % 2)
    state, _ = run_new(algorithm, people, calls=2)
    before, after = start().params, state.server.variables.params
    moved = jax.tree.map(lambda a, b: np.asarray(a != b), before, after)
    assert not moved["dense1"]["kernel"][:, 4:].any() and moved["dense1"]["kernel"][:, :4].any()
    assert not moved["dense2"]["kernel"][4:].any() and moved["dense2"]["kernel"][:4].any()


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ([], "at least one tier"),
        (
            [Subnet({"hiden1": np.arange(2)})],
            "Tier 0 names the axis 'hiden1'; the model has .*'hidden1'",
        ),
        ([Subnet({"hidden1": np.arange(9)})], "indices from 0 to 8; the axis has size 8"),
    ],
)
def test_tiers_that_do_not_fit_are_refused(tiers, message):
    with pytest.raises(ValueError, match=message):
        hetero_fl(MODEL, TASK, LOCAL, tiers)
