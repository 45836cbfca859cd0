"""What RaFL claims: members within every client's budget, chosen on validation rows, and fusion."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm import count_parameters
from jaxfm.data.federation import federate
from jaxfm.distillation import kl_divergence
from jaxfm.federated.accounting.ledger import client_costs
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithms.rafl import (
    client_limits,
    entropy_divergence,
    plan_members,
    rafl,
    rafl_published,
    tiers,
    validation_search,
)
from jaxfm.federated.local import Local
from jaxfm.federated.parts.ensemble import Distill
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import compile_rounds
from jaxfm.models.families.cnn import mlp
from jaxfm.search.elastic.supernet import supernet
from jaxfm.search.strategies.project import Budget
from jaxfm.tasks import classification

MODEL, TASK = mlp((6, 32, 16, 3)), classification(3, inputs="x")
LOCAL, DISTILL = Local(optax.sgd(0.1), 4), Distill(optax.sgd(0.1), 2, 4)
NET = supernet(
    MODEL, MODEL.init(jax.random.key(0)), ("hidden1", "hidden2"), channel_multiple=2, smallest=0.125
)
PUBLIC = {"x": np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)}
LARGEST = count_parameters(NET.variables.params)


def latency(counts):
    """Milliseconds on some machine: one for each layer, and one for each eight channels."""
    return 2.0 + jnp.ceil(counts / 8).sum()


def budgets(parameters, milliseconds) -> list[Budget]:
    return [
        Budget("parameters", NET.parameters, np.asarray(parameters, np.float64)),
        Budget("milliseconds", latency, np.asarray(milliseconds, np.float64)),
    ]


def some_budgets(num_clients: int = 12) -> list[Budget]:
    rng = np.random.default_rng(2)
    return budgets(
        LARGEST * rng.uniform(0.12, 1.2, num_clients), rng.uniform(4.0, 9.0, num_clients)
    )


def plan(given, **options):
    return plan_members(NET, MODEL, given, **options)


def make(members):
    return rafl(MODEL, TASK, LOCAL, members, DISTILL)


@pytest.fixture(scope="module")
def members():
    return plan(some_budgets())


def test_every_client_is_within_its_budgets(members):
    given = some_budgets()
    limits = client_limits(given)
    for client, bucket in enumerate(members.assignment):
        counts = jnp.asarray(members.counts[bucket], jnp.float32)
        for budget, limit in zip(given, limits[client]):
            assert float(budget.cost(counts)) <= limit * (1 + 1e-6)
    assert 1 < len(members.counts) <= 3
    assert len({tuple(counts) for counts in members.counts}) == len(make(members).buckets)


def test_clients_train_the_member_they_were_given_and_send_the_smallest(members):
    algorithm = make(members)
    np.testing.assert_array_equal(algorithm.assignment, members.assignment)
    num_clients, start = len(algorithm.assignment), algorithm.model.init(jax.random.key(0))
    x = np.zeros((num_clients, 6), np.float32)
    data = federate({"x": x, "label": np.zeros(num_clients, np.int32)}, np.arange(12)[:, None])
    people = Population(data, profiles(num_clients), algorithm.assignment)
    costs = client_costs(algorithm, people, start, PUBLIC)
    smallest = int(NET.parameters(jnp.asarray(NET.smallest, jnp.float32)))
    assert count_parameters(start.params) == smallest
    for cost, counts in zip(costs, members.counts):
        assert cost.parameters == int(NET.parameters(jnp.asarray(counts, jnp.float32)))
        assert (cost.bytes_down, cost.bytes_up) == (4 * smallest, 4 * smallest + 4)
    engine = compile_rounds(algorithm, people, cohort_size=num_clients, public=PUBLIC)
    _, info = engine.run(engine.init(start, jax.random.key(0)))
    assert info.counted.sum() == num_clients and np.isfinite(info.server["distill_loss"]).all()


def test_members_inherit_the_supernets_weights_or_start_anew():
    one = budgets([LARGEST], [9.0])
    search = lambda budgets, clients: np.array([8, 4])
    first = lambda members: make(members).buckets[0].model.init(jax.random.key(1))
    cut = NET.extract(NET.variables, np.array([8, 4]))
    for scratch, same in ((None, True), (jax.random.key(5), False)):
        own = first(plan(one, search=search, scratch=scratch))
        kernels = [v.params["dense2"]["kernel"] for v in (own, cut)]
        assert kernels[0].shape == (8, 4)
        assert np.array_equal(*kernels) == same


@pytest.mark.parametrize("num_tiers", [1, 2, 3, 9])
def test_tiers_lose_least(num_tiers):
    share = np.random.default_rng(num_tiers).uniform(0.1, 1, 7)
    share[3] = share[5]
    loss = lambda tier: sum(
        np.log(share[tier == t] / share[tier == t].min()).sum() for t in np.unique(tier)
    )
    tier = tiers(share, num_tiers)
    assert len(np.unique(tier)) == min(num_tiers, 6) == tier.max() + 1
    assert (np.diff(tier[np.argsort(share)]) >= 0).all()
    order = np.argsort(share)
    best = np.inf
    for cuts in itertools.combinations(range(1, 7), min(num_tiers, 6) - 1):
        other = np.empty(7, int)
        other[order] = np.searchsorted(cuts, np.arange(7), side="right")
        best = min(best, loss(other))
    np.testing.assert_allclose(loss(tier), best, atol=1e-9)


def test_the_search_reads_validation_rows_of_the_tier_alone():
    rng = np.random.default_rng(3)
    label = rng.integers(0, 3, 40).astype(np.int32)
    x = (rng.normal(size=(40, 6)) + label[:, None]).astype(np.float32)
    x[:20] = np.nan  # rows to train on, and validation rows of client 0
    validation = federate({"x": x, "label": label}, [np.arange(10, 20), np.arange(20, 40)])
    search = validation_search(
        NET, MODEL, TASK, validation, jax.random.key(0), population=8, generations=2
    )
    own = [Budget("parameters", NET.parameters, 0.5 * LARGEST)]
    counts = search(own, np.array([1]))
    score = lambda counts: TASK.loss(
        MODEL.apply(NET.extract(NET.variables, counts), x[20:])[0], label[20:], jnp.ones(20)
    )[0]
    shrunk = NET.members(own)[0]
    assert float(NET.parameters(jnp.asarray(counts, jnp.float32))) <= 0.5 * LARGEST
    assert score(counts) <= score(shrunk)
    nobody = federate({"x": x, "label": label}, [np.array([], int), np.arange(20, 40)])
    with pytest.raises(ValueError, match=r"Clients \[0\] have no validation rows"):
        validation_search(NET, MODEL, TASK, nobody, jax.random.key(0))(own, np.array([0]))


def test_the_published_fusion_maximises_entropy_and_ours_does_not():
    rng = np.random.default_rng(0)
    teacher, student = (jnp.asarray(rng.normal(size=(20, 10)) * 3, jnp.float32) for _ in range(2))
    ones, heat = jnp.ones(20), 20.0

    def negative_entropy(logits):
        log_p = jax.nn.log_softmax(logits / heat)
        return (jnp.exp(log_p) * log_p).sum()

    gradient = lambda f: jax.grad(f)(student).reshape(-1)
    cosine = lambda a, b: float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))
    entropy = gradient(negative_entropy)
    published = gradient(lambda s: entropy_divergence(teacher, s, ones, heat)[0])
    ours = gradient(lambda s: kl_divergence(teacher, s, ones, heat)[0])
    assert cosine(published, entropy) > 0.999
    assert cosine(ours, entropy) < 0.9


def test_the_published_variant_is_a_variant():
    members = plan(budgets([LARGEST], [9.0]), search=lambda budgets, clients: np.array([8, 4]))
    algorithm = rafl_published(MODEL, TASK, LOCAL, members, DISTILL)
    assert members.counts.tolist() == [[8, 4]] and algorithm.assignment.tolist() == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan([]), "at least one budget"),
        (lambda: plan(budgets([LARGEST, LARGEST], [9.0] * 3)), r"Limits have shapes .*\(3,\)"),
        (lambda: plan(budgets(LARGEST, 9.0)), "one number for each client"),
        (
            lambda: plan(budgets([LARGEST, 10.0], [9.0, 9.0])),
            "Client 1 allows 10 parameters; the smallest member costs",
        ),
        (lambda: plan(some_budgets(), num_tiers=0), "num_tiers must be at least 1, got 0"),
        (
            lambda: plan(budgets([0.5 * LARGEST], [9.0]), search=lambda *_: NET.largest),
            r"The search gave \[32, 16\] for clients \[0\]",
        ),
    ],
)
def test_what_cannot_work_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
