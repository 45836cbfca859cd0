"""The server's side of a round whose uploads are masked: it reads sums of buckets, and no upload.

Four exchanges in the place of one, as `jaxfm.federated.secure` has them: keys, shares of secrets,
masked uploads, and the shares that take the masks off their sum. A client may be absent from any of
them on; a bucket of which too few are left is lost for the round, as if nobody in it had reported.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxfm.federated.algorithm import Info
from jaxfm.federated.remote.checking import (
    Expected,
    Refused,
    Reply,
    as_tree,
    check_info,
    check_reply,
)  # fmt: skip
from jaxfm.federated.remote.masked import WORDS
from jaxfm.federated.remote.orders import Order, Remote, Side, expected_of
from jaxfm.federated.remote.standalone import Leaf, Refusal
from jaxfm.federated.secure import server as servers
from jaxfm.federated.secure.graph import Graph, complete_graph, sparse_graph
from jaxfm.federated.secure.messages import Keys, MaskedUpload, Revealed, SealedShares
from jaxfm.federated.secure.texts import from_text, to_text
from jaxfm.federated.wrappers.secure import upload_of
from jaxfm.model import PyTree

_ALL_PAIRS = 32  # clients
T = TypeVar("T")
Exchange = Callable[[Mapping[int, Order]], Iterable[Reply]]


class Summed(NamedTuple):
    """What came of one bucket.

    Attributes:
      upload: the sum of all uploads, as one; None where it could not be read.
      infos: reports by client whose words are in the sum.
      faulty: reports of clients whose numbers were not finite.
      refused: whose replies did not count.
      lost: why there is no sum; empty where there is one.
    """

    upload: PyTree
    infos: dict[int, Info]
    faulty: dict[int, Info]
    refused: list[Refused]
    lost: str


def masked_sum(
    remote: Remote, side: Side, orders: Mapping[int, Order], exchange: Exchange
) -> Summed:
    """Plays the four stages with the clients of one bucket.

    Args:
      orders: of the bucket's clients, as without masks.
    """
    stages = _Stages(remote, side, orders, exchange, [], {}, {})
    try:
        total = _played(stages)
    except ValueError as error:  # too few are left, or somebody cheated
        return Summed(None, {}, stages.faulty, stages.refused, str(error))
    upload = upload_of(total, side.shapes.upload)
    return Summed(upload, stages.infos, stages.faulty, stages.refused, "")


class _Stages(NamedTuple):
    """One bucket's round while it goes on; the lists and dicts are filled by its stages."""

    remote: Remote
    side: Side
    orders: Mapping[int, Order]
    exchange: Exchange
    refused: list[Refused]
    infos: dict[int, Info]
    faulty: dict[int, Info]


def _played(stages: _Stages) -> np.ndarray:
    """u32[m]: the sum of the words of those who uploaded; raises ValueError where it is hidden."""
    keys = _texts(stages, "advertise", dict.fromkeys(stages.orders, ""), Keys)
    graph = _graph(sorted(keys))
    state, introductions = servers.introduce(graph, keys.values())
    shares = _texts(stages, "share", _written(introductions), SealedShares)
    state, deliveries = servers.deliver(state, shares.values())
    uploads = _uploads(stages, _written(deliveries))
    state, survivors = servers.collect(state, uploads)
    revealed = _texts(stages, "unmask", _written(survivors), Revealed)
    return servers.finish(state, list(revealed.values()))


def _graph(clients: list[int]) -> Graph:
    """Who masks with whom: all pairs of few clients, else a random graph of this round."""
    if len(clients) <= _ALL_PAIRS:
        return complete_graph(clients)
    return sparse_graph(clients, np.random.default_rng(secrets.randbits(128)))


def _written(messages: Mapping[int, Any]) -> dict[int, str]:
    return {client: to_text(message) for client, message in messages.items()}


def _asked(
    stages: _Stages, stage: str, messages: Mapping[int, str], take: Callable[[Expected, Reply], T]
) -> dict[int, T]:
    """What clients answer to a stage, by client; others are refused."""
    orders = {}
    for client, message in messages.items():
        order = stages.orders[client]
        config = {**order.config, "stage": stage, "message": message}
        config["nonce"] = secrets.token_hex(16)
        orders[client] = Order(config, order.arrays if stage == "upload" else {})
    taken: dict[int, T] = {}
    for reply in stages.exchange(orders):
        try:
            if reply.client not in orders or reply.client in taken:
                raise Refusal(f"It was not asked, or has answered, to {stage}.")
            expected = expected_of(stages.remote, stages.side, orders[reply.client])
            taken[reply.client] = take(expected._replace(says=("fault", "message")), reply)
        except ValueError as error:
            stages.refused.append(Refused(reply.client, f"{stage}: {error}"))
    return taken


def _texts(stages: _Stages, stage: str, messages: Mapping[int, str], kind: type[T]) -> dict[int, T]:
    """A stage whose answers are messages of the protocol, each from the client it names."""

    def take(expected: Expected, reply: Reply) -> T:
        check_reply(reply, expected._replace(upload={}, info={}))
        message: Any = from_text(kind, reply.config["message"])
        if message.client != reply.client:
            raise Refusal(f"It speaks for client {message.client}.")
        return message

    return _asked(stages, stage, messages, take)


def _uploads(stages: _Stages, messages: Mapping[int, str]) -> list[MaskedUpload]:
    """The stage of uploads."""
    size = sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in stages.side.upload.values())

    def take(expected: Expected, reply: Reply) -> MaskedUpload | None:
        expected = expected._replace(upload={WORDS: Leaf("uint32", (size,))})
        words, leaves, fault = check_reply(reply, expected)
        info: Info = as_tree(stages.side.shapes.info, leaves)
        check_info(info, expected)
        (stages.faulty if fault else stages.infos)[reply.client] = info
        return None if fault else MaskedUpload(reply.client, words[0])

    answers = _asked(stages, "upload", messages, take).values()
    return [one for one in answers if one is not None]
