"""What a client must not send is refused with a reason, and the round goes on without it."""

import chex
import jax
import numpy as np
import pytest
from laws import federation, population, start
from test_remote import local_exchange, remote_of

from jaxfm.federated.remote import server as servers
from jaxfm.federated.remote.bad_replies import KINDS
from jaxfm.federated.remote.checking import Reply
from jaxfm.federated.remote.standalone import pack


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A run of six clients after its first round, and the honest replies of two rounds."""
    people = population("fed_avg", federation((3,) * 6))
    remote = remote_of("fed_avg", people, cohort_size=6)
    remote = remote._replace(most_steps=np.full(6, 1000))
    exchange = local_exchange("fed_avg", people, tmp_path_factory.mktemp("clients"))
    state, replies = servers.start(remote, start(), jax.random.key(3)), []

    def recorded(orders):
        replies.append({})
        for reply in exchange(orders):
            replies[-1][reply.client] = reply
            yield reply

    first, _, _ = servers.play_round(remote, state, recorded, {})
    servers.play_round(remote, first, recorded, {})
    return remote, first, *replies


def played(honest, change=lambda reply: [reply]):
    """The second round again, with what `change` makes of each client's reply."""
    remote, state, _, now = honest

    def exchange(orders):
        for client, reply in now.items():
            config = {**reply.config, "nonce": orders[client].config["nonce"]}
            yield from change(reply._replace(config=config))

    return servers.play_round(remote, state, exchange, {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_reply_is_refused_and_counts_for_nothing(honest, kind):
    last = honest[2]
    bad = lambda reply: [KINDS[kind](reply, last[2])] if reply.client == 2 else [reply]
    absent = lambda reply: [] if reply.client == 2 else [reply]
    state, info, refused = played(honest, bad)
    without, other, nobody = played(honest, absent)
    assert [one.client for one in refused] == [2] and nobody == []
    assert refused[0].reason.endswith((".", ">")) and len(refused[0].reason) < 400
    chex.assert_trees_all_equal(state.run.server, without.run.server)
    chex.assert_trees_all_equal(info, other)
    assert state.counted.tolist() == [1, 1, 0, 1, 1, 1]


def test_a_second_answer_and_a_stranger_are_refused(honest):
    state, _, refused = played(
        honest, lambda reply: [reply, reply] if not reply.client else [reply]
    )
    expected, _, _ = played(honest)
    assert [(one.client, one.reason) for one in refused] == [
        (0, "It has already answered in this round.")
    ]
    chex.assert_trees_all_equal(state.run.server, expected.run.server)
    stranger = lambda reply: [reply, Reply(77, reply.config, reply.wires)]
    _, _, refused = played(honest, stranger)
    assert {one.client for one in refused} == {77}


def test_a_client_that_finds_a_fault_itself_is_counted_as_not_finite(honest):
    def fault(reply):
        if reply.client != 4:
            return [reply]
        config = {**reply.config, "fault": "upload.x has 1 of 2 entries that are not finite."}
        wires = {name: x for name, x in reply.wires.items() if name.startswith("info")}
        return [reply._replace(config=config, wires=wires)]

    state, info, refused = played(honest, fault)
    assert refused == [] and info.non_finite.sum() == 1 and info.counted.sum() == 5
    assert state.counted[4] == 0


def test_a_round_that_nobody_answers_changes_nothing(honest):
    state, info, refused = played(honest, lambda reply: [])
    chex.assert_trees_all_equal(state.run.server, honest[1].run.server)
    assert info.counted.sum() == 0 and info.selected.sum() == 6 and refused == []
    assert int(state.run.round) == 2


def test_numbers_of_every_dtype_travel(honest):
    import ml_dtypes

    from jaxfm.federated.remote.standalone import leaf_of, unpack

    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.uint32)
    arrays = {str(i): np.arange(6).reshape(2, 3).astype(d) for i, d in enumerate(dtypes)}
    arrays |= {"none": np.zeros((0, 3), bool), "scalar": np.float32(2.5)}
    leaves = {name: leaf_of(x) for name, x in arrays.items()}
    chex.assert_trees_all_equal(unpack(pack(arrays), leaves), arrays)
