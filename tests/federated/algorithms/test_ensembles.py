"""What FedDF, FedMD and FedKEMF claim: votes in closed form, traffic, mutual learning, unlabelled
data; the laws that they share with every algorithm are in the contract test."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm import count_parameters
from jaxfm.data.arrays import digits
from jaxfm.data.federation import Federation, federate
from jaxfm.data.partition import dirichlet
from jaxfm.distillation import kl_divergence
from jaxfm.federated.accounting.ledger import client_costs, round_costs
from jaxfm.federated.accounting.metrics import global_metrics
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithm import ClientData, Exact, Mean
from jaxfm.federated.algorithms.fed_df import FedDfState, fed_df
from jaxfm.federated.algorithms.fed_kemf import (
    both_networks,
    fed_kemf,
    fed_kemf_published,
    mutual_objective,
)
from jaxfm.federated.algorithms.fed_md import fed_md
from jaxfm.federated.local import Local
from jaxfm.federated.parts import ensemble
from jaxfm.federated.parts.ensemble import (
    Distill,
    PredictionUpload,
    coverage_vote,
    entropy_vote,
    fusion,
    max_vote,
    mean_vote,
    predict,
    public_inputs,
    ratio,
)
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import compile_rounds
from jaxfm.model import Variables
from jaxfm.models.families.cnn import mlp
from jaxfm.tasks import classification

RNG = np.random.default_rng(0)
KNOWLEDGE, TASK = mlp((6, 4, 3)), classification(3, inputs="x")
OWN = (mlp((6, 8, 3)), mlp((6, 20, 7, 3)))
LOCAL, DISTILL = Local(optax.sgd(0.1), 4, 2), Distill(optax.sgd(0.1), 2, 4)
PUBLIC = {"x": RNG.normal(size=(7, 6)).astype(np.float32)}
LOGITS = RNG.normal(size=(2, 5, 3)).astype(np.float32) * 2  # clients, rows, classes
COUNTS = np.array([[8.0, 0.0, 2.0], [1.0, 5.0, 0.0]], np.float32)
VOTES = {
    "mean": mean_vote(),
    "max": max_vote(),
    "entropy": entropy_vote(),
    "coverage": coverage_vote(3),
}
every_vote = pytest.mark.parametrize("name", VOTES)


def teacher(name: str, logits, counts) -> np.ndarray:
    """What several clients say together."""
    ballots = [VOTES[name].ballot(jnp.asarray(x), jnp.asarray(c)) for x, c in zip(logits, counts)]
    num, den = (sum(part[1:], part[0]) for part in zip(*ballots))
    return np.asarray(VOTES[name].decide(ratio(Mean(num, den))))


def by_hand(name: str) -> np.ndarray:
    log_p = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
    p = np.exp(log_p)
    if name == "mean":
        return LOGITS.mean(0)
    if name == "max":
        return np.log((p**8).mean(0)) / 8
    if name == "entropy":
        certain = np.exp((p * log_p).sum(-1, keepdims=True))
        return (certain * LOGITS).sum(0) / certain.sum(0)
    prior = (COUNTS + 0.5) / (COUNTS + 0.5).sum(-1, keepdims=True)
    share = COUNTS / COUNTS.sum(-1, keepdims=True)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1)
    weight = np.exp(entropy)[:, None, None] - 1 + 1e-3
    return (weight * (log_p - np.log(prior)[:, None])).sum(0) / weight.sum(0)


def people(counts=(6, 3, 4)) -> Population:
    rng = np.random.default_rng(1)
    rows = {
        "x": rng.normal(size=(sum(counts), 6)).astype(np.float32),
        "label": rng.integers(0, 3, sum(counts)).astype(np.int32),
    }
    ends = np.cumsum(counts)
    parts = [np.arange(end - n, end) for end, n in zip(ends, counts)]
    return Population(federate(rows, parts), profiles(len(counts)), np.arange(len(counts)) % 2)


@every_vote
def test_a_vote_is_its_closed_form(name):
    np.testing.assert_allclose(teacher(name, LOGITS, COUNTS), by_hand(name), rtol=1e-4, atol=1e-5)


def test_the_power_mean_is_just_below_the_maximum():
    largest = np.asarray(jax.nn.log_softmax(LOGITS)).max(0)
    gap = largest - teacher("max", LOGITS, COUNTS)
    assert (gap >= 0).all() and gap.max() <= np.log(2) / 8 + 1e-6


@every_vote
def test_identical_clients_say_what_one_says(name):
    one = teacher(name, LOGITS[:1], COUNTS[:1])
    many = teacher(name, LOGITS[[0, 0, 0]], COUNTS[[0, 0, 0]])
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
    if name != "coverage":  # which takes the label frequencies out of it
        chex.assert_trees_all_close(*map(jax.nn.log_softmax, (one, LOGITS[0])), atol=1e-5)


def test_a_client_that_knows_its_own_class_alone_has_no_weight():
    """Where others tell classes apart; and where nobody does, clients still make a teacher."""
    counts = np.array([[9.0, 0.0, 0.0], [5.0, 5.0, 5.0]], np.float32)
    both, second = teacher("coverage", LOGITS, counts), teacher("coverage", LOGITS[1:], counts[1:])
    np.testing.assert_allclose(both, second, atol=0.02)
    assert np.isfinite(teacher("coverage", LOGITS[:1], counts[:1])).all()


def test_class_counts_are_of_real_rows():
    data = ClientData({"label": jnp.array([2, 0, 2, 1])}, jnp.array([0, 2, 3, 0]), jnp.array(2))
    assert VOTES["coverage"].known(data).tolist() == [0, 0, 2]


@every_vote
def test_a_network_that_overflows_has_no_vote(name):
    receive, server = fusion(KNOWLEDGE, TASK, DISTILL, VOTES[name])
    state = FedDfState(KNOWLEDGE.init(jax.random.key(0)))
    move = jax.tree.map(lambda x: 1e30 + 0 * x, (state.variables.params, {}))
    sums = receive(state, PUBLIC, PredictionUpload(move, Exact(jnp.ones(())), Exact(jnp.ones(3))))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(sums.votes))
    absent = sums._replace(move=jax.tree.map(jnp.zeros_like, sums.move))
    after, info = server(state, absent, PUBLIC, jax.random.key(1))
    chex.assert_trees_all_equal(after, state)
    assert info["distill_loss"] == 0


def test_distillation_starts_from_the_average_or_where_it_was():
    """Without a step's length the start is what remains."""
    state = FedDfState(KNOWLEDGE.init(jax.random.key(0)))
    move = jax.tree.map(jnp.ones_like, (state.variables.params, {}))
    still = DISTILL._replace(optimizer=optax.sgd(0.0))
    for average, moved in ((True, 1.0), (False, 0.0)):
        receive, server = fusion(KNOWLEDGE, TASK, still, mean_vote(), average=average)
        sums = receive(state, PUBLIC, PredictionUpload(move, Exact(jnp.asarray(2.0)), Exact(())))
        after, _ = server(state, sums, PUBLIC, jax.random.key(1))
        expected = jax.tree.map(lambda x, m=moved: x + m, state.variables.params)
        chex.assert_trees_all_close(after.variables.params, expected, rtol=1e-6)


