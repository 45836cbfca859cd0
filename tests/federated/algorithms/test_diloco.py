"""DiLoCo and its streaming form against the papers' algorithms in NumPy."""

import chex
import jax
import numpy as np
import optax
import pytest
from laws import (
    LR,
    MODEL,
    QUADRATIC,
    SQUARES,
    TASK,
    assert_is_fed_avg,
    federation,
    population,
    quadratic,
    run_new,
    start,
)  # fmt: skip

from jaxfm.federated import Population, client_costs, profiles
from jaxfm.federated.algorithms.diloco import diloco
from jaxfm.federated.local import Local

LOCAL = Local(optax.sgd(LR), 4, 2)


def test_without_momentum_and_memory_it_is_fed_avg():
    assert_is_fed_avg(diloco(MODEL, TASK, LOCAL, learning_rate=1.0, momentum=0.0), 1e-6)


class Worker:
    """AdamW on half the squared distance to a target, in NumPy."""

    def __init__(self, target, rate, decay):
        self.target, self.rate, self.decay, self.m, self.v, self.t = target, rate, decay, 0, 0, 0

    def train(self, y, steps):
        for _ in range(steps):
            gradient, self.t = y - self.target, self.t + 1
            self.m = 0.9 * self.m + 0.1 * gradient
            self.v = 0.999 * self.v + 0.001 * gradient**2
            m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
            y = y - self.rate * (m / (np.sqrt(v) + 1e-8) + self.decay * y)
        return y


def test_three_rounds_are_the_papers_algorithm():
    """Inner AdamW goes on over the rounds; the outer step is Nesterov's."""
    variables, targets, data = quadratic([3.0, -1.0, 2.0])
    inner = optax.adamw(0.1, weight_decay=0.1)
    algorithm = diloco(QUADRATIC, SQUARES, Local(inner, 1, 4))
    people = Population(data, profiles(3), np.zeros(3, np.int32))
    state, _ = run_new(algorithm, people, 3, variables=variables, public=None)
    workers, x, trace = [Worker(t, 0.1, 0.1) for t in targets], 1.0, 0.0
    for _ in range(3):
        d = np.mean([worker.train(x, 4) - x for worker in workers])
        trace = 0.9 * trace + d
        x = x + 0.7 * (d + 0.9 * trace)
    np.testing.assert_allclose(state.server.variables.params["y"], x, rtol=1e-5)


def test_a_client_that_is_absent_keeps_its_optimizer():
    people = population("fed_avg", federation((6, 0, 4, 3, 5, 2)))
    algorithm = diloco(MODEL, TASK, Local(optax.adam(LR), 4))
    state, _ = run_new(algorithm, people)
    counts = np.asarray(optax.tree.get(state.memories[0], "count"))
    np.testing.assert_array_equal(counts, [2, 0, 1, 1, 2, 1])
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x[1], optax.tree.get(state.memories[0], "mu")),
        jax.tree.map(np.zeros_like, start().params),
    )


def test_its_bytes_are_those_of_the_parameters():
    algorithm, people = diloco(MODEL, TASK, LOCAL), population("fed_avg", federation())
    (cost,) = client_costs(algorithm, people, start())
    assert cost.bytes_down == 4 * cost.parameters and cost.bytes_up == cost.bytes_down + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a number above 0"),
        ({"momentum": 1.0}, "momentum=1.0 must be a number from 0 and below 1"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        diloco(MODEL, TASK, LOCAL, **options)
