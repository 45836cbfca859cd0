"""Rounds whose clients are processes of their own give the numbers of the simulation."""

import functools
import importlib.util
import shutil
import types

import chex
import jax
import numpy as np
import pytest
from laws import PUBLIC, engine, federation, make, population, start

from jaxfm.federated.client import client_data
from jaxfm.federated.remote import orders, standalone
from jaxfm.federated.remote import server as servers
from jaxfm.federated.remote.checking import Reply
from jaxfm.federated.remote.flower import reply_of
from jaxfm.federated.remote.orders import Remote
from jaxfm.federated.remote.site import Client, prepare_site
from jaxfm.federated.remote.trees import flat

slow = lambda name: pytest.param(name, marks=pytest.mark.slow)


def remote_of(name, people, cohort_size=3):
    like = client_data(people, 0)
    counts = np.asarray(people.federation.count, np.float64)
    return Remote(make(name), people.bucket, like, cohort_size, PUBLIC, counts)


@functools.lru_cache
def _program(exported: bytes):
    return jax.jit(jax.export.deserialize(bytearray(exported)).call)


def shared_program(path):
    """The program of a file, compiled once for all clients of this process."""
    return _program(path.read_bytes())


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Clients of one process share their compiled programs."""
    monkeypatch.setattr(standalone, "_program", shared_program)


def local_exchange(name, people, root, carry=lambda config, wires: (config, wires)):
    """Clients of this process; `carry` is what a transport does to a message."""
    exported = {}  # the folder of a client of each bucket: all have equally many rows

    def prepare(folder, config):
        own = client_data(people, config["client"])
        client = Client(make(name), start(name=name), *own, PUBLIC)
        if config["bucket"] not in exported:
            prepare_site(folder, client, config["bucket"])
            exported[config["bucket"]] = folder
            return
        for file in ("about.json", "first.bin", "step.bin"):
            shutil.copyfile(exported[config["bucket"]] / file, folder / file)
        standalone.save_arrays(folder / "data.safetensors", flat("data", own))

    def exchange(orders):
        for client, order in reversed(orders.items()):  # the order of arrival changes nothing
            message = carry(order.config, standalone.pack(order.arrays))
            yield Reply(client, *carry(*standalone.answer(*message, root, prepare)))

    return exchange


def through_flower(config, wires):
    """The same bytes through Flower's records, as they go over the network."""
    from flwr.app import RecordDict
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    records = standalone.to_records(config, wires)
    parts = {name: part.deflate() for name, part in get_all_nested_objects(records).items()}
    again = inflate_object_from_contents(records.object_id, parts)
    assert isinstance(again, RecordDict)
    reply = reply_of(0, types.SimpleNamespace(content=again, has_error=lambda: False))
    assert not reply.failure
    return dict(reply.config), dict(reply.wires)


