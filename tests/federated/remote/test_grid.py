"""The server's side of Flower: which node is which client, and what comes from a node."""

import types

import pytest

from jaxfm.federated.remote import flower
from jaxfm.federated.remote.flower import Limits, Nodes, reply_of, wait_for
from jaxfm.federated.remote.standalone import Refusal, _folder, _number


class Grid:
    """Nodes with names, and replies: a message, or an exception that reading one raises."""

    def __init__(self, names, replies=None):
        self.names, self.replies = names, replies or {}

    def get_nodes(self):
        return [types.SimpleNamespace(node_id=i, name=name) for i, name in self.names.items()]

    def push_messages(self, messages):
        return [f"to {message.node}" for message in messages]

    def pull_messages(self, ids):
        found = []
        for one in ids:
            reply = self.replies.get(one)
            if isinstance(reply, Exception):
                raise reply
            found += [] if reply is None else [reply]
        return found


class ArrayRecord(dict):
    pass


class ConfigRecord(dict):
    pass


def message(node, content=None, error=None, source=None):
    return types.SimpleNamespace(
        content={"config": ConfigRecord(), "arrays": ArrayRecord()} if content is None else content,
        error=error,
        has_error=lambda: error is not None,
        metadata=types.SimpleNamespace(
            reply_to_message_id=f"to {node}", src_node_id=node if source is None else source
        ),
    )


def test_registered_names_say_which_client_a_node_is():
    said = []
    grid = Grid({7: "client-1", 8: "client-0", 9: "client-1", 10: "client-5", 11: "client-x"})
    nodes = Nodes(grid, 2, said.append)
    assert nodes.refresh(1.0) == {1: 7, 0: 8}
    assert len(said) == 3 and "Node 9 is left out: it is client 1, and another node is" in said[0]
    assert "Node 10 is left out: it is client 5, and clients are 0 to 1." in said
    del grid.names[7]  # it went away, and comes back as another node
    assert nodes.refresh(1.0) == {0: 8}
    wait_for(nodes, Limits(hello_s=0.1, nodes=1))


def test_a_client_that_comes_back_as_another_node_is_taken():
    grid = Grid({7: "client-1"})
    nodes = Nodes(grid, 2, print)
    assert nodes.refresh(1.0) == {1: 7}
    grid.names = {12: "client-1"}
    assert nodes.refresh(1.0) == {1: 12}


def test_without_any_node_the_server_says_how_to_start_one():
    with pytest.raises(TimeoutError, match="No client's node came within"):
        wait_for(Nodes(Grid({}), 2), Limits(hello_s=0.1))


def test_replies_that_cannot_be_read_hide_no_others():
    replies = {"to 1": message(1), "to 2": TypeError("no dtype"), "to 3": message(3, source=1)}
    grid = Grid({}, replies)
    sent = {i: types.SimpleNamespace(node=i) for i in (1, 2, 3, 4)}
    found = {node: failure for node, _, failure in flower._replies(grid, sent, 0.5)}
    assert found == {
        1: "",
        2: "it could not be read (TypeError: no dtype)",
        3: "it came from node 1",
    }


def test_messages_that_were_not_taken_fail_at_once():
    grid = Grid({})
    grid.push_messages = lambda messages: []
    sent = {1: types.SimpleNamespace(node=1)}
    assert list(flower._replies(grid, sent, 60.0)) == [(1, None, "the message could not be sent")]


@pytest.mark.parametrize(
    "content, failure",
    [
        ({}, "its records are []"),
        ({"config": ConfigRecord()}, "its records are ['config']"),
        ({"config": ArrayRecord(), "arrays": ArrayRecord()}, "a ArrayRecord and a ArrayRecord"),
        ({"config": ConfigRecord(), "arrays": ConfigRecord()}, "ConfigRecord and a ConfigRecord"),
        ({"config": ConfigRecord(), "arrays": ArrayRecord(), "x": ConfigRecord()}, "'x'"),
    ],
    ids=["nothing", "no arrays", "no config", "other arrays", "more"],
)
def test_other_records_are_a_failure(content, failure):
    assert failure in reply_of(3, message(1, content)).failure
    assert reply_of(3, message(1)).failure == ""


def test_an_error_is_a_failure_with_its_reason():
    error = types.SimpleNamespace(reason="<class 'ValueError'>:<'x'>", code=3)
    assert reply_of(3, message(1, error=error)).failure == error.reason


@pytest.mark.parametrize("run", ["../up", "", "A", "a" * 65, 7, None])
def test_a_run_has_a_plain_name(run, tmp_path):
    with pytest.raises(Refusal, match="is no name of a run"):
        _folder({"run": run, "client": 0}, tmp_path)


@pytest.mark.parametrize("client", [-1, True, "0", None, 1.0])
def test_a_client_has_a_number(client, tmp_path):
    with pytest.raises(Refusal, match="is no number of a client"):
        _folder({"run": "ab", "client": client}, tmp_path)
    with pytest.raises(Refusal, match="does not say which client it is"):
        _number({"client": client} if client is not None else {})
