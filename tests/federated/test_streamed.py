"""A population of which only a round's clients are in memory."""

import jax
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

from jaxfm.data.federation import federate
from jaxfm.federated import Local, Population, compile_rounds, fed_avg, profiles, scaffold
from jaxfm.federated.client_store import ClientStore
from jaxfm.federated.streamed import StreamedRounds, Visit, derived, draw_clients, on_disk
from jaxfm.models.families.cnn import mlp
from jaxfm.tasks import classification

COUNT = np.array([4, 1, 6, 0, 3, 5, 2], np.int32)  # one has nothing
START = np.cumsum(COUNT) - COUNT
MODEL, TASK, LOCAL = mlp((3, 2)), classification(2, inputs="x"), Local(optax.sgd(0.1), 2, 2)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    size = COUNT.sum()
    x, label = rng.normal(size=(size, 3)).astype(np.float32), np.arange(size, dtype=np.int32) % 2
    return {"x": x, "label": label}


def algorithm():
    return scaffold(MODEL, TASK, LOCAL, total_examples=float(COUNT.sum()))


def streamed(examples, tmp_path, cohort_size, **changes):
    settings = {
        "algorithm": algorithm(),
        "fetch": on_disk(examples, START, COUNT, 6),
        "num_clients": len(COUNT),
        "cohort_size": cohort_size,
        "store": ClientStore(tmp_path / "memories", len(COUNT)),
    }
    return StreamedRounds(**(settings | changes))


def test_a_cohort_of_everybody_gives_the_rounds_of_a_population_in_memory(examples, tmp_path):
    own = [np.arange(a, a + n) for a, n in zip(START, COUNT)]
    everybody = Population(federate(examples, own), profiles(7), np.zeros(7, np.int32))
    engine = compile_rounds(algorithm(), everybody, cohort_size=7)
    start, key = MODEL.init(jax.random.key(1)), jax.random.key(2)
    expected = engine.init(start, key)
    with streamed(examples, tmp_path, 7) as rounds:
        state = rounds.init(start, key)
        for _ in range(3):
            expected, _ = engine.run(expected)
            state, info = rounds.run(state)
    assert sorted(info.cohort.client[0].tolist()) == list(range(7))
    assert_trees_all_close(state.server, expected.server, rtol=1e-6, atol=1e-6)
    assert_trees_all_close(state.memories, expected.memories, rtol=1e-6, atol=1e-6)


def test_memories_stay_with_their_clients_and_one_program_serves_all_cohorts(examples, tmp_path):
    traced, plain = [], algorithm()

    def server(*given):
        traced.append(1)
        return plain.server(*given)

    counted = plain._replace(server=server)
    store = ClientStore(tmp_path / "memories", len(COUNT))
    with streamed(examples, tmp_path, 3, algorithm=counted, store=store) as rounds:
        state = rounds.init(MODEL.init(jax.random.key(1)), jax.random.key(2))
        last = {}
        for number in range(6):
            clients = draw_clients(state.key, number, 7, 3)
            before, seen = store.read(clients, number, state.memories[0])
            for place, client in enumerate(clients.tolist()):
                assert seen[place] == (client in last)
                if client in last:
                    own = jax.tree.map(lambda x, place=place: x[place], before)
                    assert_trees_all_equal(own, last[client])
            state, info = rounds.run(state)
            assert sorted(info.cohort.client[0].tolist()) == clients.tolist()
            kept = jax.device_get(state.memories[0])
            for place, client in enumerate(clients.tolist()):
                last[client] = jax.tree.map(lambda x, place=place: x[place], kept)
    assert len(traced) == 1


def test_a_killed_run_finds_each_client_as_the_checkpoint_had_it(tmp_path):
    rng = np.random.default_rng(0)
    like = {"a": np.zeros((3, 2), np.float32), "b": np.zeros(3, np.int32)}
    store, now, kept = ClientStore(tmp_path / "m", 9), {}, ({}, 0)
    done = 0
    for _ in range(60):
        clients = draw_clients(jax.random.key(0), done, 9, 3)
        found, seen = store.read(clients, done, like)
        for place, client in enumerate(clients.tolist()):
            assert seen[place] == (client in now)
            a, b = now.get(client, (np.zeros(2), 0))
            np.testing.assert_array_equal(found["a"][place], a)
            assert found["b"][place] == b
        new = {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": np.arange(3, dtype=np.int32)}
        done += 1
        store.write(clients, done, new)
        now |= {c: (new["a"][p], new["b"][p]) for p, c in enumerate(clients.tolist())}
        if rng.random() < 0.2:
            kept = dict(now), done
            store.keep(done)
        if rng.random() < 0.15:  # killed; a new process goes on from the checkpoint
            store.close()
            store = ClientStore(tmp_path / "m", 9)
            now, done = dict(kept[0]), kept[1]
            store.keep(done)
    with pytest.raises(ValueError, match="it is another run's; give another path"):
        ClientStore(tmp_path / "m", 8).read(clients, done, like)


def test_clients_made_of_their_numbers_are_the_same_each_time():
    def make(key):
        x = jax.random.normal(key, (4, 3))
        return {"x": x, "label": jax.numpy.argmax(x, 1) % 2}, jax.random.randint(key, (), 1, 5)

    fetch = derived(make, jax.random.key(0))
    one, two = fetch(np.array([5, 999_999])), fetch(np.array([999_999, 7]))
    np.testing.assert_array_equal(one.examples["x"][1], two.examples["x"][0])
    assert not np.array_equal(one.examples["x"][0], two.examples["x"][1])
    plain = fed_avg(MODEL, TASK, LOCAL)
    with StreamedRounds(plain, fetch, num_clients=10**6, cohort_size=2) as rounds:
        state = rounds.init(MODEL.init(jax.random.key(1)), jax.random.key(2))
        state, info = rounds.run(state)
    assert float(info.counted.sum()) == 2


def test_bad_settings_are_refused_in_one_sentence(examples, tmp_path):
    with pytest.raises(ValueError, match=r"cohort_size=8 must be from 1 to .* 7\.$"):
        streamed(examples, tmp_path, 8)
    start, key = MODEL.init(jax.random.key(1)), jax.random.key(2)
    with pytest.raises(ValueError, match=r"between rounds: give store\.$"):
        streamed(examples, tmp_path, 3, store=None).init(start, key)
    short = lambda clients: Visit({"x": np.zeros((2, 4, 3), np.float32)}, np.ones(3, np.int32))
    with pytest.raises(ValueError, match=r"fetch gave count .* give counts \[3\] and leaves"):
        streamed(examples, tmp_path, 3, fetch=short).init(start, key)
    keys = jax.random.split(key, 3)
    with pytest.raises(ValueError, match=r"keep jax.random.key_data\.$"):
        ClientStore(tmp_path / "other", 5).read(np.arange(3), 0, {"key": keys})