def test_labels_of_public_data_are_never_read():
    seen = []

    def prepare(batch, key):
        seen.append(np.asarray(batch["label"]))
        return TASK.prepare(batch, key)

    labelled = PUBLIC | {"label": np.full(7, 2, np.int32)}
    inputs, weight = public_inputs(TASK._replace(prepare=prepare), labelled)
    assert not seen[0].any()
    np.testing.assert_array_equal(inputs, PUBLIC["x"])
    np.testing.assert_array_equal(weight, np.ones(7))


def test_predictions_in_pieces_are_those_of_the_whole(monkeypatch):
    variables = KNOWLEDGE.init(jax.random.key(0))
    whole = predict(KNOWLEDGE, variables, jnp.asarray(PUBLIC["x"]))
    monkeypatch.setattr(ensemble, "_CHUNK", 3)
    pieces = predict(KNOWLEDGE, variables, jnp.asarray(PUBLIC["x"]))
    np.testing.assert_allclose(pieces, whole, rtol=1e-5)


def test_mutual_learning_does_not_teach_the_teacher():
    """The gradient of each network is that of its own loss and of the KL in which it learns."""
    networks = {"own": OWN[0], "knowledge": KNOWLEDGE}
    variables = both_networks(*(m.init(jax.random.key(3)) for m in networks.values()))
    params = variables.params
    batch = {"x": PUBLIC["x"], "label": np.array([0, 1, 2, 0, 1, 2, 0])}
    real = jnp.asarray([1.0] * 5 + [0.0] * 2)
    loss = mutual_objective(KNOWLEDGE, OWN[0], TASK, 0.7)
    grads = jax.grad(loss, has_aux=True)(params, variables, batch, real, None)[0]
    apply = lambda name, p: networks[name].apply(Variables(p, {}, {}), batch["x"])[0]
    for student, other in (("own", "knowledge"), ("knowledge", "own")):
        fixed = apply(other, params[other])

        def alone(p, student=student, fixed=fixed):
            logits = apply(student, p)
            total, count = TASK.loss(logits, batch["label"], real)
            return (total + 0.7 * kl_divergence(fixed, logits, real)[0]) / count

        expected = jax.grad(alone)(params[student])
        chex.assert_trees_all_close(grads[student], expected, rtol=1e-4, atol=1e-6)


