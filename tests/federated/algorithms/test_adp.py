"""What ADP claims: budgets met by construction, gates of the client's own data, real slices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm.data.federation import federate
from jaxfm.federated.accounting.metrics import client_metrics
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithm import Algorithm, ClientData
from jaxfm.federated.algorithms.adp import adp, calibrated, extracted, kept_channels
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.local import Local
from jaxfm.federated.parts.channel_gates import Gates, activity, channel_gates
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import compile_rounds
from jaxfm.federated.wrappers.compression import quantised, with_compression
from jaxfm.models.families.cnn import mlp
from jaxfm.search.trace.cost import costs, counts_of
from jaxfm.search.trace.groups import network
from jaxfm.search.trace.interpret import coverage, cut, full, place
from jaxfm.search.trace.models import model_network
from jaxfm.tasks import classification
from jaxfm.testing import random_variables, tiny_cnn

MODEL, TASK = mlp((6, 12, 10, 3)), classification(3, inputs="x")
LOCAL = Local(optax.sgd(0.1), 4, 2)
VARIABLES = random_variables(MODEL)
NETWORK = model_network(MODEL, VARIABLES, jnp.ones((1, 6)))
MACS = costs(NETWORK).macs
DENSE = float(MACS(NETWORK.sizes.astype(np.int64)))
SIZES = (7, 4, 0, 5, 3)
RAMP = 3
every_kind_of_gate = pytest.mark.parametrize(
    "federated", [False, True], ids=["personal", "federated"]
)


def make(federated: bool = False, local: Local = LOCAL, **options) -> tuple[Gates, Algorithm]:
    options = {"batch_size": local.batch_size, "rounds": RAMP} | options
    gates = channel_gates(NETWORK, TASK, **options)
    return gates, adp(MODEL, TASK, local, gates, federated_gates=federated)


def population() -> Population:
    """Clients that see two of the six inputs each; the third one is empty."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(5), SIZES)
    label = rng.integers(0, 3, len(owner)).astype(np.int32)
    x = (rng.normal(size=(len(owner), 6)) + 2 * label[:, None]).astype(np.float32)
    x *= np.arange(6) // 2 == owner[:, None] % 3
    parts = [np.flatnonzero(owner == client) for client in range(5)]
    return Population(federate({"x": x, "label": label}, parts), profiles(5), np.zeros(5, np.int32))


def examples(client: int) -> dict[str, np.ndarray]:
    data = population().federation
    rows = data.rows_of(client)
    return {name: leaf[rows] for name, leaf in data.examples.items()}


def start(engine):
    return engine.init(jax.tree.map(jnp.copy, VARIABLES), jax.random.key(3))


class Run:
    """Four rounds of all clients; what was there before each of them and at the end."""

    def __init__(self, **options):
        self.gates, self.algorithm = make(**options)
        self.engine = compile_rounds(self.algorithm, population(), cohort_size=5)
        self.state = start(self.engine)
        look = lambda: jax.device_get((self.state.server, self.state.memories[0]))
        self.seen, self.infos = [look()], []
        for _ in range(RAMP + 1):
            self.state, info = self.engine.run(self.state)
            self.seen.append(look())
            self.infos.append(jax.device_get(info))

    def kept(self, number: int, client: int, **changes):
        server, memories = self.seen[number]
        own = jax.tree.map(lambda x: x[client], memories)
        return jax.device_get(kept_channels(self.gates, server._replace(**changes), own))


run = functools.cache(Run)


def macs(kept) -> float:
    return float(MACS(counts_of(NETWORK, kept)))


@pytest.mark.parametrize(
    "federated",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["personal", "federated"],
)
def test_a_target_of_one_is_fed_avg(federated):
    ends = []
    for algorithm in (fed_avg(MODEL, TASK, LOCAL), make(target=1.0, federated=federated)[1]):
        engine = compile_rounds(algorithm, population(), cohort_size=3, num_rounds=RAMP + 2)
        ends.append(engine.run(start(engine))[0].server.variables)
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)


