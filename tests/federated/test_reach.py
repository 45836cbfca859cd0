"""What the contract makes room for: sparser uploads, windows that roll, clients that start from
their own data and hold rows back to select by."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.data.federation import federate
from jaxfm.federated.accounting.ledger import client_costs, round_costs
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithm import Algorithm, Bucket, Exact, Info, Mean, Spent, mean
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import compile_rounds
from jaxfm.model import Variables

SIZE = 8
VALUES = np.arange(12, dtype=np.float32)
PARTS = [np.array([0, 1, 2]), np.array([3]), np.array([4, 5, 6, 7]), np.array([8, 9])]


class State(NamedTuple):
    variables: jax.Array  # f32[SIZE]
    round: jax.Array  # i32[]


def people(bucket=(0, 0, 0, 0), validation=None) -> Population:
    data = federate({"x": VALUES}, PARTS)
    return Population(data, profiles(len(PARTS)), np.array(bucket), validation)


def own_mean(data) -> jax.Array:
    real = jnp.arange(data.index.shape[0]) < data.count
    return jnp.where(real, data.examples["x"][data.index], 0).sum() / jnp.maximum(
        data.count, 1
    ).astype(jnp.float32)


def report(**extra) -> Info:
    one, zero = jnp.ones(()), jnp.zeros(())
    return Info(Spent(one), examples=one, loss_total=zero, loss_count=one, extra=extra)


def algorithm(*buckets: Bucket) -> Algorithm:
    init = lambda variables: State(variables, jnp.zeros((), jnp.int32))

    def server(state, totals, public, key):
        return State(state.variables + mean(totals), state.round + 1), {}

    return Algorithm(init, buckets, server)


def run(algorithm: Algorithm, population: Population, num_rounds: int = 1, **changes):
    settings = {"cohort_size": len(PARTS), "num_rounds": num_rounds} | changes
    engine = compile_rounds(algorithm, population, **settings)
    return engine.run(engine.init(jnp.zeros(SIZE), jax.random.key(0)))


def plain_client(download, memory, data, profile, key):
    move = jnp.full(SIZE, own_mean(data)) - download
    return Mean(move, Exact(jnp.ones(()))), memory, report()


def test_uploads_travel_smaller_than_they_are_summed():
    """Eight-bit uploads: the server decodes each before the sum; the ledger counts the bytes."""

    def client(download, memory, data, profile, key):
        upload, memory, info = plain_client(download, memory, data, profile, key)
        scale = jnp.abs(upload.num).max() / 127
        return (jnp.round(upload.num / scale).astype(jnp.int8), scale), memory, info

    def receive(server, public, upload):
        codes, scale = upload
        return Mean(codes.astype(jnp.float32) * scale, Exact(jnp.ones(())))

    send = lambda server, public: server.variables
    personal = lambda server, memory: Variables(server.variables, {}, {})
    coarse = algorithm(Bucket(None, send, client, receive=receive, personal=personal))
    exact = algorithm(Bucket(None, send, plain_client))
    state, info = run(coarse, people())
    expected, _ = run(exact, people())
    np.testing.assert_allclose(state.server.variables, expected.server.variables, rtol=1e-2)
    costs = client_costs(coarse, people(), jnp.zeros(SIZE))
    assert costs[0].bytes_up == SIZE + 4
    assert round_costs(costs, info)["bytes_up"] == len(PARTS) * (SIZE + 4)


def test_a_window_may_roll_with_the_round():
    """FedRolex: the indices that clients hold follow from the server's state, in one program."""
    half = SIZE // 2
    window = lambda server: (jnp.arange(half) + server.round) % SIZE

    def client(download, memory, data, profile, key):
        return Mean(jnp.ones(half), Exact(jnp.ones(()))), memory, report()

    def lift(server, sums):
        full = jnp.zeros(SIZE).at[window(server)]
        return Mean(full.set(sums.num), full.set(sums.den.value))

    send = lambda server, public: server.variables[window(server)]
    state, _ = run(algorithm(Bucket(None, send, client, lift=lift)), people(), num_rounds=3)
    visits = np.zeros(SIZE)
    for number in range(3):
        visits[(np.arange(half) + number) % SIZE] += 1
    np.testing.assert_allclose(state.server.variables, visits)


def test_memories_start_from_the_clients_own_data_and_key():
    def init_client(download, data, profile, key):
        return own_mean(data), jax.random.uniform(key)

    send = lambda server, public: server.variables
    toy = algorithm(Bucket(None, send, plain_client, init_client))
    engine = compile_rounds(toy, people(), cohort_size=2)
    means, draws = engine.init(jnp.zeros(SIZE), jax.random.key(0)).memories[0]
    np.testing.assert_allclose(means, [VALUES[rows].mean() for rows in PARTS])
    assert len(set(np.asarray(draws).tolist())) == len(PARTS)


def test_clients_may_hold_rows_back():
    rows = [np.array([10]), np.array([11]), np.array([10, 11]), np.array([], int)]
    validation = federate({"x": VALUES}, rows)

    def client(download, memory, data, profile, key):
        upload, memory, _ = plain_client(download, memory, data, profile, key)
        real = jnp.arange(data.validation_index.shape[0]) < data.validation_count
        values = jnp.where(real, data.examples["x"][data.validation_index], 0)
        return upload, memory, report(held=values.sum())

    toy = algorithm(Bucket(None, lambda server, public: server.variables, client))
    _, info = run(toy, people(validation=validation))
    assert info.extra["held"][0] == sum(VALUES[r].sum() for r in rows)
    with pytest.raises(ValueError, match="local_validation"):
        run(toy, people(validation=federate({"x": VALUES}, rows[:3])))


def test_a_memory_that_is_not_finite_is_not_kept():
    init_client = lambda download, data, profile, key: jnp.zeros(())

    def client(download, memory, data, profile, key):
        upload, _, info = plain_client(download, memory, data, profile, key)
        return upload, jnp.where(data.count == 1, jnp.nan, memory + 1), info

    send = lambda server, public: server.variables
    state, info = run(algorithm(Bucket(None, send, client, init_client)), people())
    np.testing.assert_array_equal(state.memories[0], [1, 0, 1, 1])
    assert info.non_finite.tolist() == [[1]]


@pytest.mark.parametrize("clients_at_once", [1, 2])
def test_empty_slots_are_never_run(clients_at_once):
    """Three buckets have room for the whole cohort each; only the drawn clients' programs run."""
    calls: list[int] = []

    def client(download, memory, data, profile, key):
        jax.debug.callback(lambda count: calls.append(int(count)), data.count)
        return plain_client(download, memory, data, profile, key)

    send = lambda server, public: server.variables
    toy = algorithm(*[Bucket(None, send, client) for _ in range(3)])
    mesh = jax.make_mesh((1,), ("clients",), devices=jax.devices()[:1],
                         axis_types=(jax.sharding.AxisType.Auto,))  # fmt: skip
    state, _ = run(toy, people((0, 0, 1, 2)), mesh=mesh, clients_at_once=clients_at_once)
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert sorted(calls) == sorted(len(rows) for rows in PARTS)
