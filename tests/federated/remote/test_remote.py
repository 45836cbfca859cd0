"""Rounds whose clients are processes of their own give the numbers of the simulation."""

import chex
import jax
import numpy as np
import pytest
from laws import PUBLIC, engine, federation, make, population, start

from jaxfm.federated.client import client_data
from jaxfm.federated.remote import server as servers
from jaxfm.federated.remote import standalone
from jaxfm.federated.remote.checking import Reply
from jaxfm.federated.remote.site import Client, prepare_site

slow = lambda name: pytest.param(name, marks=pytest.mark.slow)


def remote_of(name, people, cohort_size=3):
    like = client_data(people, 0)
    counts = np.asarray(people.federation.count, np.float64)
    return servers.Remote(make(name), people.bucket, like, cohort_size, PUBLIC, counts)


def local_exchange(name, people, root, carry=lambda config, wires: (config, wires)):
    """Clients of this process; `carry` is what a transport does to a message."""

    def prepare(folder, config):
        data, profile = client_data(people, config["client"])
        client = Client(make(name), start(name=name), data, profile, PUBLIC)
        prepare_site(folder, client, config["bucket"])

    def exchange(orders):
        for client, order in reversed(orders.items()):  # the order of arrival changes nothing
            message = carry(order.config, standalone.pack(order.arrays))
            yield Reply(client, *carry(*standalone.answer(*message, root, prepare)))

    return exchange


def flower_carry(config, wires):
    """The same bytes through Flower's records, as they go over the network."""
    flower = pytest.importorskip(
        "jaxfm.federated.remote.flower", reason="flwr is not installed (extra 'flower')"
    )
    return flower.through_bytes(config, wires)


def same(name, folder, carry, rounds=3):
    people = population(name, federation())
    runner = engine(name, cohort_size=3)
    state, remote = runner.init(start(name=name), jax.random.key(3)), remote_of(name, people)
    own, held = servers.start(remote, start(name=name), jax.random.key(3)), {}
    exchange = local_exchange(name, people, folder, carry)
    for _ in range(rounds):
        state, info = runner.run(state, people)
        own, report, refused = servers.play_round(remote, own, exchange, held)
        assert refused == []
        chex.assert_trees_all_close(
            report, jax.device_get(info), rtol=1e-5, atol=1e-6
        )
    chex.assert_trees_all_close(own.run.server, state.server, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["fed_avg", "scaffold", "spatl", "fed_kemf", "raffm", "fed_lora"])
def test_rounds_of_separate_clients_are_those_of_the_simulation(name, tmp_path):
    same(name, tmp_path, lambda *message: message)