@every_kind_of_gate
def test_widths_follow_the_cubic_schedule_to_a_maximal_network_within_the_budget(federated):
    for client in range(5):
        widths = [
            counts_of(NETWORK, run(federated=federated).kept(-1, client, round=np.int32(t)))
            for t in range(RAMP + 3)
        ]
        final = widths[RAMP]
        for t, counts in enumerate(widths):
            left = max(1 - t / RAMP, 0) ** 3
            np.testing.assert_array_equal(counts, final + np.round(left * (NETWORK.sizes - final)))
        assert float(MACS(final)) <= 0.5 * DENSE
        for one_more in final + np.eye(len(final), dtype=np.int64):
            assert float(MACS(one_more)) > 0.5 * DENSE or (one_more > NETWORK.sizes).any()


def test_clients_narrow_round_by_round_and_send_less():
    spent = np.array([[macs(run().kept(t, c)) for c in range(5)] for t in range(RAMP + 2)])
    assert (spent[0] == DENSE).all() and (spent[RAMP:] <= 0.5 * DENSE).all()
    assert (np.diff(spent[: RAMP + 1], axis=0) <= 0).all()
    sent = [info.spent.bytes_up.sum() for info in run().infos]
    dense = sum(x.size * 4 for x in jax.tree.leaves((VARIABLES.params, VARIABLES.stats))) + 4
    assert sent[0] == 4 * (dense + NETWORK.sizes.sum() / 8) > sent[1] > sent[RAMP]
    counts, batch = np.asarray(population().federation.count), LOCAL.batch_size
    steps = LOCAL.epochs * -(-counts // batch)
    for t, info in enumerate(run().infos):
        # By the scores of this very round, which are what a client remembers after it.
        row = np.array([macs(run().kept(t + 1, c, round=np.int32(t))) for c in range(5)])
        # Forward and back through the slice, and one look at all rows through the dense network.
        flops = (6 * row * steps * batch + 2 * DENSE * counts)[counts > 0].sum()
        assert info.spent.flops.sum() == pytest.approx(flops, rel=1e-5)
    assert [s.round for s, _ in run().seen] == list(range(RAMP + 2))


def test_what_is_rounded_is_smaller_on_the_wire_and_lands_where_it_is_covered():
    algorithm = with_compression(make()[1], quantised(8))
    engine = compile_rounds(algorithm, population(), cohort_size=5)
    state, info = engine.run(start(engine))
    assert 0 < info.spent.bytes_up.sum() < 0.4 * run().infos[0].spent.bytes_up.sum()
    server, reference = state.server.variables, run().seen[1][0].variables
    chex.assert_trees_all_close(server.params, reference.params, atol=0.02)


def test_scores_are_mean_activations_of_the_clients_own_examples():
    """By hand: |x| where it enters a layer, relative to the layer's mean, over real rows alone."""
    p, x = jax.device_get(VARIABLES.params), examples(0)["x"]
    first = np.maximum(x @ p["dense1"]["kernel"] + p["dense1"]["bias"], 0)
    second = np.maximum(first @ p["dense2"]["kernel"] + p["dense2"]["bias"], 0)
    hand = [(h / h.mean(-1, keepdims=True)).mean(0) for h in (first, second)]
    found = jax.tree.map(lambda s: s[0], run().seen[0][1])
    by_size = lambda scores: {len(s): np.asarray(s) for s in scores}
    chex.assert_trees_all_close(by_size(found), by_size(hand), rtol=1e-5, atol=1e-6)
    padded = ClientData(examples(0), np.zeros(9, np.int32), jnp.int32(0))
    silent = jax.jit(activity(NETWORK, TASK, 4))(VARIABLES, padded)
    assert all((s == 0).all() for s in silent)


def test_personal_gates_follow_the_data_and_federated_ones_are_shared():
    flat = lambda kept: np.concatenate(kept)
    own = [flat(run().kept(-1, c)) for c in range(5)]
    assert (own[0] != own[1]).any() and (own[1] != own[4]).any()
    shared = [flat(run(federated=True).kept(-1, c)) for c in range(5)]
    assert all((gates == shared[0]).all() for gates in shared)


def test_federated_scores_are_the_mean_by_examples():
    state = run(federated=True).seen[1][0]
    own = run().seen[0][1]  # both start from the same variables
    weights = np.array(SIZES) / sum(SIZES)
    expected = tuple(np.tensordot(weights, s, 1) for s in own)
    chex.assert_trees_all_close(state.scores, expected, rtol=1e-5, atol=1e-6)


def test_an_unseen_client_is_calibrated_by_its_data_alone():
    """It gets what the same client would have found in the run, and needs no round for it."""
    server, _ = run().seen[-1]
    again, _ = run().engine.run(run().engine.init(server.variables, jax.random.key(0)))
    scores = calibrated(run().gates, server, examples(3))
    chex.assert_trees_all_close(scores, jax.tree.map(lambda s: s[3], again.memories[0]), rtol=1e-5)
    kept = jax.device_get(kept_channels(run().gates, server, scores))
    assert macs(kept) <= 0.5 * DENSE
    shared = run(federated=True).gates
    server = run(federated=True).seen[-1][0]
    own = kept_channels(shared, server, calibrated(shared, server, examples(3)))
    assert any((a != b).any() for a, b in zip(own, kept_channels(shared, server)))


def test_the_extracted_model_is_the_masked_one_and_costs_what_it_says():
    server, memories = run().seen[-1]
    own = jax.tree.map(lambda s: s[1], memories)
    small = extracted(run().gates, server, own)
    bucket = run().algorithm.buckets[0]
    x = jnp.asarray(population().federation.examples["x"])
    masked = bucket.model.apply(bucket.personal(server, own), x)[0]
    chex.assert_trees_all_close(small.apply(small.params, x), masked, atol=1e-5)
    widths = dict(
        zip([g.name.split("/")[1] for g in NETWORK.groups], counts_of(NETWORK, small.kept))
    )
    a, b = widths["dense1"], widths["dense2"]
    assert small.params.params["dense1"]["kernel"].shape == (6, a)
    assert small.params.params["dense2"]["kernel"].shape == (a, b)
    assert 6 * a + a * b + b * 3 == small.table()["macs"][1] <= 0.5 * DENSE


def test_a_coordinate_is_the_mean_of_those_who_keep_it_and_else_does_not_move():
    """Decay would move all of them. Alone, each client shows what it adds to the mean."""
    decay = optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.1))
    gates, algorithm = make(target=0.2, rounds=1, local=Local(decay, 4, 1))
    engine, people = compile_rounds(algorithm, population(), cohort_size=5), population()

    def movement(counts):
        state = start(engine)
        state = state._replace(server=state.server._replace(round=state.server.round + 1))
        own = people.federation._replace(count=np.asarray(counts, np.int32))
        after = engine.run(state, people._replace(federation=own))[0].server.variables.params
        return jax.tree.map(lambda a, b: np.asarray(a - b), after, VARIABLES.params)

    server, memories = jax.device_get(start(engine)[:2])
    server = server._replace(round=np.int32(1))
    num = den = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), VARIABLES.params)
    for client, size in enumerate(SIZES):
        kept = kept_channels(gates, server, tuple(s[client] for s in memories[0]))
        weight = jax.tree.map(lambda m, n=size: n * np.asarray(m), coverage(NETWORK, kept).params)
        alone = movement(np.where(np.arange(5) == client, SIZES, 0))
        num = jax.tree.map(lambda a, w, d: a + w * d, num, weight, alone)
        den = jax.tree.map(np.add, den, weight)
    expected = jax.tree.map(lambda a, b: a / np.maximum(b, 1), num, den)
    together = movement(SIZES)
    chex.assert_trees_all_close(together, expected, rtol=1e-4, atol=1e-6)
    still = jax.tree.map(lambda d, m: (d == 0) == (m == 0), together, den)
    assert all(x.all() for x in jax.tree.leaves(still))
    shares = {float(n) for leaf in jax.tree.leaves(den) for n in leaf.flat}
    assert 0 in shares and len(shares) > 2, "coverage does not differ"


