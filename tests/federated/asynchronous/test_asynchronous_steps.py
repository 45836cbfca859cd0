"""Asynchronous server steps against NumPy and against synchronous rounds."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm.data.federation import federate
from jaxfm.federated import Local, Population, compile_rounds, fed_avg, profiles, scaffold
from jaxfm.federated.algorithm import Algorithm, Bucket, Info, Spent, mean, weighted
from jaxfm.federated.algorithms.fed_avg import FedAvgState
from jaxfm.federated.asynchronous import (
    buffered,
    compile_asynchronous,
    constant,
    hinge,
    polynomial,
    synchronous,
)
from jaxfm.federated.averaging import difference, moved, send_variables
from jaxfm.model import Variables
from jaxfm.models.families.cnn import mlp
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tasks import classification

CLIENTS, LR = 7, 0.3
TARGETS = np.random.default_rng(0).normal(size=(CLIENTS, 3)).astype(np.float32)
SIZES = np.arange(1, CLIENTS + 1)
SECONDS = np.array([1.0, 1.3, 2.1, 3.7, 5.0, 8.0, 13.0])


def toy() -> Algorithm:
    """Clients that go LR of the way to their target and count their visits."""

    def client(download, memory, data, profile, key):
        target = data.examples["t"][data.index[0]]
        step = lambda x: x + LR * (target - x)
        trained = download._replace(params=jax.tree.map(step, download.params))
        size = data.count.astype(jnp.float32)
        upload = weighted(size, difference(trained, download))
        zero = jnp.zeros(())
        return upload, memory + 1, Info(Spent(zero), size, zero, zero)

    def server(state, totals, public, key):
        return FedAvgState(moved(state.variables, mean(totals))), {}

    start = lambda download, data, profile, key: jnp.zeros((), jnp.int32)
    return Algorithm(FedAvgState, (Bucket(None, send_variables, client, start),), server)


def origin() -> Variables:
    return Variables({"x": jnp.zeros(3)}, {}, {})


def people() -> Population:
    rows = np.repeat(np.arange(CLIENTS), SIZES)
    data = federate({"t": TARGETS[rows]}, [np.flatnonzero(rows == c) for c in range(CLIENTS)])
    return Population(data, profiles(CLIENTS), np.zeros(CLIENTS, np.int32))


def by_numpy(plan, weigh, rate, mixes_models):
    """The papers' algorithms, line by line."""
    sent = [np.zeros(3)]
    for clients, versions in zip(plan.client, plan.version, strict=True):
        now, num, den = sent[-1], np.zeros(3), 0.0
        for client, version in zip(clients, versions, strict=True):
            if client < 0:
                continue
            begun = sent[version]
            trained = begun + LR * (TARGETS[client] - begun)
            movement = trained - (now if mixes_models else begun)
            behind = len(sent) - 1 - version
            num += rate * weigh(behind) * SIZES[client] * movement
            den += SIZES[client]
        sent.append(now + num / den)
    return sent[-1]


@pytest.mark.parametrize(
    ("places", "staleness", "weigh", "rate", "mixes_models", "devices"),
    [
        (3, polynomial(0.5), lambda t: (1 + t) ** -0.5, 1.0, False, 2),
        (1, hinge(10, 2), lambda t: 1 / (10 * max(t - 2, 0) + 1), 0.6, True, 1),
        (2, constant(), lambda t: 1.0, 0.9, True, 1),
    ],
    ids=["fed_buff", "fed_async", "models of two"],
)
def test_steps_are_the_papers_algorithms(places, staleness, weigh, rate, mixes_models, devices):
    plan = buffered(SECONDS, concurrency=5, buffer_size=places, num_steps=25, jitter=0.2, seed=2)
    assert plan.behind.max() > 2
    rounds = compile_asynchronous(
        toy(), people(), plan, num_rounds=5, staleness=staleness, rate=rate,
        mixes_models=mixes_models,
        mesh=make_mesh(clients=devices, devices=jax.devices()[:devices]),
    )  # fmt: skip
    state = rounds.init(origin(), jax.random.key(0))
    infos = []
    for _ in range(5):
        state, info = rounds.run(state)
        infos.append(info)
    expected = by_numpy(plan, weigh, rate, mixes_models)
    np.testing.assert_allclose(state.server.variables.params["x"], expected, atol=1e-5)
    visits = np.bincount(plan.client.ravel(), minlength=CLIENTS)
    np.testing.assert_array_equal(state.memories[0], visits)
    column = lambda name: np.concatenate([info.server[name] for info in infos])
    np.testing.assert_allclose(column("staleness"), plan.behind.mean(1), rtol=1e-5)
    np.testing.assert_allclose(column("seconds").cumsum(), plan.seconds, rtol=1e-5)
    np.testing.assert_array_equal(infos[0].cohort.client, plan.client[:5])


