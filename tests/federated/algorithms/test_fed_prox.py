"""FedProx: its proximal term in closed form."""

import numpy as np
import optax
import pytest
from laws import (
    LOCAL,
    MODEL,
    QUADRATIC,
    SQUARES,
    TASK,
    assert_is_fed_avg,
    population,
    quadratic,
    run_new,
)

from jaxfm.federated.algorithms.fed_prox import fed_prox
from jaxfm.federated.local import Local


def test_without_mu_it_is_fed_avg():
    assert_is_fed_avg(fed_prox(MODEL, TASK, LOCAL, mu=0.0), 0)


def test_the_proximal_term_of_a_quadratic():
    """min (a/2)|y - t|² + (mu/2)|y - x|²: after K steps at rate r the error shrank K times by
    1 - r (a + mu)."""
    mu, rate, steps = 0.5, 0.1, 7
    variables, target, data = quadratic([3.0])
    algorithm = fed_prox(QUADRATIC, SQUARES, Local(optax.sgd(rate), 1, steps), mu=mu)
    state, _ = run_new(algorithm, population("fed_avg", data), variables=variables)
    x = 1.0
    fixed = (target[0] + mu * x) / (1 + mu)
    expected = fixed + (x - fixed) * (1 - rate * (1 + mu)) ** steps
    np.testing.assert_allclose(state.server.variables.params["y"], expected, rtol=1e-5)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"mu=-1\.0 must be a weight of at least 0"):
        fed_prox(MODEL, TASK, LOCAL, mu=-1.0)