def same(name, folder, carry, rounds=3):
    people = population(name, federation((3,) * 6))
    runner = engine(name, cohort_size=3)
    state, remote = runner.init(start(name=name), jax.random.key(3)), remote_of(name, people)
    own, held = servers.start(remote, start(name=name), jax.random.key(3)), {}
    exchange = local_exchange(name, people, folder, carry)
    for _ in range(rounds):
        state, info = runner.run(state, people)
        own, report, refused = servers.play_round(remote, own, exchange, held)
        assert refused == []
        chex.assert_trees_all_close(report, jax.device_get(info), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(own.run.server, state.server, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["fed_avg", "scaffold", "spatl", "fed_kemf", "raffm", "fed_lora"])
def test_rounds_of_separate_clients_are_those_of_the_simulation(name, tmp_path):
    """Over Flower's records, where Flower is installed."""
    plain = lambda *message: message
    same(name, tmp_path, through_flower if importlib.util.find_spec("flwr") else plain)


def one_round(remote, state, exchange, held):
    state, _, refused = servers.play_round(remote, state, exchange, held)
    return state, refused


def test_a_memory_moves_on_only_when_its_round_counted(tmp_path):
    """An upload that is lost on its way leaves server and client as if nobody had been asked."""
    people = population("scaffold", federation((3,) * 6))
    remote = remote_of("scaffold", people, cohort_size=6)
    exchange = local_exchange("scaffold", people, tmp_path)
    lossy = lambda orders: (reply for reply in exchange(orders) if reply.client != 2)
    never = lambda orders: exchange({i: order for i, order in orders.items() if i != 2})
    ends = []
    for second in (lossy, never):
        state = servers.start(remote, start(), jax.random.key(3))
        for way in (exchange, second, exchange):
            state, refused = one_round(remote, state, way, {})
            assert refused == []
        ends.append(state)
    chex.assert_trees_all_equal(ends[0].run.server, ends[1].run.server)
    assert ends[0].counted.tolist() == [2] * 6


def test_constants_are_sent_once_and_again_where_they_are_lost(tmp_path):
    name = "fed_lora"
    people = population(name, federation((3,) * 6))
    remote, held, sizes = remote_of(name, people, cohort_size=6), {}, []
    exchange = local_exchange(name, people, tmp_path)

    def measured(orders):
        sizes.append({i: set(order.arrays) for i, order in orders.items()})
        for client, order in orders.items():
            try:
                yield from exchange({client: order})
            except standalone.Refusal as error:
                yield Reply(client, {}, {}, str(error))

    orders._SMALL, small = 0, orders._SMALL
    try:
        state = servers.start(remote, start(name=name), jax.random.key(3))
        state, refused = one_round(remote, state, measured, held)
        assert refused == [] and any("frozen" in leaf for leaf in sizes[0][0])
        state, refused = one_round(remote, state, measured, held)
        assert refused == [] and not any("frozen" in leaf for leaf in sizes[1][0])
        shutil.rmtree(next(tmp_path.glob("*/client_1")) / "constants")
        state, refused = one_round(remote, state, measured, held)
        assert [one.client for one in refused] == [1] and "no longer has" in refused[0].reason
        state, refused = one_round(remote, state, measured, held)
        assert refused == []
        assert any("frozen" in leaf for leaf in sizes[3][1])
        assert not any("frozen" in leaf for leaf in sizes[3][0])
    finally:
        orders._SMALL = small


def test_a_client_without_the_memory_of_its_last_round_says_so(tmp_path):
    people = population("fed_avg", federation((3,) * 6))
    remote = remote_of("fed_avg", people, cohort_size=6)
    exchange = local_exchange("fed_avg", people, tmp_path)
    state, _ = one_round(remote, servers.start(remote, start(), jax.random.key(3)), exchange, {})
    next(tmp_path.glob("*/client_3/memory_*")).unlink()
    with pytest.raises(standalone.Refusal, match="Client 3 has no memory of round 0"):
        one_round(remote, state, exchange, {})


def test_a_late_client_starts_from_the_models_first_numbers(tmp_path):
    """First memories are made of the download before round 0, as in the simulation."""
    people = population("fed_per", federation((3,) * 6))
    remote = remote_of("fed_per", people, cohort_size=6)
    exchange = local_exchange("fed_per", people, tmp_path)
    state = servers.start(remote, start(), jax.random.key(3))
    moved = jax.tree.map(lambda x: x + 1, state.run.server)
    later = state._replace(run=state.run._replace(server=moved, round=state.run.round + 1))
    _, refused = one_round(remote, later, exchange, {})
    assert refused == []
    site = standalone.open_site(next(tmp_path.glob("*/client_0")))
    first = prepared_first(site, people, start())
    order = orders.order_of(remote, later, orders.side_of(remote, later, 0), 0, {})
    download, early = standalone._download(order.config, standalone.pack(order.arrays), site)
    memory = standalone._memory(order.config, site, download, early)
    chex.assert_trees_all_equal(memory, first)


def prepared_first(site, people, variables):
    """The first memory of client 0 in the simulation, as a list of arrays."""
    bucket = make("fed_per").buckets[0]
    server = make("fed_per").init(variables)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 2**32 - 1), 0)
    memory = bucket.init_client(bucket.send(server, PUBLIC), *client_data(people, 0), key)
    return [np.asarray(x) for x in jax.tree.leaves(memory)]
