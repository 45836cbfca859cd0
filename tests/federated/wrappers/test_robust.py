"""Robust rules in the place of the mean, around algorithms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import (
    BATCH_NORM,
    LOCAL,
    MODEL,
    PUBLIC,
    TASK,
    advance,
    alike,
    assert_same,
    examples,
    federation,
    make,
    population,
    run,
    run_new,
    start,
)

from jaxfm.data.federation import federate
from jaxfm.federated import client_costs, compile_rounds, profiles
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.client import python_round
from jaxfm.federated.population import Population
from jaxfm.federated.wrappers import robust_rules as rules
from jaxfm.federated.wrappers.compression import quantised, with_compression
from jaxfm.federated.wrappers.robust import named_robust, with_robust
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tasks import classification

ROWS = {name: leaf[:4] for name, leaf in examples(24).items()}


def moves(people, clients=range(6)):
    """The parameters after a round of each client alone."""
    for client in clients:
        count = np.where(np.arange(6) == client, people.federation.count, 0)
        alone = people._replace(federation=people.federation._replace(count=count))
        yield jax.tree.map(np.asarray, run("fed_avg", alone)[0].server.variables.params)


def test_the_median_of_those_who_report():
    """One client is empty, one is not finite."""
    data = federation((6, 1, 4, 0, 5, 2))
    sick = data.examples | {"x": data.examples["x"].copy()}
    sick["x"][data.rows_of(1)] = np.nan
    people = population("fed_avg", data._replace(examples=sick))
    state, info = run_new(with_robust(make("fed_avg"), rules.median), people)
    assert info.counted.sum() == 4
    expected = jax.tree.map(lambda *x: np.median(x, axis=0), *moves(people, (0, 2, 4, 5)))
    chex.assert_trees_all_close(state.server.variables.params, expected, rtol=1e-5, atol=1e-6)


def test_a_rule_is_any_function_of_rows_and_weights():
    """The weighted mean as a rule is federated averaging."""
    average = lambda rows, weights: (weights[:, None] * rows).sum(0) / weights.sum()
    people = population("fed_avg", federation())
    state, _ = run_new(with_robust(make("fed_avg"), average), people)
    assert_same(state, run("fed_avg", people)[0])


@pytest.mark.parametrize("name", ["fed_adam", "fed_dyn", "fed_per", "fed_df"])
def test_identical_clients_give_what_their_mean_gives(name):
    """With server optimizers, several means in an upload, personal parts and predictions."""
    people = population(name, alike()._replace(count=np.full(6, 4)))  # whole batches: no shuffling
    state, _ = run_new(with_robust(make(name), rules.trimmed_mean(0.3)), people, 2)
    assert_same(state, run(name, people, calls=2)[0], 1e-5)


def test_statistics_are_judged_apart():
    """Batch norm's statistics of one far client move nothing, whatever its parameters say."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 6)).astype(np.float32)
    x[:4] *= 1e4
    data = federate({**examples(24), "x": x}, np.arange(24).reshape(6, 4))
    people = Population(data, profiles(6), np.zeros(6, np.int32))
    model = BATCH_NORM
    algorithm = with_robust(fed_avg(model, TASK, LOCAL), rules.median)
    variables = jax.jit(model.init)(jax.random.key(0))
    state, _ = run_new(algorithm, people, variables=variables)
    plain, _ = run_new(fed_avg(model, TASK, LOCAL), people, variables=variables)
    largest = lambda state: max(
        float(abs(leaf).max()) for leaf in jax.tree.leaves(state.server.variables.stats)
    )
    assert largest(plain) > 1e4 and largest(state) < 10


def test_an_empty_round_changes_nothing():
    people = population("fed_avg", federation((0,) * 6))
    state, _ = run_new(with_robust(make("fed_avg"), rules.krum(0.2)), people)
    chex.assert_trees_all_equal(state.server.variables, start())


