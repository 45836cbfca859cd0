"""Algorithms that the contract must carry: clients with memories and of unequal architectures."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm.data.federation import federate
from jaxfm.federated.accounting.metrics import client_metrics
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Exact,
    Info,
    Mean,
    Spent,
    mean,
    weighted,
)
from jaxfm.federated.local import Local, local_fit
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import compile_rounds
from jaxfm.model import Variables
from jaxfm.models.families.cnn import mlp
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tasks import classification

CLIENTS = 11
LR, STEPS = 0.05, 3


class Control(NamedTuple):
    variables: jax.Array  # x f32[2]
    c: jax.Array  # f32[2]


class Memory(NamedTuple):
    c: jax.Array  # f32[2]
    visits: jax.Array  # i32[]
    owner: jax.Array  # i32[], known from the profile


def scaffold(pulls: tuple[float, ...]) -> Algorithm:
    """Control variates for clients that minimise (pull/2) |y - t|², t being their one example; a
    bucket for each strength of pull. Karimireddy et al. 2020, option II."""

    def bucket(pull: float) -> Bucket:
        def init_client(download, data, profile, key):
            return Memory(jnp.zeros(2), jnp.zeros((), jnp.int32), profile.max_steps)

        def client(download, memory, data, profile, key):
            x, c = download
            t = data.examples["t"][data.index[0]]
            owner = data.examples["owner"][data.index[0]]
            y = x
            for _ in range(STEPS):
                y = y - LR * (pull * (y - t) - memory.c + c)
            new = memory.c - c + (x - y) / (STEPS * LR)
            upload = (Mean(y - x, Exact(jnp.ones(()))), new - memory.c)
            stray = (memory.owner != owner) | (profile.max_steps != owner)
            zero, extra = jnp.zeros(()), {"stray": stray.astype(jnp.float32)}
            info = Info(Spent(zero), zero, zero, zero, extra)
            return upload, Memory(new, memory.visits + 1, memory.owner), info

        return Bucket(
            None, lambda server, public: (server.variables, server.c), client, init_client
        )

    def server(state, totals, public, key):
        moves, controls = totals
        return Control(state.variables + mean(moves), state.c + controls / CLIENTS), {}

    return Algorithm(lambda x: Control(x, jnp.zeros(2)), tuple(map(bucket, pulls)), server)


@pytest.mark.parametrize(("devices", "clients_at_once"), [(2, 1), (1, 2)])
def test_memories_stay_with_their_clients(devices, clients_at_once):
    targets = np.random.default_rng(0).normal(size=(CLIENTS, 2)).astype(np.float32)
    owners = np.arange(100, 100 + CLIENTS, dtype=np.int32)
    data = federate({"t": targets, "owner": owners}, [np.array([i]) for i in range(CLIENTS)])
    pulls, bucket = (1.0, 3.0), np.arange(CLIENTS) % 3 % 2
    people = Population(data, profiles(CLIENTS, max_steps=owners), bucket)
    engine = compile_rounds(
        scaffold(pulls), people, cohort_size=4, drop_rate=0.2, clients_at_once=clients_at_once,
        mesh=make_mesh(clients=devices),
    )  # fmt: skip
    state = engine.init(jnp.ones(2), jax.random.key(0))

    x, c = np.ones(2), np.zeros(2)
    own, visits = np.zeros((CLIENTS, 2)), np.zeros(CLIENTS, int)
    for _ in range(8):
        state, info = engine.run(state)
        seen = np.zeros(CLIENTS, int)
        for b, memory in enumerate(state.memories):
            seen[bucket == b] = memory.visits
            np.testing.assert_array_equal(memory.owner, owners[bucket == b])
        cohort = np.flatnonzero(seen - visits)
        assert (seen - visits)[cohort].tolist() == [1] * len(cohort)
        assert len(cohort) == info.counted.sum() and info.extra["stray"][0] == 0
        visits = seen
        moves, controls = [], []
        for i in cohort:
            y = x
            for _ in range(STEPS):
                y = y - LR * (pulls[bucket[i]] * (y - targets[i]) - own[i] + c)
            new = own[i] - c + (x - y) / (STEPS * LR)
            moves.append(y - x)
            controls.append(new - own[i])
            own[i] = new
        x = x + np.mean(moves, axis=0) if moves else x
        c = c + np.sum(controls, axis=0) / CLIENTS if controls else c
        np.testing.assert_allclose(state.server.variables, x, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state.server.c, c, rtol=1e-5, atol=1e-5)
        for b, memory in enumerate(state.memories):
            np.testing.assert_allclose(memory.c, own[bucket == b], rtol=1e-4, atol=1e-5)
    assert visits.max() >= 3 and (visits > 0).sum() > 6


def test_the_memory_of_a_client_that_fails_is_kept():
    targets = np.ones((3, 2), np.float32)
    targets[1] = np.inf
    data = federate({"t": targets, "owner": np.arange(1, 4)}, [np.array([i]) for i in range(3)])
    people = Population(data, profiles(3, max_steps=np.arange(1, 4)), np.zeros(3, int))
    engine = compile_rounds(scaffold((1.0,)), people, cohort_size=3)
    state, info = engine.run(engine.init(jnp.ones(2), jax.random.key(0)))
    assert info.non_finite.sum() == 1
    assert state.memories[0].visits.tolist() == [1, 0, 1]
    assert np.isfinite(state.server.variables).all() and np.isfinite(state.server.c).all()


# Two architectures that share a small network: each client trains its own and the shared one
# together, so that each learns from the other's answers; only the shared one travels.


class Knowledge(NamedTuple):
    variables: Variables


SHARED, TASK = mlp((6, 2, 3)), classification(3, inputs="x")
LOCAL = Local(optax.sgd(0.1), 4, 2)


def mutual(models) -> Algorithm:
    def bucket(model) -> Bucket:
        def loss(params, variables, batch, real, key):
            x, labels, weight = TASK.prepare(batch, key)
            own, _ = model.apply(variables._replace(params=params["own"]), x, train=True)
            shared, _ = SHARED.apply(variables._replace(params=params["shared"]), x, train=True)
            logs = [jax.nn.log_softmax(logits) for logits in (own, shared)]
            gap = jnp.sum(jnp.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)
            totals = [TASK.loss(logits, labels, weight * real) for logits in (own, shared)]
            total = totals[0][0] + totals[1][0] + jnp.sum(gap * real)
            return total / jnp.sum(real), ({}, total, totals[0][1])

        fit = local_fit(loss, LOCAL)

        def init_client(download, data, profile, key):
            return model.init(jax.random.fold_in(jax.random.key(5), profile.max_steps))

        def client(download, memory, data, profile, key):
            both = Variables({"own": memory.params, "shared": download.params}, {}, {})
            trained, info = fit(both, data, profile.max_steps, key)
            move = jax.tree.map(jnp.subtract, trained.params["shared"], download.params)
            upload = weighted(info.examples, move)
            return upload, memory._replace(params=trained.params["own"]), info

        return Bucket(
            model, lambda server, public: server.variables, client, init_client,
            personal=lambda server, memory: memory,
        )  # fmt: skip

    def server(state, totals, public, key):
        params = jax.tree.map(jnp.add, state.variables.params, mean(totals))
        return Knowledge(state.variables._replace(params=params)), {}

    return Algorithm(Knowledge, tuple(map(bucket, models)), server)


@pytest.mark.slow
def test_clients_of_other_architectures_share_what_they_know():
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, 20).astype(np.int32)
    x = (rng.normal(size=(20, 6)) + 2 * label[:, None]).astype(np.float32)
    data = federate({"x": x, "label": label}, np.split(np.arange(20), [4, 7, 12, 16]))
    bucket = np.array([0, 1, 1, 0, 1])
    algorithm = mutual((mlp((6, 8, 3)), mlp((6, 5, 4, 3))))
    people = Population(data, profiles(5, max_steps=np.array([9, 8, 7, 6, 5])), bucket)
    engine = compile_rounds(algorithm, people, cohort_size=5)
    key, first = jax.random.key(0), SHARED.init(jax.random.key(1))
    state, _ = engine.run(engine.init(first, key))

    # By hand, client after client, with the keys that the engine folds.
    client_key = jax.random.split(jax.random.fold_in(key, 0), 4)[2]
    uploads, memories = [], [[], []]
    for i, b in enumerate(bucket):
        profile = jax.tree.map(lambda field, i=i: jnp.asarray(field[i]), people.profiles)
        mine = ClientData(data.examples, data.index.padded(i), jnp.asarray(data.count[i]))
        chosen = algorithm.buckets[b]
        mine = mine._replace(examples=jax.tree.map(jnp.asarray, data.examples))
        upload, memory, _ = jax.jit(chosen.client)(
            first, chosen.init_client(None, None, profile, None), mine, profile,
            jax.random.fold_in(client_key, i),
        )  # fmt: skip
        uploads.append(upload)
        memories[b].append(memory)
    moved = mean(jax.tree.map(lambda *leaves: sum(leaves), *uploads))
    expected = jax.tree.map(jnp.add, first.params, moved)
    chex.assert_trees_all_close(state.server.variables.params, expected, rtol=1e-5, atol=1e-6)
    stacked = tuple(jax.tree.map(lambda *x: jnp.stack(x), *some) for some in memories)
    chex.assert_trees_all_close(state.memories, stacked, rtol=1e-5, atol=1e-6)

    measure = client_metrics(algorithm, bucket, TASK, batch_size=4)
    before = measure(engine.init(first, key), data)["loss"].mean()
    for _ in range(5):
        state, _ = engine.run(state)
    assert measure(state, data)["loss"].mean() < 0.7 * before
