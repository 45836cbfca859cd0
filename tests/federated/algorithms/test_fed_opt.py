"""The server's optimizers: their first steps in closed form, and momentum."""

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
    assert_is_fed_avg,
    federation,
    one_step,
    population,
    run_new,
    start,
)

from jaxfm.federated.algorithms.fed_opt import fed_avg_m
from jaxfm.federated.local import Local


@pytest.mark.parametrize("name", ["fed_adam", "fed_yogi"])
def test_the_first_step_of_the_server_is_its_equation(name):
    """For one client and one local step: m and v without bias correction, v from tau²."""
    b1, b2, tau, rate = 0.9, 0.99, 1e-3, 0.01
    before, gradient, state = one_step(name)

    def stepped(x, g):
        d, v = -LR * g, tau**2
        if name == "fed_adam":
            v = b2 * v + (1 - b2) * d**2
        else:
            v = v - (1 - b2) * d**2 * np.sign(v - d**2)
        return x + rate * (1 - b1) * d / (np.sqrt(v) + tau)

    expected = jax.tree.map(stepped, before, gradient)
    chex.assert_trees_all_close(state.server.variables.params, expected, rtol=1e-5, atol=1e-6)


def test_server_momentum_zero_is_fed_avg():
    assert_is_fed_avg(fed_avg_m(MODEL, TASK, LOCAL, learning_rate=1.0, momentum=0.0), 1e-7)


def test_server_momentum_accumulates():
    """d1, then d2 + 0.9 d1: with the same gradient twice (a linear loss) 1 and 1.9 steps."""
    task = TASK._replace(loss=lambda out, targets, weight: (jnp.sum(out), jnp.sum(weight)))
    bias = lambda state: np.asarray(state.server.variables.params["dense2"]["bias"])
    people = population("fed_avg", federation((4, 4)))
    algorithm = fed_avg_m(MODEL, task, Local(optax.sgd(LR), 4), momentum=0.9)
    once, _ = run_new(algorithm, people)
    twice, _ = run_new(algorithm, people, calls=2)
    before = np.asarray(start().params["dense2"]["bias"])
    np.testing.assert_allclose(bias(once) - before, -LR, rtol=1e-5)
    np.testing.assert_allclose(bias(twice) - bias(once), -1.9 * LR, rtol=1e-5)
