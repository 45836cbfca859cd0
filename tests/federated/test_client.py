"""One client outside the engine: the same round, and the name of what went wrong."""

import chex
import jax
import numpy as np
import pytest
from laws import PUBLIC, engine, federation, make, population, slow_and_fast, start

from jaxfm.federated import python_round
from jaxfm.federated.client import client_data, problems

slow = lambda name: pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name", ["fed_avg", "scaffold", "hetero_fl", slow("spatl"), slow("fed_kemf")]
)
def test_a_round_client_by_client_is_the_compiled_round(name):
    people = slow_and_fast(name)
    runner = engine(name, cohort_size=3)
    state, own = (runner.init(start(), jax.random.key(3)) for _ in range(2))
    memories = {}
    for _ in range(2):
        own, memories, found = python_round(
            make(name), people, own, memories, cohort_size=3, public=PUBLIC
        )
        state, _ = runner.run(state, people)
        assert found == []
    chex.assert_trees_all_close(own.server, state.server, rtol=1e-5, atol=1e-6)
    assert int(own.round) == 2


def test_it_names_the_client_the_stage_and_the_leaf():
    people = population("fed_avg", federation())
    data = people.federation
    data.examples["x"][data.rows_of(1)] = np.nan  # the one row of client 1
    state = engine("fed_avg").init(start(), jax.random.key(3))
    after, _, found = python_round(make("fed_avg"), people, state, {}, cohort_size=6)
    assert {problem.client for problem in found} == {1}
    assert {problem.stage for problem in found} == {"upload"}
    assert "client 1, upload: .num.params['dense1']['kernel'] has 48 of 48 entries" in map(
        str, [problem._replace(leaf=problem.leaf.split(" that")[0]) for problem in found]
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(after.server)))


def test_a_client_sees_its_own_rows_only():
    people = population("fed_avg", federation())
    for client in range(6):
        data, profile = client_data(people, client)
        count = int(people.federation.count[client])
        rows = people.federation.rows_of(client)
        assert data.count == count == len(data.examples["x"])
        np.testing.assert_array_equal(
            data.examples["x"][data.index[:count]], people.federation.examples["x"][rows]
        )
        assert profile.max_steps.shape == ()


def test_an_empty_client_and_an_empty_cohort_change_nothing():
    people = population("scaffold", federation((0, 0, 0, 0, 0, 0)))
    state = engine("scaffold").init(start(), jax.random.key(3))
    after, memories, found = python_round(make("scaffold"), people, state, {}, cohort_size=6)
    chex.assert_trees_all_equal(after.server, state.server)
    assert memories == {} and found == []


def test_integers_are_no_problem():
    assert problems(0, upload={"a": np.array([1, 2]), "b": np.array([0.5])}) == []
