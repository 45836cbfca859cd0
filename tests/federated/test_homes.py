"""Clients with a home: the same rounds, with the data and memory of each client in one place."""

import chex
import jax
import numpy as np
import pytest
from laws import engine, federation, make, population, run, run_new, slow_and_fast, start

from jaxfm.data.federation import Federation
from jaxfm.federated import compile_rounds

slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
HOME = np.array([1, 0, 0, 1, 0, 0])


@pytest.mark.parametrize("name", ["scaffold", "hetero_fl", slow("adp"), slow("fed_kemf")])
def test_rounds_at_home_are_the_same_rounds(name):
    people = slow_and_fast(name)
    reference, expected = run_new(make(name), people, 2, cohort_size=3)
    state, info = run_new(make(name), people._replace(home=HOME), 2, cohort_size=3)
    chex.assert_trees_all_close(state.server, reference.server, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(info, expected, rtol=1e-5, atol=1e-6)


def test_memories_lie_at_home_in_the_order_of_members():
    people = slow_and_fast("scaffold")
    plain = engine("scaffold")
    home = compile_rounds(make("scaffold"), people._replace(home=HOME), cohort_size=6)
    ends = [
        plain.run(plain.init(start(), jax.random.key(3)), people)[0],
        home.run(home.init(start(), jax.random.key(3)))[0],
    ]
    (ids,), (placed,) = plain.members, home.members
    assert placed.tolist() == [1, 2, 4, 5, 0, 3, -1, -1]  # device 0, then device 1 and its padding
    rows = np.array([placed.tolist().index(i) for i in ids])
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[rows], jax.device_get(ends[1].memories)),
        jax.device_get(ends[0].memories),
        rtol=1e-5,
        atol=1e-6,
    )
    for leaf in jax.tree.leaves(ends[1].memories):
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {4}


def test_a_device_needs_the_data_of_its_own_clients_only():
    """What other devices would do with wrong rows of clients that live elsewhere is not seen."""
    people = slow_and_fast("fed_avg")
    reference, _ = run("fed_avg", people)
    examples = people.federation.examples
    unused = {name: np.concatenate([leaf, 0 * leaf]) for name, leaf in examples.items()}
    more = people._replace(
        federation=Federation(unused, people.federation.index, people.federation.count), home=HOME
    )
    state, _ = run_new(make("fed_avg"), more, cohort_size=6)
    chex.assert_trees_all_close(state.server, reference.server, rtol=1e-5, atol=1e-6)


def test_a_device_without_clients_idles():
    people = population("fed_avg", federation())
    reference, _ = run("fed_avg", people)
    state, info = run_new(make("fed_avg"), people._replace(home=np.zeros(6, int)))
    chex.assert_trees_all_close(state.server, reference.server, rtol=1e-5, atol=1e-6)
    assert info.counted.sum() == 6


def test_a_home_that_does_not_exist_is_refused():
    people = population("fed_avg", federation())._replace(home=np.full(6, 2))
    with pytest.raises(ValueError, match='home has values from 2 to 2; the mesh axis "clients"'):
        compile_rounds(make("fed_avg"), people, cohort_size=2)
    runner = compile_rounds(make("fed_avg"), people._replace(home=HOME), cohort_size=2)
    state = runner.init(start(), jax.random.key(0))
    with pytest.raises(ValueError, match="cannot change their home between calls"):
        runner.run(state, people._replace(home=1 - HOME))
