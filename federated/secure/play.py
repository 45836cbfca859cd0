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
import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxfm.federated.secure import client as clients
from jaxfm.federated.secure import server as servers
from jaxfm.federated.secure.graph import Graph
from jaxfm.federated.secure.messages import message_bytes
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
      seconds: of all "clients" together and of the "server"; words[i] is not counted.
    """

    total: np.ndarray
    present: frozenset[int]
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]
    seconds: dict[str, float]


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
    seconds = {"clients": 0.0, "server": 0.0}
    states: dict[int, Any] = {}

    def does(stage: str, client: int, function, *args):
        """A client's step: its message, counted and timed."""
        began = time.perf_counter()
        states[client], message = function(*args)
        seconds["clients"] += time.perf_counter() - began
        up[stage] += message_bytes(message)
        return message

    def serves(stage: str, function, *args):
        """A step of the server: its state and its answers, counted and timed."""
        began, before = time.perf_counter(), seconds["clients"]
        server, answers = function(*args)
        # Uploads are made one by one while the server adds them up.
        seconds["server"] += time.perf_counter() - began - (seconds["clients"] - before)
        down[stage] += sum(map(message_bytes, answers.values()))
        return server, answers

    keys = [does("advertise", i, clients.advertise, i, random) for i in graph.neighbours]
    server, introductions = serves("advertise", servers.introduce, graph, keys)
    shares = [
        does("share", i, clients.share, states[i], introductions[i], random)
        for i in states.keys() - set(dropouts.before_sharing)
    ]
    server, deliveries = serves("share", servers.deliver, server, shares)
    uploads = (
        does("upload", i, clients.upload, states[i], deliveries[i], words[i])
        for i in deliveries.keys() - set(dropouts.before_upload)
    )
    server, asked = serves("upload", servers.collect, server, uploads)
    revealed = [
        does("unmask", i, clients.unmask, states[i], asked[i])
        for i in asked.keys() - set(dropouts.before_unmasking)
    ]
    began = time.perf_counter()
    total = servers.finish(server, revealed)
    seconds["server"] += time.perf_counter() - began
    return Outcome(total, server.present, up, down, seconds)
