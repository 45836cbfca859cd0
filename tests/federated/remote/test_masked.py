"""Uploads under masks: the same words as in the simulation, and nobody's alone."""

import chex
import jax
import numpy as np
import pytest
from laws import PUBLIC, federation, make, population, start
from test_remote import shared_program

from jaxfm.federated import compile_rounds
from jaxfm.federated.client import client_data
from jaxfm.federated.remote import server as servers
from jaxfm.federated.remote import standalone
from jaxfm.federated.remote.in_process import in_process
from jaxfm.federated.remote.orders import Remote
from jaxfm.federated.remote.site import Client, prepare_site
from jaxfm.federated.remote.standalone import Refusal, answer, pack
from jaxfm.federated.secure.client import advertise, share
from jaxfm.federated.secure.messages import Introduction, Keys, Revealed
from jaxfm.federated.secure.texts import from_text, to_text
from jaxfm.federated.wrappers.secure import with_secure_sums

pytest.importorskip("cryptography", reason="cryptography is not installed")
SECURE = with_secure_sums(make("scaffold"), 5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six clients, whose folders are made once; an exchange with all of them."""
    people = population("scaffold", federation((3,) * 6))
    remote = Remote(SECURE, people.bucket, client_data(people, 0), 5, PUBLIC)

    def prepare(folder, config):
        own = client_data(people, config["client"])
        prepare_site(folder, Client(SECURE, start(), *own, PUBLIC), config["bucket"])

    exchange = in_process(tmp_path_factory.mktemp("clients"), prepare)
    return people, remote, exchange


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Clients of one process share their compiled programs."""
    monkeypatch.setattr(standalone, "_program", shared_program)


def begun(remote):
    return servers.start(remote, start(), jax.random.key(3))


def test_masked_rounds_are_those_of_the_simulation_bit_for_bit(run):
    people, remote, exchange = run
    seen = []

    def watched(orders):
        for reply in exchange(orders):
            seen.append(reply)
            yield reply

    engine = compile_rounds(SECURE, people, cohort_size=5, public=PUBLIC)
    state, own = engine.init(start(), jax.random.key(3)), begun(remote)
    for _ in range(2):
        state, info = engine.run(state)
        own, report, refused = servers.play_round(remote, own, watched, {})
        assert refused == []
        chex.assert_trees_all_close(report, jax.device_get(info), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(own.run.server, state.server, rtol=1e-6, atol=1e-6)
    uploads = [reply.wires["words"] for reply in seen if "words" in reply.wires]
    assert len(uploads) == 10  # which look like noise: half of their bits are set
    bits = np.unpackbits(np.frombuffer(b"".join(wire.data for wire in uploads), np.uint8))
    assert abs(bits.mean() - 0.5) < 0.01
    assert not any(name.startswith("upload") for reply in seen for name in reply.wires)


@pytest.mark.parametrize("stage", ["advertise", "share", "upload", "unmask"])
def test_a_client_that_leaves_in_between_is_as_if_it_had_not_come(run, stage):
    """After its upload it counts: the others take its masks off."""
    _, remote, exchange = run
    state = begun(remote)
    gone = int(servers.draw(state.run.key, 0, 6, 5, 0.0)[0][2])

    def leaving(orders):
        stays = {i: x for i, x in orders.items() if i != gone or x.config["stage"] != stage}
        return exchange(stays)

    after, info, refused = servers.play_round(remote, state, leaving, {})
    assert refused == []
    assert info.counted.sum() == (5 if stage == "unmask" else 4)
    never = lambda orders: exchange({i: x for i, x in orders.items() if i != gone})
    same = exchange if stage == "unmask" else never
    expected, _, _ = servers.play_round(remote, state, same, {})
    chex.assert_trees_all_equal(after.run.server, expected.run.server)
    assert (after.counted[gone] == 0) == (stage == "unmask")


def test_with_too_few_clients_the_round_is_lost_and_nothing_is_read(run):
    _, remote, exchange = run
    state = begun(remote)

    def few(orders):
        stage = next(iter(orders.values())).config["stage"] if orders else ""
        return exchange(dict([*orders.items()][:2]) if stage == "upload" else orders)

    after, info, refused = servers.play_round(remote, state, few, {})
    assert info.counted.sum() == 0 and len(refused) == 5
    assert "Only 2 of 5 clients uploaded" in refused[0].reason
    chex.assert_trees_all_equal(after.run.server.variables, state.run.server.variables)
    assert (after.counted == -1).all()


def test_a_bad_message_is_refused_and_the_round_goes_on(run):
    _, remote, exchange = run
    state = begun(remote)
    bad = int(servers.draw(state.run.key, 0, 6, 5, 0.0)[0][0])
    changes = {
        "advertise": {"message": to_text(Keys(bad + 1, b"1" * 32, b"2" * 32))},
        "share": {"message": "[1"},
        "upload": {"round": 7},
    }
    for stage, change in changes.items():

        def lying(orders, stage=stage, change=change):
            for reply in exchange(orders):
                is_due = reply.client == bad and orders[bad].config["stage"] == stage
                yield reply._replace(config={**reply.config, **change}) if is_due else reply

        _, info, refused = servers.play_round(remote, state, lying, {})
        assert [one.client for one in refused] == [bad]
        assert refused[0].reason.startswith(f"{stage}: ")
        assert info.counted.sum() == 4


def test_a_client_of_a_masked_run_sends_nothing_else(run, tmp_path):
    """Neither to a server that asks it plainly, nor twice for its shares."""
    people, remote, exchange = run
    orders = []

    def kept(asked):
        orders.append(asked)
        return exchange(asked)

    servers.play_round(remote, begun(remote), kept, {})
    folder = tmp_path
    prepare = lambda folder, config: prepare_site(
        folder, Client(SECURE, start(), *client_data(people, config["client"]), PUBLIC), 0
    )
    client, order = next(iter(orders[2].items()))
    plain = {name: x for name, x in order.config.items() if name not in ("stage", "message")}
    with pytest.raises(Refusal, match="masks the uploads of all its clients, or of none"):
        answer(plain, pack(order.arrays), folder, prepare)
    with pytest.raises(Refusal, match="has begun no masks in round 0"):
        answer(orders[3][client].config, {}, folder, prepare)
    with pytest.raises(Refusal, match="an order is of advertise"):
        answer({**order.config, "stage": "reveal"}, {}, folder, prepare)


def test_messages_and_states_survive_text():
    states = [advertise(i)[0] for i in range(3)]
    keys = {i: advertise(i)[1] for i in range(3)}
    others = [1, 2]
    introduction = Introduction(
        2, {i: keys[i].sealing for i in others}, {i: keys[i].masking for i in others}
    )
    state, shares = share(states[0], introduction)
    for message in (state, shares, introduction, keys[1], Revealed(1, {2: b"x"}, {})):
        assert from_text(type(message), to_text(message)) == message


@pytest.mark.parametrize(
    "text", ["", "[", "{}", "[1]", '[1, "zz", "00"]', '["1", "00", "00"]', "[true, 1, 2]", None, 3]
)
def test_a_text_of_another_kind_is_refused(text):
    with pytest.raises(ValueError, match="This is no text of a Keys"):
        from_text(Keys, text)
    deep = "[" * 100_000
    with pytest.raises(ValueError, match="This is no text of a Keys"):
        from_text(Keys, deep)
