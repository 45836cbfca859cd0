"""The laws of projections, strategies and the search loop, on a problem with a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfm.checkpoint import Checkpointer
from jaxfm.search.cma_es import cma_es
from jaxfm.search.loop import run, search
from jaxfm.search.magnitude import magnitude
from jaxfm.search.nsga2 import nsga2
from jaxfm.search.project import Budget, projection, within
from jaxfm.search.random_search import random_search
from jaxfm.search.strategy import separable
from jaxfm.search.uniform import uniform

PROBLEM = separable()
GROUPS = len(PROBLEM.sizes)
LEARNING = {
    "random": random_search(GROUPS, batch=8),
    "cma_es": cma_es(GROUPS, batch=8),
    "nsga2": nsga2(PROBLEM.sizes, batch=8),
}
everyone = pytest.mark.parametrize("name", list(LEARNING))

SIZES = np.array([8, 30, 64, 5], np.int32)
WEIGHTS = np.array([3.0, 1.0, 0.5, 4.0], np.float32)


def quadratic(counts):
    """Like the cost of convolutions: products of neighbours."""
    return (counts[1:] * counts[:-1] * WEIGHTS[1:]).sum()


BUDGETS = tuple(
    Budget(name, cost, 0.4 * float(cost(jnp.asarray(SIZES, jnp.float32))))
    for name, cost in (("linear", lambda c: (c * WEIGHTS).sum()), ("products", quadratic))
)
PROJECT = {m: jax.jit(projection(SIZES, BUDGETS, multiple=m)) for m in (1, 4)}


@given(st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4), st.sampled_from([1, 4]))
def test_every_candidate_is_within_one_step_of_its_budgets(logits, multiple):
    counts = np.asarray(PROJECT[multiple](jnp.asarray(logits, jnp.float32)))
    assert (counts >= 1).all() and (counts <= SIZES).all()
    assert ((counts % multiple == 0) | (counts == SIZES)).all()
    fits = lambda c: bool(within(BUDGETS, jnp.asarray(c, jnp.float32)))
    assert fits(counts)
    for group in range(4):  # no group could grow by one more step
        more = counts.copy()
        more[group] = min(more[group] + multiple, SIZES[group])
        assert more[group] == counts[group] or not fits(more)


def test_a_budget_below_the_smallest_network_is_refused():
    tight = (Budget("linear", BUDGETS[0].cost, 2.0),)
    with pytest.raises(ValueError, match="linear"):
        projection(SIZES, tight)
    with pytest.raises(ValueError, match="multiple=0"):
        projection(SIZES, BUDGETS, multiple=0)


@everyone
def test_a_strategy_improves_stays_within_budget_and_repeats_itself(name):
    loop = search(PROBLEM, LEARNING[name], 160)
    result, again = (
        loop.result(loop.advance(loop.init(jax.random.key(0)), loop.num_steps)) for _ in range(2)
    )
    assert (np.diff(result.curve) >= 0).all()
    assert result.curve[-1] > result.curve[0] + 0.01
    assert all(bool(PROBLEM.fits(jnp.asarray(c, jnp.float32))) for c in result.counts[:20])
    np.testing.assert_array_equal(result.counts, again.counts)
    np.testing.assert_array_equal(result.scores, again.scores)


@pytest.mark.slow
def test_strategies_that_learn_beat_random_where_there_is_something_to_learn():
    best = {name: run(PROBLEM, made, 320, jax.random.key(1)).best_score
            for name, made in LEARNING.items()}  # fmt: skip
    assert best["cma_es"] > best["random"] and best["nsga2"] > best["random"]


@pytest.mark.parametrize("name", ["nsga2"])
def test_a_stopped_search_goes_on_to_the_same_result(name, tmp_path):
    loop = search(PROBLEM, LEARNING[name], 64)
    whole = loop.result(loop.advance(loop.init(jax.random.key(2)), loop.num_steps))
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, loop.advance(loop.init(jax.random.key(2)), 3))
        resumed = run(PROBLEM, LEARNING[name], 64, jax.random.key(2), checkpoints=checkpoints)
    np.testing.assert_array_equal(whole.counts, resumed.counts)


def test_fixed_rules_need_one_evaluation():
    for made in (uniform(GROUPS), magnitude(PROBLEM, [np.arange(32.0)] * GROUPS)):
        result = run(PROBLEM, made, 1, jax.random.key(0))
        assert PROBLEM.fits(jnp.asarray(result.best_counts, jnp.float32))
    with pytest.raises(ValueError, match="positive multiple of 8"):
        run(PROBLEM, LEARNING["random"], 12, jax.random.key(0))


def test_a_candidate_that_fails_poisons_nothing():
    def evaluate(data, counts):
        scores = PROBLEM.evaluate(data, counts)
        return jnp.where(jnp.arange(len(scores)) == 0, jnp.nan, scores)

    result = run(PROBLEM._replace(evaluate=evaluate), LEARNING["cma_es"], 32, jax.random.key(0))
    assert np.isfinite(result.best_score) and np.isnan(result.scores).sum() == 4