def test_no_cohort_compiles_again_and_devices_do_not_matter():
    algorithm = with_robust(make("fed_avg"), rules.multi_krum(0.2))
    people = population("fed_avg", federation())
    rounds = compile_rounds(algorithm, people, cohort_size=4)
    state, _ = rounds.run(rounds.init(start(), jax.random.key(0)), people)
    traced = []
    watch = lambda event, seconds, **_: "/compile/" in event and traced.append(event)
    jax.monitoring.register_event_duration_secs_listener(watch)
    try:
        for counts in ((1, 6, 2, 5, 0, 4), (0, 0, 0, 6, 1, 1)):
            jax.block_until_ready(rounds.run(state, population("fed_avg", federation(counts)), 0.4))
            state, _ = advance(rounds, people, 1)
    finally:
        jax.monitoring.unregister_event_duration_listener(watch)
    assert traced == []
    one, _ = run_new(algorithm, people, mesh=make_mesh(clients=1), clients_at_once=2)
    assert_same(one, run_new(algorithm, people)[0], 1e-5)


def test_one_client_after_another_computes_the_same():
    algorithm = with_robust(make("fed_avg"), rules.geometric_median())
    people = population("fed_avg", federation())
    rounds = compile_rounds(algorithm, people, cohort_size=6)
    first = rounds.init(start(), jax.random.key(3))
    slow, _, found = python_round(algorithm, people, first, {}, cohort_size=6)
    assert not found
    assert_same(slow, rounds.run(first)[0], 1e-5)


def test_compressed_uploads_and_halves_are_judged_restored():
    people = population("fed_avg", federation())
    plain, _ = run_new(with_robust(make("fed_avg"), rules.median), people)
    narrow = with_compression(with_robust(make("fed_avg"), rules.median), quantised(8))
    state, _ = run_new(narrow, people)
    chex.assert_trees_all_close(state.server.variables, plain.server.variables, atol=0.02)
    task = classification(3, inputs="x", transform=lambda x, key: x.astype(jnp.bfloat16))
    short = MODEL._replace(init=lambda key: start(jnp.bfloat16))
    half = with_robust(make("fed_avg", model=short, task=task), rules.median)
    state, _ = run_new(half, people, variables=start(jnp.bfloat16))
    assert state.server.variables.params["dense1"]["bias"].dtype == jnp.bfloat16
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), state.server.variables)
    chex.assert_trees_all_close(widened, plain.server.variables, atol=0.02)


def test_clients_with_the_servers_own_rows_are_all_trusted():
    """All clients hold the root's rows, in one batch: trust leaves the mean as it is."""
    data = federate(examples(24), [np.arange(4)] * 6)
    people = population("fed_avg", data, max_steps=1)
    trusting = with_robust(make("fed_avg"), rules.fl_trust, root=ROWS, root_steps=1)
    assert_same(run_new(trusting, people)[0], run_new(make("fed_avg"), people)[0], 1e-5)


def test_what_cannot_be_judged_is_refused():
    median = rules.median
    with pytest.raises(ValueError, match=r"takes clients of one kind, and this algorithm has 2"):
        with_robust(make("hetero_fl"), median)
    with pytest.raises(ValueError, match="already combined in another way"):
        with_robust(with_robust(make("fed_avg"), median), median)
    with pytest.raises(ValueError, match="judges by examples of the server's own"):
        with_robust(make("fed_avg"), rules.fl_trust)
    with pytest.raises(ValueError, match="does not look at root examples"):
        with_robust(make("fed_avg"), median, root=ROWS)
    with pytest.raises(ValueError, match="root_steps=0 must be at least 1"):
        with_robust(make("fed_avg"), rules.fl_trust, root=ROWS, root_steps=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scaffold", r"adds up \.gain\['dense1'\]\['bias'\] outside of a mean"),
        ("fed_nova", r"adds up \.steps outside of a mean"),
    ],
)
def test_sums_that_are_no_means_are_refused(name, message):
    algorithm = with_robust(make(name), rules.median)
    with pytest.raises(ValueError, match=message):
        client_costs(algorithm, population(name, federation()), start(), PUBLIC)


def test_root_rows_need_clients_without_a_memory():
    algorithm = with_robust(make("fed_per"), rules.fl_trust, root=ROWS)
    with pytest.raises(ValueError, match="clients keep nothing between rounds"):
        client_costs(algorithm, population("fed_per", federation()), start())


def test_by_name():
    base = make("fed_avg")
    assert named_robust(base) is base
    people = population("fed_avg", federation())
    named, _ = run_new(named_robust(base, rule="trimmed_mean", fraction=0.2), people)
    given, _ = run_new(with_robust(base, rules.trimmed_mean(0.2)), people)
    chex.assert_trees_all_equal(named.server, given.server)