def test_an_empty_client_keeps_its_memory_and_can_be_evaluated():
    chex.assert_trees_all_equal(*(jax.tree.map(lambda s: s[2], run().seen[i][1]) for i in (0, -1)))
    measure = client_metrics(
        run().algorithm, population().bucket, TASK, batch_size=4, key=jax.random.key(0)
    )
    loss = measure(run().state, population().federation)["loss"]
    assert np.isnan(loss[2]) and np.isfinite(np.delete(loss, 2)).all()


def two_layers():
    """A residual loop over two layers, each with six units of its own; the stream has four."""
    draw = np.random.default_rng(0).normal
    params = {
        "read": draw(size=(6, 4)).astype(np.float32),
        "up": draw(size=(2, 4, 6)).astype(np.float32),
        "down": draw(size=(2, 6, 4)).astype(np.float32),
        "write": draw(size=(4, 3)).astype(np.float32),
    }

    def layer(x, w):
        return x + jax.nn.relu(x @ w[0]) @ w[1], None

    def evaluate(p, x):
        return jax.lax.scan(layer, x @ p["read"], (p["up"], p["down"]))[0] @ p["write"]

    return params, network(evaluate, params, jnp.ones((1, 6)))


def test_layers_of_a_loop_have_scores_and_coverage_of_their_own():
    params, net = two_layers()
    x = examples(0)["x"]
    data = ClientData({"x": x, "label": examples(0)["label"]}, np.arange(7), jnp.int32(7))
    stream, hand = x @ params["read"], []
    for up, down in zip(params["up"], params["down"]):
        hidden = np.maximum(stream @ up, 0)
        hand.append((hidden / hidden.mean(-1, keepdims=True)).mean(0))
        stream = stream + hidden @ down
    found = {s.shape: s for s in jax.jit(activity(net, TASK, 4))(params, data)}
    chex.assert_trees_all_close(found[2, 6], np.stack(hand), rtol=1e-5, atol=1e-6)
    rng = np.random.default_rng(0)
    kept = tuple(rng.permuted(np.indices(m.shape)[-1] % 2 == 0, axis=-1) for m in full(net))
    expected = place(net, cut(net, jax.tree.map(jnp.ones_like, params), kept), kept)
    chex.assert_trees_all_equal(coverage(net, kept), jax.tree.map(lambda x: x > 0, expected))


def test_coverage_is_what_a_cut_keeps():
    """Of convolutions, and where a channel becomes several columns of a dense layer."""
    variables = random_variables(tiny_cnn())
    net = model_network(tiny_cnn(), variables, jnp.ones((1, 8, 8, 1)))
    kept = tuple(np.indices(m.shape)[-1] % 3 > 0 for m in full(net))
    expected = place(net, cut(net, jax.tree.map(jnp.ones_like, variables), kept), kept)
    chex.assert_trees_all_equal(coverage(net, kept), jax.tree.map(lambda x: x > 0, expected))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": 0.0}, r"target=0.0 must be in \(0, 1\]"),
        ({"target": 2}, r"target=2 must be in \(0, 1\]"),
        ({"target": 0.01}, "cannot be met"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_network_without_a_training_function_is_refused():
    alone = network(lambda v, x: MODEL.apply(v, x)[0], VARIABLES, jnp.ones((1, 6)))
    with pytest.raises(ValueError, match="no training function"):
        channel_gates(alone, TASK, batch_size=4)
