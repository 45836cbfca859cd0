"""The laws that every federated algorithm of the registry keeps, on one tiny classifier."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import (
    BATCH_NORM,
    CASES,
    ENTRIES,
    LR,
    MODEL,
    PUBLIC,
    VARIANTS,
    advance,
    alike,
    assert_same,
    batch_norm_step,
    engine,
    examples,
    federation,
    make,
    model_of,
    num_buckets,
    one_step,
    population,
    run,
    run_new,
    slow_and_fast,
    start,
    two_rounds,
)

from jaxfm.adapters import attach, lora
from jaxfm.checkpoint import Checkpointer
from jaxfm.data.federation import federate, row_index
from jaxfm.federated import Exact, Status, client_costs, compile_rounds, profiles
from jaxfm.federated.accounting.ledger import client_shapes
from jaxfm.frozen import freeze, freeze_variables
from jaxfm.parallel.mesh import make_mesh
from jaxfm.subnet import Subnet
from jaxfm.tasks import classification
from jaxfm.trees import join_tree, split_tree

# Variants are built of the parts of others: their laws are slow tests.
slow = lambda name: pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name
every_algorithm = pytest.mark.parametrize("name", [slow(name) for name in CASES])
# A law whose runs share no program with others: those of one, of several and of no tiers stand for
# the rest, which are slow tests.
REPRESENTATIVES = ("fed_avg", "scaffold", "hetero_fl")
chosen = lambda name: (
    name if name in REPRESENTATIVES else pytest.param(name, marks=pytest.mark.slow)
)
representatives = pytest.mark.parametrize("name", [chosen(name) for name in CASES])


def all_that_keep(law: str):
    """All algorithms but those that say why they do not keep a law."""
    names = [name for name, case in CASES.items() if law not in ENTRIES[case.name].breaks]
    return pytest.mark.parametrize("name", [slow(name) for name in names])


@all_that_keep("identical_clients")
def test_identical_clients_equal_one_client(name):
    data = alike()
    few, all_ = 4 * (np.arange(6) < max(2, num_buckets(name))), np.full(6, 4)
    one, _ = run(name, population(name, data._replace(count=few)))
    many, _ = run(name, population(name, data._replace(count=all_)))
    assert_same(one, many)


@pytest.mark.parametrize("name", ["scaffold", "fed_kemf", "adp", "raffm", "fed_ex_lora_rest"])
def test_resumed_from_a_checkpoint_it_ends_with_the_same_bits(name, tmp_path):
    engine_, people = engine(name), population(name, federation())
    whole, _ = advance(engine_, people, 2, start(name=name))
    half, _ = advance(engine_, people, 1, start(name=name))
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, half)
        _, state = checkpoints.restore(like=engine_.init(start(name=name), jax.random.key(9)))
    state, _ = engine_.run(state, people)
    chex.assert_trees_all_equal(state.server, whole.server)
    chex.assert_trees_all_equal(state.memories, whole.memories)


@every_algorithm
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        # Devices, widths and rounds a call at once, for one program less (their own law is below).
        ({"mesh": 1, "clients_at_once": 2, "num_rounds": 2}, 1e-5),
        pytest.param({}, 1e-6, marks=pytest.mark.slow),
    ],
    ids=["scanned", "alone"],
)
def test_an_empty_client_equals_an_absent_one(name, options, tolerance):
    if "mesh" in options:
        options = options | {"mesh": make_mesh(clients=1)}
    there, _ = run(name, population(name, federation((6, 5, 4, 0, 0, 0))), calls=2)
    calls = 2 // options.get("num_rounds", 1)
    people = population(name, federation((6, 5, 4)))
    absent, info = run_new(make(name), people, calls, start(name=name), **options)
    assert_same(there, absent, tolerance)
    assert info.counted.sum() == 6


@every_algorithm
def test_a_dropped_client_equals_an_empty_one(name):
    people = population(name, federation())
    dropped, info = run(name, people, drop_rate=0.5)
    assert 0 < info.counted.sum() < 6 == info.selected.sum()
    (who,), (status,) = info.cohort.client, info.cohort.status
    count = np.zeros(6, np.int32)
    count[who] = np.where(status == Status.COUNTED, people.federation.count[who], 0)
    assert count.sum() == info.examples.sum()
    empty, _ = run(name, people._replace(federation=people.federation._replace(count=count)))
    gaps = jax.tree.map(lambda a, b: float(abs(a - b).max()), empty.server, dropped.server)
    assert max(jax.tree.leaves(gaps)) == 0


@every_algorithm
def test_the_order_of_clients_does_not_matter(name):
    people = population(name, federation((4, 1, 4, 3, 2, 2)))  # whole batches: no shuffling
    order = np.roll(np.arange(6), num_buckets(name))  # nobody changes the bucket
    index = people.federation.index
    index = dataclasses.replace(index, start=index.start[order], size=index.size[order])
    data = people.federation._replace(index=index, count=people.federation.count[order])
    shuffled = people._replace(federation=data, bucket=people.bucket[order])
    assert_same(run(name, people)[0], run(name, shuffled)[0])


@all_that_keep("one_step")
def test_one_client_and_one_step_is_a_gradient_step(name):
    before, gradient, state = one_step(name)
    is_personal = make(name).is_personal or (lambda path: False)
    shared, personal = split_tree(gradient, is_personal)
    gradient = join_tree(shared, jax.tree.map(np.zeros_like, personal))
    expected = jax.tree.map(lambda x, g: x - LR * g, before, gradient)
    chex.assert_trees_all_close(state.server.variables.params, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "cohort_size"),
    [
        pytest.param(name, size, marks=pytest.mark.slow)
        if name in VARIANTS or (size == 3 and name not in REPRESENTATIVES)
        else (name, size)
        for name in CASES
        for size in (3, 6)
    ],
)
def test_new_cohorts_counts_and_steps_do_not_compile(name, cohort_size):
    people, runner = slow_and_fast(name), engine(name, cohort_size=cohort_size)
    state, info = runner.run(runner.init(start(name=name), jax.random.key(0)), people)
    jax.block_until_ready(info)
    others = population(name, federation((1, 6, 2, 5, 0, 4)), max_steps=np.arange(1, 7))
    traced_or_compiled, seen = [], set()
    watch = lambda event, seconds, **_: "/compile/" in event and traced_or_compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(watch)
    try:
        for people, drop_rate in ((None, 0.3), (None, 0.3), (None, 0.3), *[(others, 0.4)] * 3):
            state, info = runner.run(state, people, drop_rate)
            info = jax.device_get(info)
            seen.add((float(info.spent.steps.sum()), float(info.examples.sum())))
    finally:
        jax.monitoring.unregister_event_duration_listener(watch)
    assert len(seen) > 2, "the rounds did not differ"
    assert traced_or_compiled == []


def test_the_watch_of_compilations_sees_them():
    events = []
    watch = lambda event, seconds, **_: "/compile/" in event and events.append(event)
    jax.monitoring.register_event_duration_secs_listener(watch)
    try:
        jax.jit(lambda x: x - 5)(jnp.ones(7))
    finally:
        jax.monitoring.unregister_event_duration_listener(watch)
    assert {event.rsplit("/")[-1] for event in events} > {"jaxpr_trace_duration"}


def in_halves(name: str):
    """An algorithm whose parameters and rows are bfloat16."""
    task = classification(3, inputs="x", transform=lambda x, key: x.astype(jnp.bfloat16))
    model = model_of(name)._replace(init=lambda key: start(jnp.bfloat16, name))
    return make(name, model=model, task=task)


@every_algorithm
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_dtypes_stay(name, dtype):
    if dtype == jnp.float32:
        algorithm, rounds = make(name), engine(name)
    else:
        algorithm = in_halves(name)
        rounds = compile_rounds(algorithm, slow_and_fast(name), cohort_size=6, public=PUBLIC)
    before = jax.eval_shape(algorithm.init, start(dtype, name))
    state = jax.eval_shape(rounds.init, start(dtype, name), jax.random.key(3))
    after, _ = jax.eval_shape(rounds.run, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after.server)


@pytest.mark.parametrize(
    "name",
    [n if n in ("fed_avg", "spatl") else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)
def test_halves_come_close_to_floats(name):
    half = start(jnp.bfloat16, name)
    state, _ = run_new(in_halves(name), slow_and_fast(name), 2, half, cohort_size=3)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), state.server.variables),
        two_rounds(name)[0].server.variables,
        atol=0.05,
    )


def test_sums_of_bfloat16_are_taken_in_32_bits():
    """600 clients with the same row: in bfloat16 a sum stands still at 256 of its terms."""
    half = jnp.bfloat16
    task = classification(3, inputs="x", transform=lambda x, key: x.astype(half))
    algorithm = make("fed_avg", task=task)
    rows = [np.array([0])] * 600
    many, one = (
        run_new(algorithm, population("fed_avg", federate(examples(24), rows[:n])), 1, start(half))
        for n in (600, 1)
    )
    chex.assert_trees_all_close(
        *(s.server.variables.params["dense2"]["bias"].astype(jnp.float32) for s, _ in (many, one)),
        rtol=0.02,
    )


@every_algorithm
def test_a_non_finite_update_is_left_out_and_counted(name):
    people = population(name, federation())
    data = people.federation
    sick = data._replace(examples=data.examples | {"x": data.examples["x"].copy()})
    sick.examples["x"][data.rows_of(1)] = np.nan  # the one row of client 1
    left, info = run(name, people._replace(federation=sick))
    without = data._replace(count=np.where(np.arange(6) == 1, 0, data.count))
    absent, other = run(name, people._replace(federation=without))
    assert info.non_finite.sum() == 1 and info.counted.sum() == 5
    for field in ("loss_total", "examples"):
        np.testing.assert_allclose(getattr(info, field), getattr(other, field))
    status = dict(zip(info.cohort.client[0].tolist(), info.cohort.status[0].tolist()))
    assert status == {i: Status.NON_FINITE if i == 1 else Status.COUNTED for i in range(6)}
    assert (info.spent.steps > other.spent.steps).any()  # its work is done, for nothing
    assert_same(left, absent)


@every_algorithm
@pytest.mark.parametrize("why", ["all empty", "all non-finite"])
def test_a_round_without_reports_changes_nothing(name, why):
    data = federation()
    if why == "all empty":
        data = data._replace(count=0 * data.count)
    if why == "all non-finite":
        data = data._replace(examples=data.examples | {"x": data.examples["x"] * np.inf})
    state, info = run(name, population(name, data))
    assert info.counted.sum() == 0 and info.selected.sum() == 6
    chex.assert_trees_all_equal(state.server, make(name).init(start(name=name)))
    assert int(state.round) == 1


@every_algorithm
def test_the_state_is_donated_and_the_callers_variables_are_not(name):
    runner = engine(name)
    variables, key = start(name=name), jax.random.key(3)
    state = runner.init(variables, key)
    after, _ = runner.run(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((variables, key, after)))
    again, _ = runner.run(runner.init(variables, key))
    chex.assert_trees_all_equal(after.server, again.server)


# All at once on the fast side; one at a time, where a fault can be told from the others, as slow
# tests.
@representatives
@pytest.mark.parametrize(
    "options",
    [
        {"mesh": 1, "clients_at_once": 2, "num_rounds": 2},
        pytest.param({"clients_at_once": 100, "num_rounds": 2}, marks=pytest.mark.slow),
        pytest.param({"mesh": 1, "clients_at_once": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(f"{k}{v}" for k, v in options.items()),
)
def test_devices_widths_and_rounds_a_call_do_not_matter(name, options):
    if "mesh" in options:
        options = options | {"mesh": make_mesh(clients=1)}
    calls = 2 // options.get("num_rounds", 1)
    state, info = run(name, slow_and_fast(name), calls, cohort_size=3, **options)
    reference, expected = two_rounds(name)
    assert_same(state, reference, 1e-5)
    chex.assert_trees_all_close(info, expected, rtol=1e-5, atol=1e-6)
    assert int(state.round) == 2


@all_that_keep("statistics")
def test_batch_norm_statistics_are_averaged(name):
    variables, expected = batch_norm_step()
    model = BATCH_NORM
    if model_of(name) is not MODEL:
        model = lora(model, 2, targets="first")
        variables = attach(model, variables, jax.random.key(1))
    algorithm = make(name, epochs=1, model=model, tiers=(Subnet({}),), options={})
    people = population("fed_avg", federation((4, 2)))
    state, _ = run_new(algorithm, people, variables=variables)
    chex.assert_trees_all_close(state.server.variables.stats, expected, rtol=1e-5, atol=1e-6)


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cohort_size": 7}, "cohort_size=7 must be from 1 to the number of clients, 6"),
        ({"cohort_size": 0}, "cohort_size=0 must be from 1"),
        ({"num_rounds": 0}, "num_rounds must be at least 1, got 0"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\), got 1.0"),
        ({"drop_rate": float("nan")}, "drop_rate must be in"),
        ({"clients_at_once": 0}, "clients_at_once must be at least 1, got 0"),
        ({"mesh": jax.make_mesh((1,), ("data",))}, "needs an axis 'clients'; it has {'data': 1}"),
    ],
)
def test_bad_options_raise(change, message):
    options = {"cohort_size": 2} | change
    with pytest.raises(ValueError, match=message):
        compile_rounds(make("fed_avg"), population("fed_avg", federation()), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bucket": np.full(6, 1)}, "bucket has values from 1 to 1; .* has buckets 0 to 0"),
        ({"bucket": np.full(6, -1)}, "bucket has values from -1"),
        ({"bucket": np.zeros(5, int)}, "has 6 clients, but leading sizes are {'bucket': 5}"),
        ({"profiles": profiles(4)}, "has 6 clients, but leading sizes are {'profiles.max_steps'"),
        (
            {"federation": federation()._replace(index=row_index([np.arange(6)] * 5))},
            "leading sizes are {'index': 5}",
        ),
        (
            {"federation": federation()._replace(count=np.full(6, 7, np.int32))},
            "Client 0 has count 7; its index has 6 rows",
        ),
        (
            {"federation": federation()._replace(index=row_index([np.full(6, 24)] * 6))},
            "index has values from 0 to 24; there are 24 examples",
        ),
    ],
)
def test_a_population_that_does_not_fit_raises(change, message):
    people = population("fed_avg", federation())._replace(**change)
    with pytest.raises(ValueError, match=message):
        compile_rounds(make("fed_avg"), people, cohort_size=2)


def test_a_population_of_another_kind_raises():
    people = population("hetero_fl", federation())
    runner = engine("hetero_fl")
    state = runner.init(start(), jax.random.key(0))
    with pytest.raises(ValueError, match="cannot change their bucket between calls"):
        runner.run(state, people._replace(bucket=people.bucket[::-1]))
    with pytest.raises(ValueError, match=r"leading sizes are \{'bucket': 5\}"):
        runner.run(state, people._replace(bucket=people.bucket[:5]))


# Traits of buckets.


def test_uploads_can_be_combined_side_by_side():
    """The median of clients' movements, which is no sum; absent and failed clients are left out."""
    people = population("fed_avg", federation())
    sick = people.federation.examples | {"x": people.federation.examples["x"].copy()}
    sick["x"][people.federation.rows_of(1)] = np.nan
    people = people._replace(federation=people.federation._replace(examples=sick))
    base = make("fed_avg")
    seen = []

    def combine(server, received, counted):
        seen.append(counted.shape)
        middle = lambda x: jnp.nanmedian(jnp.where(expanded(counted, x), x, jnp.nan), axis=0)
        num = jax.tree.map(lambda x: x / expanded(received.den.value, x), received.num)
        return received._replace(num=jax.tree.map(middle, num), den=Exact(jnp.ones(())))

    def expanded(x, like):
        return x.reshape(-1, *[1] * (like.ndim - 1))

    medians = base._replace(buckets=(base.buckets[0]._replace(combine=combine),))
    state, info = run_new(medians, people)
    assert seen[0][0] >= 6 and info.counted.sum() == 5
    moves = []
    for client in (0, 2, 3, 4, 5):
        count = np.where(np.arange(6) == client, people.federation.count, 0)
        alone = people._replace(federation=people.federation._replace(count=count))
        moves.append(run("fed_avg", alone)[0].server.variables.params)
    expected = jax.tree.map(lambda *x: np.median(np.stack(x), axis=0), *moves)
    chex.assert_trees_all_close(state.server.variables.params, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fed_avg", "scaffold", "fed_adam"])
def test_frozen_parameters_stay_and_travel_once(name):
    model = freeze(MODEL, lambda path: path[0] == "dense1")
    algorithm, people = make(name, model=model), population(name, federation())
    variables = freeze_variables(start(), lambda path: path[0] == "dense1")
    state, _ = run_new(algorithm, people, 2, variables=variables)
    after = state.server.variables
    chex.assert_trees_all_equal(after.frozen, variables.frozen)
    assert not np.array_equal(after.params["dense2"]["bias"], variables.params["dense2"]["bias"])
    costs = client_costs(algorithm, people, variables)
    assert costs[0].bytes_once == 4 * (6 * 8 + 8)
    assert costs[0].parameters == 8 * 3 + 3
    assert costs[0].bytes_up < 4 * (6 * 8)
    upload = client_shapes_of(algorithm, people, variables)
    assert "dense1" not in str(jax.tree.structure(upload))


def client_shapes_of(algorithm, people, variables):
    """Shapes of one upload."""
    server = jax.eval_shape(algorithm.init, variables)
    bucket = algorithm.buckets[0]
    return jax.eval_shape(bucket.client, *client_shapes(bucket, people, server))[0]
