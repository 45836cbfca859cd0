"""SPATL: what is sent, what it costs, what stays at home, and which channels are salient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import BATCH_NORM, batch_norm_step, federation, population, run_new

from jaxfm.checkpoint import Checkpointer
from jaxfm.cost import count_flops
from jaxfm.data.federation import federate
from jaxfm.federated.accounting.ledger import client_costs, client_shapes, client_work, round_costs
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithm import ClientData, Spent
from jaxfm.federated.algorithms.scaffold import scaffold
from jaxfm.federated.algorithms.spatl import SpatlMemory, client_model, spatl, train_predictor
from jaxfm.federated.cohort import Cohort, RoundInfo, Status
from jaxfm.federated.local import Local
from jaxfm.federated.partition import nothing, under
from jaxfm.federated.parts.channel_selection import agent, everything, saliency, threshold_counts
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import compile_rounds
from jaxfm.federated.wrappers.compression import quantised, top_k, with_compression
from jaxfm.model import Variables
from jaxfm.models.families.cnn import mlp
from jaxfm.search import budgets, costs, gnn_rl, model_network, policy_graph
from jaxfm.search.ranking import importance
from jaxfm.search.strategies.gnn_rl import init_policy
from jaxfm.search.trace.cost import counts_of
from jaxfm.search.trace.interpret import coverage, sliced
from jaxfm.tasks import classification

MODEL = mlp((6, 12, 8, 3))
TASK = classification(3, inputs="x")
LOCAL = Local(optax.sgd(0.1), 4, 2)
CLIENTS, TOTAL = 4, 32
START = MODEL.init(jax.random.key(7))
NET = model_network(MODEL, START, jnp.zeros((4, 6)))
HEAD = under("dense3")


def rows(num: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, num).astype(np.int32)
    return {"x": (rng.normal(size=(num, 6)) + label[:, None]).astype(np.float32), "label": label}


def people(local_validation: bool = False) -> Population:
    parts = np.split(np.arange(32), [10, 14, 24])
    data = federate(rows(48), list(parts))
    back = federate(data.examples, np.split(np.arange(32, 48), 4)) if local_validation else None
    return Population(data, profiles(CLIENTS), np.zeros(CLIENTS, int), back)


ENGINES: dict = {}  # one program an algorithm; its key keeps it alive


def engine(algorithm, local_validation: bool = False):
    key = (id(algorithm), local_validation)
    if key not in ENGINES:
        ENGINES[key] = (
            algorithm,
            compile_rounds(algorithm, people(local_validation), cohort_size=CLIENTS),
        )
    return ENGINES[key][1]


def play(algorithm, num_rounds: int = 2, local_validation: bool = False):
    """(the last state, the last round's info)."""
    run = engine(algorithm, local_validation)
    state = run.init(jax.tree.map(jnp.copy, START), jax.random.key(3))
    for _ in range(num_rounds):
        state, info = run.run(state)
    return state, info


def make(select, **settings):
    settings = {
        "num_clients": CLIENTS, "total_examples": TOTAL, "is_personal": HEAD,
    } | settings  # fmt: skip
    return spatl(MODEL, TASK, LOCAL, select, **settings)


def test_all_channels_without_transfer_are_scaffold():
    ours, info = play(make(everything(NET), is_personal=nothing))
    theirs, _ = play(scaffold(MODEL, TASK, LOCAL, total_examples=TOTAL))
    chex.assert_trees_all_close(tuple(ours.server), tuple(theirs.server), rtol=1e-5, atol=1e-6)
    # A bit for each channel is what it costs more.
    costs = client_costs(scaffold(MODEL, TASK, LOCAL, total_examples=TOTAL), people(), START)
    assert info.spent.bytes_up.sum() == CLIENTS * (costs[0].bytes_up + 20 / 8)


def test_the_algorithm_tells_what_stays_with_clients():
    assert make(everything(NET)).is_personal is HEAD
    assert make(everything(NET), is_personal=nothing).is_personal is None


@pytest.fixture(scope="module")
def half():
    select = saliency(NET, {"macs": 0.5})
    return select, make(select), play(make(select), 3)


def test_only_what_is_covered_moves(half):
    state, _ = play(half[1], 1)
    masks = jax.tree.map(np.asarray, state.memories[0].masks)
    anybody = np.zeros(0)
    for name in ("dense1", "dense2"):
        for part in ("kernel", "bias"):
            covered = np.zeros(START.params[name][part].shape, bool)
            for client in range(CLIENTS):
                own = coverage(NET, [mask[client] for mask in masks])
                covered |= np.asarray(own.params[name][part])
            moved = np.asarray(
                state.server.variables.params[name][part] != START.params[name][part]
            )
            assert not (moved & ~covered).any()
            assert not (np.asarray(state.server.variate[name][part] != 0) & ~covered).any()
            anybody = np.concatenate([anybody, covered.ravel(), moved.ravel()])
    assert 0.3 < anybody.mean() < 1
    chex.assert_trees_all_equal(state.server.variables.params["dense3"], START.params["dense3"])


def test_the_servers_variate_is_the_mean_of_the_clients_where_they_send(half):
    state = half[2][0]
    sizes = np.array([10, 4, 10, 8])
    mean = jax.tree.map(lambda x: np.average(x, 0, sizes), state.memories[0].variate)
    chex.assert_trees_all_close(state.server.variate, mean, rtol=1e-5, atol=1e-6)
    published, _ = play(make(half[0], published=True), 3)
    means = jax.tree.map(lambda x: x.mean(0), published.memories[0].variate)
    gap = jax.tree.map(lambda a, b: float(abs(a - b).max()), published.server.variate, means)
    assert max(jax.tree.leaves(gap)) > 1e-3


def test_the_server_takes_the_mean_of_those_who_cover(half):
    state, _ = play(half[1], 1)
    memory = jax.tree.map(np.asarray, state.memories[0])
    examples = np.array([10, 4, 10, 8])
    length = LOCAL.epochs * -(-examples // LOCAL.batch_size) * 0.1  # steps times learning rate
    own = [coverage(NET, [m[i] for m in memory.masks]) for i in range(CLIENTS)]
    for name in ("dense1", "dense2"):
        for part in ("kernel", "bias"):
            # A variate that starts at zero becomes the mean gradient: the client moved against it.
            gain = memory.variate[name][part]
            there = [np.asarray(c.params[name][part], float) for c in own]
            num = sum(n * m * -g * k for n, m, g, k in zip(examples, there, gain, length))
            den = sum(n * m for n, m in zip(examples, there))
            expected = START.params[name][part] + num / np.maximum(den, 1)
            np.testing.assert_allclose(
                state.server.variables.params[name][part], expected, rtol=1e-5, atol=1e-6
            )


def test_resumed_with_memories_it_ends_with_the_same_bits(half, tmp_path):
    run = engine(half[1])
    state = run.init(jax.tree.map(jnp.copy, START), jax.random.key(3))
    state, _ = run.run(state)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        fresh = run.init(jax.tree.map(jnp.copy, START), jax.random.key(9))
        _, state = checkpoints.restore(like=fresh)
    for _ in range(2):
        state, _ = run.run(state)
    chex.assert_trees_all_equal(state.server, half[2][0].server)
    chex.assert_trees_all_equal(state.memories, half[2][0].memories)


@pytest.mark.parametrize("method", [None, quantised(4), top_k(0.2)], ids=["full", "4bit", "top_k"])
def test_no_upload_has_the_predictor(half, method):
    algorithm = half[1] if method is None else with_compression(half[1], method)
    (bucket,) = algorithm.buckets
    shapes = client_shapes(bucket, people(), jax.eval_shape(algorithm.init, START))
    upload, _, _ = jax.eval_shape(bucket.client, *shapes)
    paths, _ = jax.tree_util.tree_flatten_with_path(upload)
    names = {getattr(step, "key", None) for path, _ in paths for step in path}
    assert {"dense1", "dense2"} <= names and "dense3" not in names


def test_bytes_are_those_of_the_covered_values(half):
    algorithm, (state, info) = half[1:]
    up = 0
    for client in range(CLIENTS):
        own = coverage(NET, [m[client] for m in state.memories[0].masks])
        sent = sum(int(m.sum()) for name in ("dense1", "dense2") for m in own.params[name].values())
        up += 4 * sent + 20 / 8 + 8
    assert info.spent.bytes_up.sum() == pytest.approx(up)
    costs = client_costs(algorithm, people(), START)
    full = client_costs(make(everything(NET)), people(), START)
    assert round_costs(costs, info)["bytes_up"] == pytest.approx(up)
    assert up < 0.8 * CLIENTS * full[0].bytes_up
    # The predictor does not come down either, after the first time.
    encoder = sum(x.size for n in ("dense1", "dense2") for x in START.params[n].values())
    assert costs[0].bytes_down == 2 * 4 * encoder


def test_the_predictor_stays_at_home(half):
    state = half[2][0]
    own = state.memories[0].predictor.params
    assert set(own) == {"dense3"}
    assert (np.asarray(own["dense3"]["kernel"]).std(0) > 0).any()


def test_a_clients_model_is_within_the_budget_and_as_fast_as_it_says(half):
    select, algorithm, (state, _) = half
    memory = jax.tree.map(lambda x: x[1], state.memories[0])
    variables = algorithm.buckets[0].personal(state.server, memory)
    small = client_model(select, variables, memory)
    dense, now = small.table()["macs"]
    assert now <= 0.5 * dense
    x = jnp.ones((4, 6))
    assert count_flops(small.apply, small.params, x) == 2 * 4 * now
    counted = jax.jit(small.apply).lower(small.params, x).compile().cost_analysis()["flops"]
    assert 2 * 4 * now <= counted < 2 * 4 * now + 4 * 3 * 24  # biases and activations, too
    assert small.apply(small.params, x).shape == (4, 3)


def test_a_clients_model_has_the_statistics_of_its_inputs():
    variables, _ = batch_norm_step()
    x = jax.random.normal(jax.random.key(0), (1, 8, 6)) * 3 + 1
    net = model_network(BATCH_NORM, variables, x[0])
    select = saliency(net, {"macs": 0.5})
    masks, _ = select.choose((), variables, None, None)
    memory = SpatlMemory(None, None, masks, (), 1)
    small = client_model(select, variables, memory, x)
    chex.assert_trees_all_equal(
        small.params.params, client_model(select, variables, memory).params.params
    )
    expected, _ = sliced(net, small.kept, 1)(small.params, x[0])  # by the batch's own statistics
    np.testing.assert_allclose(small.apply(small.params, x[0]), expected, rtol=1e-5, atol=1e-6)


def test_a_repaired_clients_model_is_nearer_to_the_whole_network(half):
    select, algorithm, (state, _) = half
    memory = jax.tree.map(lambda x: x[1], state.memories[0])
    variables = algorithm.buckets[0].personal(state.server, memory)
    x = jnp.asarray(rows(32)["x"]).reshape(2, 16, 6)
    whole = MODEL.apply(variables, x[0])[0]
    plain, mended = (
        client_model(select, variables, memory, x, repaired=repaired) for repaired in (False, True)
    )
    miss = lambda small: float(jnp.square(small.apply(small.params, x[0]) - whole).mean())
    assert miss(mended) < 0.8 * miss(plain)
    with pytest.raises(ValueError, match="inputs"):
        client_model(select, variables, memory, repaired=True)


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_the_threshold_is_the_lowest_that_fits(share):
    scores = importance(NET, START, "l2")
    limits = budgets(NET, macs=share)
    counts = np.asarray(jax.jit(lambda s: threshold_counts(s, NET.sizes, limits))(scores))
    cost = costs(NET).macs
    assert cost(counts) <= share * cost(NET.sizes) * (1 + 1e-6)
    values = [np.asarray(s) / np.asarray(s).mean() for s in scores]
    lower = max(np.sort(v)[::-1][k] if k < len(v) else -1 for v, k in zip(values, counts))
    more = np.array([max((v >= lower).sum(), 1) for v in values])
    assert (counts == NET.sizes).all() or cost(more) > share * cost(NET.sizes)


def test_channels_before_a_norm_go_by_its_scale_and_equal_ones_by_weights():
    variables, _ = batch_norm_step()
    net = model_network(BATCH_NORM, variables, jnp.zeros((4, 6)))
    chosen = lambda kind, v: saliency(net, {"macs": 0.6}, kind=kind).choose((), v, None, None)[0]
    scale = jnp.array([3.0, 0.1, 2.0, 0.2])
    unequal = variables._replace(
        params=variables.params | {"norm": variables.params["norm"] | {"scale": scale}}
    )
    np.testing.assert_array_equal(chosen("auto", unequal)[0], scale > 1)
    chex.assert_trees_all_equal(chosen("auto", variables), chosen("l2", variables))
    scores = importance(net, unequal, "l2_scale")[0]
    expected = importance(net, unequal, "l2")[0] * importance(net, unequal, "scale")[0]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_channels_may_be_chosen_once(half):
    once = make(half[0], select_times=1)
    first = [np.asarray(m) for m in play(once, 1)[0].memories[0].masks]
    later, anew = play(once, 4)[0], play(half[1], 4)[0]
    chex.assert_trees_all_equal(first, [np.asarray(m) for m in later.memories[0].masks])
    assert any((a != np.asarray(b)).any() for a, b in zip(first, anew.memories[0].masks))


def test_statistics_are_averaged_though_nobody_sends_their_channels():
    variables, expected = batch_norm_step()
    select = saliency(model_network(BATCH_NORM, variables, jnp.zeros((4, 6))), {"macs": 0.5})
    algorithm = spatl(
        BATCH_NORM,
        TASK,
        Local(optax.sgd(0.1), 4, 1),
        select,
        num_clients=2,
        total_examples=6.0,
        is_personal=nothing,
    )
    people = population("fed_avg", federation((4, 2)))
    state, _ = run_new(algorithm, people, variables=variables)
    assert not np.asarray(state.memories[0].masks[0]).any(0).all()  # a channel nobody sends
    chex.assert_trees_all_close(state.server.variables.stats, expected, rtol=1e-5, atol=1e-6)


def test_what_is_rounded_travels_as_far_as_it_is_covered(half):
    _, info = play(with_compression(half[1], quantised(8)), 1)
    state, plain = play(half[1], 1)
    up = 0
    for client in range(CLIENTS):
        own = coverage(NET, [m[client] for m in state.memories[0].masks])
        for name in ("dense1", "dense2"):
            # A byte for each value, and the step of a leaf.
            up += sum(m.mean() * (m.size + 4) for m in own.params[name].values())
        up += 20 / 8 + 8
    assert info.spent.bytes_up.sum() == pytest.approx(float(up), rel=1e-5)
    assert up < plain.spent.bytes_up.sum() / 3


@pytest.fixture(scope="module")
def tuned():
    # One policy, trained before, for all clients to start from.
    strategy = gnn_rl(policy_graph(NET, START), batch=4, policy=init_policy(jax.random.key(8)))
    return agent(NET, {"macs": 0.5}, strategy, TASK, rows=16)


def test_an_agent_stays_within_the_budget_and_learns_of_each_client(tuned):
    make_tuned = make(tuned)
    state, _ = play(make_tuned, 2, local_validation=True)
    memory = state.memories[0]
    cost = costs(NET).macs
    for client in range(CLIENTS):
        counts = counts_of(NET, tuple(np.asarray(m[client]) for m in memory.masks))
        assert cost(counts) <= 0.5 * cost(NET.sizes)
        assert (counts == np.asarray(memory.selector.counts[client])).all()
    apart = lambda memory: max(
        float(np.asarray(x).std(0).max()) for x in jax.tree.leaves(memory.selector.strategy.policy)
    )
    first = engine(make_tuned, local_validation=True).init(
        jax.tree.map(jnp.copy, START), jax.random.key(3)
    )
    assert apart(first.memories[0]) < 1e-6 < 1e-3 < apart(memory)


def test_the_search_of_an_agent_counts_once_a_round(half, tuned):
    algorithm = make(tuned)
    (cost,) = client_costs(algorithm, people(local_validation=True), START)
    (plain,) = client_costs(half[1], people(), START)
    assert cost.flops_per_step == plain.flops_per_step > 0
    assert cost.flops_per_round > 6 * plain.flops_per_step / 3 and plain.flops_per_round == 0
    steps, none = np.array([[4.0, 2.0, 2.0, 1.0]]), np.zeros((1, 4))
    status = np.array([[Status.COUNTED] * 3 + [Status.NON_FINITE]])
    sums = lambda value: np.full((1, 1), value, np.float64)
    info = RoundInfo(
        selected=sums(4), counted=sums(3), non_finite=sums(1),
        spent=Spent(sums(9), sums(0), sums(0), sums(0)),
        examples=sums(0), loss_total=sums(0), loss_count=sums(0), extra={},
        cohort=Cohort(np.arange(4)[None], status, steps, none, none, none), server={},
    )  # fmt: skip
    spent = round_costs((cost,), info)["flops"]
    assert spent == 9 * cost.flops_per_step + 4 * cost.flops_per_round
    work = client_work((cost,), np.zeros(5, int), info)
    assert work.flops.sum() == pytest.approx(spent) and work.flops[4] == 0
    assert work.flops[0] - work.flops[3] == pytest.approx(3 * cost.flops_per_step)


def test_an_agent_needs_validation_rows(tuned):
    with pytest.raises(ValueError, match="local_validation"):
        play(make(tuned), 1)


def test_who_comes_late_trains_a_predictor_alone(half):
    state = half[2][0]
    variables = state.server.variables
    data = people().federation
    client = ClientData(data.examples, data.index.padded(0), data.count[0])
    late = jax.jit(train_predictor(MODEL, TASK, LOCAL, is_personal=HEAD))(
        variables, client, jax.random.key(0)
    )
    for name in ("dense1", "dense2"):
        chex.assert_trees_all_equal(late.params[name], variables.params[name])
    loss = lambda v: float(_loss(v, {k: x[:10] for k, x in rows(48).items()}))
    assert loss(late) < loss(variables)


def _loss(variables: Variables, batch) -> jax.Array:
    inputs, targets, weight = TASK.prepare(batch, jax.random.key(0))
    total, count = TASK.loss(MODEL.apply(variables, inputs)[0], targets, weight)
    return total / count


def test_wrong_settings_are_refused():
    for call, message in (
        (lambda: saliency(NET, {"macs": 0.5}, kind="taylor"), "taylor"),
        (lambda: saliency(NET, {"macs": 1e-9}), "cannot be met"),
        (lambda: make(everything(NET), num_clients=0), "num_clients"),
        (lambda: make(everything(NET), select_times=0), "select_times"),
        (lambda: make(everything(NET), is_personal=under("nowhere")), "dense1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
