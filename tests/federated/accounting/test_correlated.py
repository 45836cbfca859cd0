"""Noise that is correlated over rounds: its sensitivity, its cost, and that it is as planned."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import LOCAL, MODEL, TASK, federation, population, start

from jaxfm.federated import compile_rounds, python_round
from jaxfm.federated.accounting.correlated import Strategy, banded_strategy, buffered_strategy
from jaxfm.federated.accounting.epsilon import Sampling, epsilon_of
from jaxfm.federated.accounting.privacy import plan_correlated, plan_privacy
from jaxfm.federated.algorithm import Exact, Mean
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.averaging import Movement
from jaxfm.federated.cohort import draw, times_drawn
from jaxfm.federated.wrappers.private import PrivateUpload, with_privacy
from jaxfm.federated.wrappers.private_checks import Quantile

TURNS = Sampling(6, 2, "in_turn")
ROUNDS = 9


@functools.cache
def planned(buffers: int = 0):
    bands = 0 if buffers else 3
    return plan_correlated(
        TURNS, delta=1e-3, epsilon=4.0, rounds=ROUNDS, bands=bands, buffers=buffers
    )


def matrix(strategy: Strategy) -> np.ndarray:
    """C."""
    parts = (c * np.eye(strategy.rounds, k=-i) for i, c in enumerate(strategy.coefficients))
    return sum(parts, np.zeros((strategy.rounds, strategy.rounds)))


KINDS = pytest.mark.parametrize("buffers", [0, 2], ids=["bands", "buffers"])


@KINDS
def test_sensitivity_is_that_of_the_worst_turns(buffers):
    """Over all sets of rounds that are so far apart, whatever the signs of what a client sends."""
    strategy = planned(buffers).strategy
    c, worst = matrix(strategy), np.zeros(ROUNDS + 1)
    for count in range(1, 4):
        for rounds in itertools.combinations(range(ROUNDS), count):
            if min(np.diff(rounds), default=9) < strategy.separation:
                continue
            for signs in itertools.product((-1, 1), repeat=count):
                moved = (c[:, list(rounds)] * signs).sum(1)
                norms = np.sqrt(np.cumsum(moved**2))
                worst[1:] = np.maximum(worst[1:], norms)
    for k in range(ROUNDS + 1):
        assert math.isclose(strategy.sensitivity(k), worst[k], rel_tol=1e-5, abs_tol=1e-9)


def test_the_whole_run_is_one_gaussian_within_the_budget():
    privacy = planned()
    spent = [privacy.spent(k) for k in range(ROUNDS + 1)]
    assert spent[0] == 0 and np.all(np.diff(spent) >= 0) and 3.97 < spent[-1] <= 4
    noise = privacy.noise_multiplier / privacy.strategy.sensitivity(ROUNDS)
    assert math.isclose(spent[-1], epsilon_of(noise, 1, 1e-3, Sampling(1, 1)))
    assert privacy.rounds == ROUNDS and privacy.ends(ROUNDS)


def test_one_band_is_independent_noise_of_clients_that_take_turns():
    one = plan_correlated(TURNS, delta=1e-3, epsilon=4.0, rounds=ROUNDS, bands=1)
    plain = plan_privacy(TURNS, delta=1e-3, epsilon=4.0, rounds=ROUNDS)
    assert math.isclose(one.noise_multiplier, plain.noise_multiplier, rel_tol=4e-3)
    three_turns = epsilon_of(plain.noise_multiplier, 3, 1e-3, Sampling(6, 6))
    assert math.isclose(plain.spent(ROUNDS), three_turns, rel_tol=1e-6)


def test_bands_lessen_the_noise_in_the_model():
    errors = [banded_strategy(32, 8, bands).error() for bands in (1, 4, 8)]
    assert errors[0] > 1.3 * errors[1] > 1.3 * errors[2]


def test_a_buffer_takes_noise_back_over_all_rounds():
    """One copy of the model does what many bands do where turns are long."""
    one = buffered_strategy(64, 32)
    assert len(one.sequences) == 1 and len(one.coefficients) == 64
    assert one.error() < 0.8 * banded_strategy(64, 32, 8).error()
    decay, scale = one.sequences[0]
    assert one.coefficients[:3] == pytest.approx((1.0, scale, scale * decay))


@KINDS
def test_noise_of_rounds_is_that_of_the_matrix(buffers):
    """The covariance over rounds of what a server without clients adds is C^-1 C^-T."""
    privacy = planned(buffers)
    algorithm = with_privacy(fed_avg(MODEL, TASK, LOCAL), privacy, clip=0.1)
    zeros = jax.tree.map(jnp.zeros_like, start().params)
    nothing = PrivateUpload(Mean(Movement(zeros, Exact({})), Exact(jnp.zeros(()))), ())

    @jax.jit
    @jax.vmap
    def run(key):
        def step(state, key):
            new, _ = algorithm.server(state, nothing, None, key)
            flat = lambda s: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(s.variables)])
            return new, flat(new) - flat(state)

        return jax.lax.scan(step, algorithm.init(start()), jax.random.split(key, 4))[1]

    noise = np.asarray(run(jax.random.split(jax.random.key(0), 400)), float)  # [runs, 4, d]
    rows = noise.transpose(1, 0, 2).reshape(4, -1) * 2 / 0.1 / privacy.noise_multiplier
    inverse = np.linalg.inv(matrix(privacy.strategy))[:4, :4]
    wanted, found = inverse @ inverse.T, np.cov(rows)
    np.testing.assert_allclose(np.sqrt(np.diag(found)), np.sqrt(np.diag(wanted)), rtol=0.02)
    np.testing.assert_allclose(found, wanted, atol=0.03)


def test_clients_take_turns():
    drawn = [np.asarray(draw(jax.random.key(3), t, 7, 3, 0.0, "in_turn")[0]) for t in range(28)]
    when = [[t for t in range(28) if client in drawn[t]] for client in range(7)]
    assert all(len(set(x)) == 3 for x in drawn)
    assert all(set(np.diff(times)) <= {2, 3} and len(times) == 12 for times in when)
    again = np.asarray(draw(jax.random.key(4), 0, 7, 3, 0.0, "in_turn")[0])
    assert not np.array_equal(again, drawn[0])
    assert (times_drawn(jax.random.key(3), 28, 7, 3, "in_turn") == 12).all()


def test_rounds_in_turn_are_those_of_their_clients_one_by_one():
    people = population("fed_avg", federation())
    algorithm = with_privacy(fed_avg(MODEL, TASK, LOCAL), planned(), clip=0.05)
    engine = compile_rounds(algorithm, people, cohort_size=2)
    fast = engine.init(start(), jax.random.key(4))
    slow = jax.device_get(fast)
    for _ in range(2):
        slow, _, found = python_round(algorithm, people, slow, {}, cohort_size=2)
        fast, _ = engine.run(fast)
        assert not found
    chex.assert_trees_all_close(slow.server, fast.server, atol=1e-6)
    assert fast.server.released == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: buffered_strategy(9, 3, 9), "buffers=9 must be from 1 to 8, and rounds=9 2 or"),
        (lambda: banded_strategy(9, 3, 4), "bands=4 must be from 1 to the rounds between two"),
        (
            lambda: plan_correlated(Sampling(6, 2), delta=1e-3, epsilon=1.0, rounds=3),
            "kind='fixed': noise that is correlated over rounds is for clients that take turns",
        ),
        (
            lambda: plan_correlated(TURNS, delta=1e-3, epsilon=math.inf, rounds=3),
            "needs a budget",
        ),
        (
            lambda: with_privacy(fed_avg(MODEL, TASK, LOCAL), planned(), adapt=Quantile()),
            "leave the adaptive norm and the clients' noise out",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
