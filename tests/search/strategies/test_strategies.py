"""The laws of projections, strategies and the search loop, on a problem with a known answer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfm.checkpoint import Checkpointer
from jaxfm.search.strategies.agmc import agmc, agmc_published
from jaxfm.search.strategies.cma_es import cma_es
from jaxfm.search.strategies.gnn_rl import gnn_rl
from jaxfm.search.strategies.gnn_rl_published import gnn_rl_published
from jaxfm.search.strategies.loop import run, search
from jaxfm.search.strategies.magnitude import magnitude
from jaxfm.search.strategies.nsga2 import nsga2
from jaxfm.search.strategies.policy_graph import chain
from jaxfm.search.strategies.project import Budget, projection, within
from jaxfm.search.strategies.random_search import random_search
from jaxfm.search.strategies.strategy import separable
from jaxfm.search.strategies.uniform import uniform

PROBLEM = separable()
GROUPS = len(PROBLEM.sizes)
GRAPH = chain(GROUPS + 1)
LEARNING = {
    "random": random_search(GROUPS, batch=8),
    "cma_es": cma_es(GROUPS, batch=8),
    "nsga2": nsga2(PROBLEM.sizes, batch=8),
    "gnn_rl": gnn_rl(GRAPH, batch=8),
    "gnn_rl_published": gnn_rl_published(
        GRAPH, lambda counts: PROBLEM.costs(counts)[0], 1.0, batch=8
    ),
    "agmc": agmc(GRAPH, batch=8, warm_up=16, updates=4, memory=64, sample=16),
    "agmc_published": agmc_published(GRAPH, batch=8, warm_up=16, updates=4, memory=64, sample=16),
}
compiled = functools.cache(lambda name: search(PROBLEM, LEARNING[name], 160))
start = lambda name: compiled(name).init(jax.random.key(0))


@functools.cache
def whole(name):
    return compiled(name).result(compiled(name).advance(start(name), 20))


published = ("agmc_published", "gnn_rl_published")  # the same programs but for some terms
everyone = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in published else n for n in LEARNING]
)

SIZES = np.array([8, 30, 64, 5], np.int32)
WEIGHTS = np.array([3.0, 1.0, 0.5, 4.0], np.float32)


def quadratic(counts):
    """Like the cost of convolutions: products of neighbours."""
    return (counts[1:] * counts[:-1] * WEIGHTS[1:]).sum()


BUDGETS = tuple(
    Budget(name, cost, 0.4 * float(cost(jnp.asarray(SIZES, jnp.float32))))
    for name, cost in (("linear", lambda c: (c * WEIGHTS).sum()), ("products", quadratic))
)
PROJECT = {m: jax.jit(projection(SIZES, BUDGETS, channel_multiple=m)) for m in (1, 4)}


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
    with pytest.raises(ValueError, match="channel_multiple=0"):
        projection(SIZES, BUDGETS, channel_multiple=0)


@everyone
def test_a_strategy_improves_stays_within_budget_and_repeats_itself(name):
    result = whole(name)
    again = compiled(name).result(compiled(name).advance(start(name), 20))
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


@everyone
def test_a_stopped_search_goes_on_to_the_same_result(name, tmp_path):
    loop = compiled(name)
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, loop.advance(start(name), 3))
        if name == "nsga2":
            resumed = run(PROBLEM, LEARNING[name], 160, jax.random.key(0), checkpoints=checkpoints)
        else:
            done, state = checkpoints.restore(like=start(name))
            resumed = loop.result(loop.advance(state, loop.num_steps - done))
    np.testing.assert_array_equal(whole(name).counts, resumed.counts)


def test_a_graph_policy_beats_uniform_pruning():
    learned, fixed = whole("gnn_rl"), run(PROBLEM, uniform(GROUPS), 1, jax.random.key(0))
    assert learned.best_score > 0.3 * fixed.best_score
    assert learned.scores[-8:].mean() > 0.5 * fixed.best_score  # and not by luck of one candidate


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
