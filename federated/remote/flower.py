"""Flower carries the messages: a `Grid` as the exchange of `server.play_round`.

Needs the extra `flower` (flwr). The server's process is Flower's ServerApp; a client's process is
`standalone.client_app`.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxfm.federated.remote.checking import Reply
from jaxfm.federated.remote.orders import Order
from jaxfm.federated.remote.server import Exchange
from jaxfm.federated.remote.standalone import pack, to_records

POLL_S = 0.2
_CLIENT = "client-"  # a registered node's name begins with it, and its client's number follows


def need_flower() -> None:
    """Raises a sentence where Flower is missing."""
    if importlib.util.find_spec("flwr") is None:
        raise ModuleNotFoundError(
            "Real clients talk through Flower, which is not installed: pip install 'jaxfm[flower]'."
        )


class Limits(NamedTuple):
    """How long a server waits.

    Attributes:
      round_s: for the replies of a round; clients that take longer are absent from it.
      hello_s: for the nodes of the first round, and for an answer to which client a node is.
      nodes: to wait for before the first round; 0: all clients.
    """

    round_s: float = 600.0
    hello_s: float = 600.0
    nodes: int = 0


class Nodes:
    """Which node is which client: those that are registered by name, and those that say so.

    A registered name ("client-3", by `flwr supernode register`) is believed before what a node
    says; of several nodes that say the same, the first one stays.
    """

    def __init__(self, grid: Any, num_clients: int, say: Any = print):
        self.grid, self.num_clients, self.say = grid, num_clients, say
        self.client_of: dict[int, int] = {}
        self.ignored: set[int] = set()

    def refresh(self, timeout_s: float) -> dict[int, int]:
        """Nodes that are there now, by client."""
        infos = {info.node_id: info for info in self.grid.get_nodes()}
        self.client_of = {node: i for node, i in self.client_of.items() if node in infos}
        new = [i for i in infos if i not in self.client_of and i not in self.ignored]
        named = [i for i in new if infos[i].name.startswith(_CLIENT)]
        for node in named:
            self._add(node, _as_number(infos[node].name.removeprefix(_CLIENT)))
        self._ask([i for i in new if i not in named], timeout_s)
        return {client: node for node, client in self.client_of.items()}

    def _ask(self, nodes: list[int], timeout_s: float) -> None:
        if not nodes:
            return
        from flwr.app import ConfigRecord, Message, RecordDict

        content = lambda: RecordDict({"config": ConfigRecord({})})
        asked = {node: Message(content(), node, "query") for node in nodes}
        for node, message, failure in _replies(self.grid, asked, timeout_s):
            try:
                self._add(node, failure or message.content["config"]["client"])
            except Exception as error:  # whatever a node sends, the server goes on
                self._add(node, error)

    def _add(self, node: int, client: Any) -> None:
        taken = client in self.client_of.values() if isinstance(client, int) else False
        if type(client) is int and 0 <= client < self.num_clients and not taken:
            self.client_of[node] = client
            return
        self.ignored.add(node)
        why = "another node is that client" if taken else f"clients are 0 to {self.num_clients - 1}"
        self.say(f"Node {node} is left out: it is client {str(client)[:200]}, and {why}.")


def _as_number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def wait_for(nodes: Nodes, limits: Limits) -> None:
    """Waits for the nodes of the first round, as long as `limits` say.

    Raises:
      TimeoutError: nobody came.
    """
    wanted = limits.nodes or nodes.num_clients
    end = time.monotonic() + limits.hello_s
    there = nodes.refresh(limits.hello_s)
    while len(there) < wanted and time.monotonic() < end:
        time.sleep(POLL_S)
        there = nodes.refresh(max(1.0, end - time.monotonic()))
    if not there:
        raise TimeoutError(
            f"No client's node came within {limits.hello_s:g} s; start them with "
            "`python -m jaxfm.launch.flower join`."
        )
    nodes.say(f"{len(there)} of {nodes.num_clients} clients are there.")


def grid_exchange(grid: Any, nodes: Nodes, limits: Limits) -> Exchange:
    """Orders over Flower's grid; a client whose node is not there is absent."""

    def exchange(orders: Mapping[int, Order]) -> Iterator[Reply]:
        from flwr.app import Message

        node_of = nodes.refresh(min(limits.hello_s, limits.round_s))
        sent = {
            node_of[client]: Message(
                to_records(order.config, pack(order.arrays)), node_of[client], "train",
                group_id=str(order.config["round"]), ttl=limits.round_s,
            )
            for client, order in orders.items()
            if client in node_of
        }  # fmt: skip
        client_of = {node: client for client, node in node_of.items()}
        for node, message, failure in _replies(grid, sent, limits.round_s):
            yield reply_of(client_of[node], message, failure)

    return exchange


def reply_of(client: int, message: Any, failure: str = "") -> Reply:
    """What came from a node, whatever it is."""
    if failure:
        return Reply(client, {}, {}, failure)
    if message.has_error():
        return Reply(client, {}, {}, str(message.error.reason or message.error.code))
    content = message.content
    if set(content) != {"config", "arrays"}:
        return Reply(client, {}, {}, f"its records are {sorted(map(str, content))[:5]}")
    config, arrays = content["config"], content["arrays"]
    kinds = [type(record).__name__ for record in (config, arrays)]
    if kinds != ["ConfigRecord", "ArrayRecord"]:
        return Reply(client, {}, {}, f"its records are a {kinds[0]} and a {kinds[1]}")
    return Reply(client, dict(config), dict(arrays))


def _replies(
    grid: Any, sent: Mapping[int, Any], timeout_s: float
) -> Iterator[tuple[int, Any, str]]:
    """(node, its reply, or why there is none) as they come, until all are there or time is up."""
    order = list(sent)
    if not order:
        return
    ids = list(grid.push_messages([sent[node] for node in order]))
    pending = {str(i): node for i, node in zip(ids, order, strict=False) if i is not None}
    for node in set(order) - set(pending.values()):
        yield node, None, "the message could not be sent"
    end = time.monotonic() + timeout_s
    while pending and time.monotonic() < end:
        for message_id, message, failure in _pulled(grid, list(pending)):
            if message_id not in pending:
                continue
            node = pending.pop(message_id)
            if message is not None and not message.has_error():
                source = message.metadata.src_node_id
                if source != node:
                    failure = f"it came from node {source}"
            yield node, message, failure
        time.sleep(POLL_S)


def _pulled(grid: Any, ids: list[str]) -> Iterable[tuple[str, Any, str]]:
    """Replies that are there; of several at once, a malformed one must not hide the others."""
    try:
        return [(m.metadata.reply_to_message_id, m, "") for m in grid.pull_messages(ids)]
    except Exception as error:  # what a client sent could not be read
        if type(error).__module__.startswith("httpx"):  # or the SuperLink is gone
            raise
        if len(ids) == 1:
            return [(ids[0], None, f"it could not be read ({type(error).__name__}: {error})")]
        found: list[tuple[str, Any, str]] = []
        for one in ids:
            found += _pulled(grid, [one])
        return found
