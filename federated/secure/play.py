"""A whole secure sum in one process: for tests, benchmarks and to see how the parts meet.

>>> import numpy as np
>>> from jaxfm.federated.secure.graph import complete_graph
>>> words = {i: np.full(3, 10 + i, np.uint32) for i in range(5)}
>>> outcome = secure_sum(words, complete_graph(range(5)), Dropouts(before_upload={4}))
>>> outcome.total, sorted(outcome.present)
(array([46, 46, 46], dtype=uint32), [0, 1, 2, 3])
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jaxfm.federated.secure import client as clients
from jaxfm.federated.secure import server as servers
from jaxfm.federated.secure.graph import Graph
from jaxfm.federated.secure.messages import MaskedUpload, message_bytes
from jaxfm.federated.secure.shamir import Random


class Dropouts(NamedTuple):
    """Clients that leave after they have advertised, and never come back, by their last stage."""

    before_sharing: Collection[int] = ()
    before_upload: Collection[int] = ()
    before_unmasking: Collection[int] = ()


class Outcome(NamedTuple):
    """What a secure sum came to.

    Attributes:
      total: u32[m], the sum of the words of those present.
      present: clients that uploaded.
      bytes_up, bytes_down: by stage, of all clients together.
    """

    total: np.ndarray
    present: frozenset[int]
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]


def secure_sum(
    words: Mapping[int, np.ndarray],
    graph: Graph,
    dropouts: Dropouts = Dropouts(),  # noqa: B008
    random: Random = os.urandom,
) -> Outcome:
    """Runs the four stages, message by message.

    Args:
      words: by client, u32[m].
      graph: over these clients.
      dropouts: who leaves when.
      random: of all keys and shares.
    Raises:
      ValueError: as the client and the server do; too few are left.
    """
    up, down = dict.fromkeys(clients.STAGES, 0), dict.fromkeys(clients.STAGES, 0)

    def sent(stage: str, message):
        up[stage] += message_bytes(message)
        return message

    def heard(stage: str, answers: dict) -> dict:
        down[stage] += sum(map(message_bytes, answers.values()))
        return answers

    states, keys = {}, []
    for i in graph.neighbours:
        states[i], message = clients.advertise(i, random)
        keys.append(sent("advertise", message))
    server, introductions = servers.introduce(graph, keys)
    heard("advertise", introductions)
    shares = []
    for i in states.keys() - set(dropouts.before_sharing):
        states[i], message = clients.share(states[i], introductions[i], random)
        shares.append(sent("share", message))
    server, deliveries = servers.deliver(server, shares)
    heard("share", deliveries)

    def uploads() -> Iterator[MaskedUpload]:
        for i in deliveries.keys() - set(dropouts.before_upload):
            states[i], message = clients.upload(states[i], deliveries[i], words[i])
            yield sent("upload", message)

    server, asked = servers.collect(server, uploads())
    heard("upload", asked)
    revealed = []
    for i in asked.keys() - set(dropouts.before_unmasking):
        states[i], answer = clients.unmask(states[i], asked[i])
        revealed.append(sent("unmask", answer))
    return Outcome(servers.finish(server, revealed), server.present, up, down)