def test_traffic_is_the_knowledge_networks_whatever_the_clients_own():
    variables = KNOWLEDGE.init(jax.random.key(0))
    size = 4 * count_parameters(variables.params)
    for extra, vote in ((0, None), (4 * 3, coverage_vote(3))):
        algorithm = fed_kemf(KNOWLEDGE, TASK, LOCAL, OWN, DISTILL, vote=vote)
        first, second = client_costs(algorithm, people(), variables, PUBLIC)
        assert first.bytes_down == second.bytes_down == size
        assert first.bytes_up == second.bytes_up == size + 4 + extra
        assert first.parameters < second.parameters


def test_fed_md_sends_only_logits():
    algorithm = fed_md(OWN, TASK, LOCAL, LOCAL, logits=(7, 3))
    population = people()
    costs = client_costs(algorithm, population, Variables({}, {}, {}), PUBLIC)
    assert {(c.bytes_up, c.bytes_down) for c in costs} == {(7 * 3 * 4, 7 * 3 * 4)}
    _, infos = run(algorithm, population, 2)
    assert [info.extra["digest_steps"][0] for info in infos] == [
        0,
        3 * 2 * 2,
    ]  # after the first round
    # An MLP's step costs 3 passes, but for the gradient of the inputs; the prediction one.
    passes = [2 * (6 * 8 + 8 * 3), 2 * (6 * 20 + 20 * 7 + 7 * 3)]
    step = [4 * (3 * p - 2 * 6 * h) for p, h in zip(passes, (8, 20))]
    steps = np.array([4 + 2, 2])  # of clients 0 and 2, and of client 1
    expected = steps * step + np.array([2, 1]) * 7 * passes
    np.testing.assert_allclose(infos[0].spent.flops[0], expected)
    assert round_costs(costs, infos[0])["flops"] == expected.sum()


def run(algorithm, population: Population, calls: int = 1, variables=None, public=PUBLIC):
    engine = compile_rounds(
        algorithm, population, cohort_size=len(population.bucket), public=public
    )
    variables = Variables({}, {}, {}) if variables is None else variables
    state, infos = engine.init(variables, jax.random.key(3)), []
    for _ in range(calls):
        state, info = engine.run(state)
        infos.append(jax.device_get(info))
    return state, infos


