"""Epsilon is that of the literature, bounds what can be integrated, and keeps to a budget."""

import functools
import math
import sys

import numpy as np
import pytest
from scipy.stats import norm

from jaxfm.federated.accounting.epsilon import (
    Sampling,
    _fixed_profiles,
    _loss_of_a_round,
    epsilon_of,
)
from jaxfm.federated.accounting.privacy import plan_privacy

FIXED, POISSON = Sampling(100, 8), Sampling(100, 8, "poisson")


def test_poisson_sampling_costs_what_others_have_published():
    """The example of Koskela, Jälkö and Honkela's Fourier accountant (arXiv 1906.03049), with q =
    0.01 and sigma = 4; and a test of TensorFlow Privacy's compute_dp_sgd_privacy."""
    epsilon = epsilon_of(4.0, 10_000, 4.243484012034273e-06, Sampling(10_000, 100, "poisson"))
    assert math.isclose(epsilon, 1.0, rel_tol=2e-3)
    renyi = epsilon_of(1.3, 6_000, 1e-5, Sampling(60_000, 150, "poisson"), accountant="rdp")
    assert math.isclose(renyi, 0.7242234026109595, rel_tol=2e-3)


def test_one_gaussian_needs_the_noise_of_the_analytic_mechanism():
    """Balle and Wang 2018: epsilon 1 at delta 1e-5 asks for 3.7306."""
    privacy = plan_privacy(Sampling(100, 100), delta=1e-5, epsilon=1.0, rounds=1)
    assert 3.7306 <= privacy.noise_multiplier <= 3.7306 * 1.002
    assert 0.99 < privacy.spent(1) <= 1.0 and privacy.spent(0) == 0


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_cohorts_of_fixed_size_are_bounded(rate):
    """By what the worst known clients' sums come to, integrated: one stands for the client where it
    is not drawn, at either end of the ball, or at its middle."""
    x = np.linspace(-14, 14, 40_001)
    density = lambda place: norm.pdf(x, place, 1.3)
    log_a = np.array([0.0, 0.05, 0.3, 1.0, 2.0, 3.0])
    removed, added = _fixed_profiles(1.3, rate, log_a)
    loss = _loss_of_a_round(1.3, Sampling(20, round(20 * rate)))
    closest = 0.0
    for other in (-1.0, 0.0, 1.0):
        p, q = (rate * density(own) + (1 - rate) * density(other) for own in (1.0, 0.0))
        for i, order in enumerate(np.exp(log_a)):
            mass = lambda a, b, order=order: np.sum(np.maximum(a - order * b, 0)) * (x[1] - x[0])
            there, back = mass(p, q), mass(q, p)
            assert there <= removed[i] + 1e-7 and back <= added[i] + 1e-7
            assert max(there, back) <= loss.get_delta_for_epsilon(log_a[i]) + 1e-7
            closest = max(closest, there / removed[i])
    assert closest > 0.99  # at order 1 it is exact


def test_the_secret_of_a_cohort_adds_privacy_and_poisson_sampling_adds_more():
    known = FIXED._replace(secret=False)
    costs = [epsilon_of(1.0, 20, 1e-5, sampling) for sampling in (POISSON, FIXED, known)]
    assert costs[0] < 0.5 * costs[1] < 0.5 * costs[2]
    everybody = epsilon_of(1.0, 20, 1e-5, Sampling(100, 100, "poisson"))
    assert math.isclose(costs[2], everybody, rel_tol=1e-6)
    renyi = epsilon_of(1.0, 20, 1e-5, FIXED, accountant="rdp")
    assert costs[1] < renyi  # which bounds the replacement of a client, too


@functools.cache
def planned():
    return plan_privacy(FIXED, delta=1e-5, epsilon=4.0, noise_multiplier=1.5, rounds=60)


def test_a_budget_allows_so_many_rounds_and_not_one_more():
    privacy = planned()
    assert privacy.rounds and 1 < privacy.rounds < 60
    assert privacy.spent(privacy.rounds) <= 4.0 < privacy.spent(privacy.rounds + 1)
    enough = plan_privacy(FIXED, delta=1e-5, epsilon=90.0, noise_multiplier=1.5, rounds=2)
    assert enough.rounds == 2
    assert plan_privacy(FIXED, delta=1e-5, noise_multiplier=1.5, rounds=2).rounds is None


def test_places_hold_a_poisson_cohort():
    assert POISSON.places > 8 + 6 * math.sqrt(8) and Sampling(100, 90, "poisson").places == 100
    assert FIXED.places == 8 and Sampling(100, 100, "poisson").places == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0 must be a number above 0"),
        ({"epsilon": math.nan}, "epsilon=nan must be a number above 0"),
        ({"delta": 0.0}, "delta=0.0 must be a probability"),
        ({"delta": 0.1}, "delta=0.1 would allow to publish one of 100 clients"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0 must be a number above 0"),
        ({"epsilon": math.inf}, "needs a budget: give epsilon, or noise_multiplier"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"noise_multiplier": 0.1}, "noise_multiplier=0.1: one round alone costs an epsilon of"),
        ({"sampling": Sampling(4, 5), "delta": 0.01}, "cohort_size=5 must be from 1 to .* 4"),
    ],
)
def test_bad_budgets_raise(options, message):
    values = {"sampling": FIXED, "delta": 1e-5, "epsilon": 2.0, "rounds": 3} | options
    with pytest.raises(ValueError, match=message):
        plan_privacy(values.pop("sampling"), **values)


def test_without_the_package_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"install jaxfm\[privacy\]"):
        epsilon_of(1.1, 1, 1e-5, FIXED, accountant="rdp")
