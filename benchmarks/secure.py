"""What a secure sum costs: seconds and bytes of clients and server, all pairs or few neighbours.

    python benchmarks/secure.py [--quick]

Every case is a whole round of the protocol (`jaxfm.federated.secure`) in one process, in which 5%
of the clients drop out before they upload, and its sum is compared with the plain one. A round of
all pairs among 1,000 clients would take half an hour; there one client runs whole, and the server's
time is that of its parts, measured, times how often each is needed, without its bookkeeping
("scaled").

Seconds are of one client (the mean) and of the server, on one core; bytes are of one client, and
`overhead` is what it sends over the words that it has to send at least. The last line is one JSON
object; `ratio` is the time of a client with all pairs over that with few neighbours, at the most
clients there are.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxfm import config as configs
from jaxfm.config import check, check_whole, option
from jaxfm.federated.secure import client as clients
from jaxfm.federated.secure.graph import Graph, complete_graph, sparse_graph
from jaxfm.federated.secure.keys import add_mask, agreed
from jaxfm.federated.secure.messages import Delivery, Introduction, Survivors, message_bytes
from jaxfm.federated.secure.play import Dropouts, secure_sum
from jaxfm.federated.secure.shamir import combine

DROPPED = 0.05
MOST_MASKS = 200_000  # of a whole round; with more it is scaled


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    quick: bool = option(False, "10 and 100 clients of 100,000 parameters: under a minute")
    parameters: int = option(1_000_000, "words of an upload")
    clients: tuple[int, ...] = option((10, 100, 1000), "of a round")
    seed: int = option(0, "of words and graphs")

    def __post_init__(self):
        check(self)
        check_whole(self, {"parameters": 1, "seed": 0})
        if not self.clients or min(self.clients) < 3:
            raise ValueError(f"clients={self.clients}: give numbers of at least 3.")


class Words(Mapping):
    """Every client's words, made when they are asked for: all of them would be gigabytes."""

    def __init__(self, num_clients: int, size: int, seed: int):
        self.num_clients, self.size, self.seed = num_clients, size, seed

    def __getitem__(self, client: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, client))
        return rng.integers(0, 2**32, self.size, dtype=np.uint32)

    def __iter__(self):
        return iter(range(self.num_clients))

    def __len__(self) -> int:
        return self.num_clients


def whole(graph: Graph, words: Words, gone: set[int]) -> dict[str, Any]:
    """A round in which everybody takes part."""
    outcome = secure_sum(words, graph, Dropouts(before_upload=gone))
    plain = np.zeros(words.size, np.uint32)
    for i in outcome.present:
        plain += words[i]
    sent = len(outcome.present)
    up = {name: total / (sent if name in ("upload", "unmask") else len(words))
          for name, total in outcome.bytes_up.items()}  # fmt: skip
    return {
        "client_s": outcome.seconds["clients"] / len(words),
        "server_s": outcome.seconds["server"],
        "bytes_up": round(sum(up.values())),
        "bytes_down": round(sum(outcome.bytes_down.values()) / len(words)),
        "equal": bool((outcome.total == plain).all()),
        "scaled": False,
    }


def scaled(graph: Graph, words: Words, gone: set[int]) -> dict[str, Any]:
    """A round of one client, whose neighbours do what it needs of them; the server by its parts."""
    others = graph.neighbours[0]
    states, keys = {}, {}
    for i in (0, *others):
        states[i], keys[i] = clients.advertise(i)
    pair = lambda i: Introduction(2, {i: keys[i].sealing}, {i: keys[i].masking})
    delivery = Delivery({j: clients.share(states[j], pair(0))[1].sealed[0] for j in others})
    introduction = Introduction(
        graph.threshold,
        {j: keys[j].sealing for j in others},
        {j: keys[j].masking for j in others},
    )
    survivors = Survivors(
        tuple(i for i in (0, *others) if i not in gone), tuple(i for i in others if i in gone)
    )
    own = words[0]
    began = time.perf_counter()
    state, first = clients.advertise(0)
    state, second = clients.share(states[0], introduction)
    state, third = clients.upload(state, delivery, own)
    _, fourth = clients.unmask(state, survivors)
    client_s = time.perf_counter() - began

    num_masks = min(50, len(others))
    total = own.copy()
    mask_s = _seconds(lambda: add_mask(total, bytes(32), -1), num_masks)
    add_s = _seconds(lambda: np.add(total, own, out=total), num_masks)
    some = {j: keys[j].masking for j in others[:num_masks]}
    agree_s = _seconds(lambda: agreed(states[0].masking.private, some, b"masks"), 1) / len(some)
    # A share of another client at each point has the same length, and no secret.
    shares = {j + 1: bytes(36) for j in others[: graph.threshold]}
    restore_s = _seconds(lambda: combine(shares, graph.threshold), 20)
    present = len(words) - len(gone)
    pairs = sum(len(set(graph.neighbours[i]) - gone) for i in gone)
    restored = present + len(gone)
    return {
        "client_s": client_s,
        "server_s": present * (add_s + mask_s) + restored * restore_s + pairs * (agree_s + mask_s),
        "bytes_up": sum(map(message_bytes, (first, second, third, fourth))),
        "bytes_down": sum(map(message_bytes, (introduction, delivery, survivors))),
        "equal": None,
        "scaled": True,
    }


def _seconds(function, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - began) / repeats


def measured(config: Config) -> dict[str, Any]:
    rows, rng = {}, np.random.default_rng(config.seed)
    for count in config.clients:
        # As many may be gone as with few neighbours, so that both read sums of the same clients.
        few = sparse_graph(range(count), rng, dropped=0.1)
        gone = set(rng.permutation(np.arange(1, count))[: max(1, round(DROPPED * count))].tolist())
        graphs = {"all_pairs": complete_graph(range(count), few.least), "few": few}
        for name, graph in graphs.items():
            words = Words(count, config.parameters, config.seed)
            masks = count * (len(graph.neighbours[0]) + 1)
            row = (whole if masks <= MOST_MASKS else scaled)(graph, words, gone)
            row |= {
                "neighbours": len(graph.neighbours[0]),
                "threshold": graph.threshold,
                "dropped": len(gone),
                "overhead": round(row["bytes_up"] / (4 * config.parameters), 4),
            }
            rows[f"{name}_{count}"] = row
            print(
                f"{count:5} clients, {row['neighbours']:4} neighbours: "
                f"client {row['client_s']:7.3f} s, {row['bytes_up'] / 1e6:6.3f} MB up, "
                f"{row['bytes_down'] / 1e6:6.3f} MB down; server {row['server_s']:8.2f} s"
                f"{' (scaled)' * row['scaled']}",
                flush=True,
            )
    last = config.clients[-1]
    for row in rows.values():
        row["client_s"], row["server_s"] = round(row["client_s"], 4), round(row["server_s"], 3)
    return {
        "parameters": config.parameters,
        "secure_equal": all(row["equal"] for row in rows.values() if row["equal"] is not None),
        "ratio": round(
            rows[f"all_pairs_{last}"]["client_s"] / rows[f"few_{last}"]["client_s"], 2
        ),
    } | rows  # fmt: skip


def main(config: Config) -> None:
    if config.quick:
        config = dataclasses.replace(config, parameters=100_000, clients=(10, 100))
    print(json.dumps({"name": "secure"} | measured(config)))


if __name__ == "__main__":
    configs.run(main, Config)