def test_clients_of_fed_md_come_to_agree():
    """With nothing of their own to learn they approach the consensus, which stays near by."""
    still, digest = Local(optax.sgd(0.0), 4), Local(optax.sgd(0.03), 7, 10)
    population = people()
    algorithm = fed_md(OWN, TASK, still, digest, logits=(7, 3))
    engine = compile_rounds(algorithm, population, cohort_size=3, public=PUBLIC)
    state = engine.init(Variables({}, {}, {}), jax.random.key(3))

    def gap(state) -> float:
        said = [
            predict(model, jax.tree.map(lambda x, i=i: x[i], memory), jnp.asarray(PUBLIC["x"]))
            for model, memory, n in zip(OWN, state.memories, (2, 1))
            for i in range(n)
        ]
        np.testing.assert_allclose(state.server.consensus, sum(said) / 3, rtol=1e-4, atol=1e-5)
        return float(sum(jnp.abs(x - state.server.consensus).mean() for x in said))

    state, _ = engine.run(state)
    before = gap(state)
    for _ in range(3):
        state, _ = engine.run(state)
    assert gap(state) < 0.6 * before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: max_vote(0.0), "sharpness=0.0 must be positive"),
        (lambda: fed_df(KNOWLEDGE, TASK, LOCAL, DISTILL._replace(steps=0)), "at least 1 .* got 0"),
        (lambda: fed_kemf(KNOWLEDGE, TASK, LOCAL, [], DISTILL), "needs at least one model"),
        (lambda: fed_kemf(KNOWLEDGE, TASK, LOCAL, OWN, DISTILL, mutual=-1.0), "at least 0"),
        (lambda: fed_md([], TASK, LOCAL, LOCAL, logits=(7, 3)), "needs at least one model"),
        (
            lambda: run(fed_df(KNOWLEDGE, TASK, LOCAL, DISTILL), people((3,)), public=None),
            r"give compile_rounds\(public=",
        ),
        (
            lambda: run(fed_md(OWN, TASK, LOCAL, LOCAL, logits=(5, 3)), people((3,))),
            r"7 public examples; .* \(5, 3\)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def non_iid_digits() -> tuple[Federation, dict, dict]:
    """(clients, public inputs, validation rows): ten clients of few classes."""
    data = digits()
    train = data["train"].examples
    private = {name: leaf[400:] for name, leaf in train.items()}
    parts = dirichlet(private["label"], 10, beta=0.1, seed=0, min_examples=8)
    return federate(private, parts), {"image": train["image"][:400]}, data["validation"].examples


@pytest.mark.slow
def test_distillation_beats_averaging_on_clients_of_few_classes():
    """Half of the clients a round; the mean of the last three of six rounds. Averaging scores 24
    points less over three partitions, this one included."""
    clients, public, validation = non_iid_digits()
    knowledge, own, task = mlp((64, 24, 10)), mlp((64, 48, 10)), classification(10)
    local = Local(optax.sgd(0.05, momentum=0.9), 16, 3)
    how = Distill(optax.adam(3e-3), 100, 64)
    population = Population(clients, profiles(10), np.zeros(10, int))
    algorithm = fed_kemf(knowledge, task, local, [own], how, vote=coverage_vote(10))
    accuracy = {}
    for name, data in (("average", None), ("distilled", public)):
        engine = compile_rounds(algorithm, population, cohort_size=5, public=data)
        state, scores = engine.init(knowledge.init(jax.random.key(0)), jax.random.key(1)), []
        for _ in range(6):
            state, _ = engine.run(state)
            figures = global_metrics(algorithm, state, task, validation, batch_size=250)
            scores.append(figures["accuracy"])
        accuracy[name] = np.mean(scores[3:])
    assert accuracy["distilled"] > accuracy["average"] + 0.1, accuracy


def test_as_published_the_last_knowledge_is_the_start():
    still = DISTILL._replace(optimizer=optax.sgd(0.0))
    before = KNOWLEDGE.init(jax.random.key(0))
    state, infos = run(fed_kemf_published(KNOWLEDGE, TASK, LOCAL, OWN, still), people(), 1, before)
    chex.assert_trees_all_equal(state.server.variables, KNOWLEDGE.init(jax.random.key(0)))
    assert infos[0].counted.sum() == 3