def test_a_round_with_empty_places_counts_those_that_came():
    plan = synchronous(SECONDS, cohort_size=4, num_steps=6, deadline_s=4.0, seed=1)
    assert (plan.client < 0).any()
    rounds = compile_asynchronous(toy(), people(), plan, num_rounds=6)
    state, info = rounds.run(rounds.init(origin(), jax.random.key(0)))
    expected = by_numpy(plan, lambda t: 1.0, 1.0, False)
    np.testing.assert_allclose(state.server.variables.params["x"], expected, atol=1e-5)
    np.testing.assert_array_equal(info.counted[:, 0], (plan.client >= 0).sum(1))


def test_without_delays_it_is_the_synchronous_run():
    """All clients of the same speed, all in the buffer: the same keys, the same numbers."""
    rng = np.random.default_rng(1)
    rows = {"image": rng.normal(size=(40, 6)).astype(np.float32), "label": rng.integers(0, 3, 40)}
    rows["label"] = rows["label"].astype(np.int32)
    data = federate(rows, np.split(np.arange(40), [3, 10, 22]))
    population = Population(data, profiles(4), np.zeros(4, np.int32))
    model = mlp((6, 5, 3))
    algorithm = fed_avg(model, classification(3), Local(optax.adam(0.05), batch_size=4, epochs=2))
    variables, key = model.init(jax.random.key(0)), jax.random.key(7)
    waits = compile_rounds(algorithm, population, cohort_size=4, num_rounds=3)
    expected, _ = waits.run(waits.init(variables, key))
    plan = buffered(np.full(4, 2.5), concurrency=4, buffer_size=4, num_steps=3)
    assert not plan.behind.any()
    rounds = compile_asynchronous(algorithm, population, plan, num_rounds=3)
    state, _ = rounds.run(rounds.init(variables, key))
    chex.assert_trees_all_close(state.server, expected.server, atol=1e-6, rtol=1e-6)


def test_what_cannot_arrive_at_any_time_is_refused():
    plan = buffered(SECONDS, concurrency=5, buffer_size=1, num_steps=9)
    rounds = compile_asynchronous(toy(), people(), plan, num_rounds=9)
    late = plan._replace(version=np.zeros_like(plan.version))
    with pytest.raises(ValueError, match="is 8 steps old, and history=3 versions are kept; keep 9"):
        compile_asynchronous(toy(), people(), late, history=3)
    state, _ = rounds.run(rounds.init(origin(), jax.random.key(0)))
    with pytest.raises(ValueError, match="9 steps are done of 9 in the schedule, and 9 more"):
        rounds.run(state)
    model = mlp((3, 2))
    other = scaffold(
        model, classification(2), Local(optax.sgd(0.1), batch_size=2), total_examples=4
    )
    with pytest.raises(ValueError, match="weigh the numerator of a Mean"):
        compile_asynchronous(other, image_people(CLIENTS), plan).init(
            model.init(jax.random.key(0)), jax.random.key(0)
        )
    with pytest.raises(ValueError, match="has a client 4, and the population has 2"):
        compile_asynchronous(toy(), image_people(), plan)
    with pytest.raises(ValueError, match=r"rate=1.5 must be in \(0, 1\]"):
        compile_asynchronous(toy(), people(), plan, rate=1.5)
    two = toy()._replace(buckets=toy().buckets * 2)
    with pytest.raises(ValueError, match="one kind of client, whose movements are averaged"):
        compile_asynchronous(two, people(), plan)


def image_people(num_clients=2) -> Population:
    rows = {"image": np.zeros((14, 3), np.float32), "label": np.zeros(14, np.int32)}
    data = federate(rows, np.split(np.arange(14), num_clients))
    return Population(data, profiles(num_clients), np.zeros(num_clients, np.int32))
