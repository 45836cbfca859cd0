"""The server of a secure sum: it carries messages, adds uploads up and takes the masks off.

    sum over present i of x_i = sum of y_i - sum of mask(b_i) - what masks of pairs left behind

A pair of which one client dropped out does not cancel: its masking key comes back from shares, and
with it the seeds that it had agreed on. Of a present client b_i comes back, never the key.
Sources: Bonawitz et al. 2017, figure 4; Bell et al. 2020, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxfm.federated.secure.client import checked_words, pair_sign
from jaxfm.federated.secure.graph import Graph
from jaxfm.federated.secure.keys import KEY_BYTES, add_mask, agreed, digest, public_key
from jaxfm.federated.secure.messages import (
    Delivery,
    Introduction,
    Keys,
    MaskedUpload,
    Revealed,
    SealedShares,
    Survivors,
)
from jaxfm.federated.secure.shamir import combine


class ServerState(NamedTuple):
    """What the server knows in a round.

    Attributes:
      graph: who masks with whom.
      keys: by client that advertised.
      digests: by client that shared.
      present: clients that uploaded.
      total: u32[m], the sum of what they uploaded.
    """

    graph: Graph
    keys: dict[int, Keys]
    digests: dict[int, bytes]
    present: frozenset[int]
    total: np.ndarray


def introduce(graph: Graph, keys: Iterable[Keys]) -> tuple[ServerState, dict[int, Introduction]]:
    """Tells each client its neighbours' keys.

    Args:
      graph: over the clients that advertised.
      keys: of these.
    Raises:
      ValueError: keys of others, of too few, twice, or damaged.
    """
    known = _by_client(keys, "keys")
    if known.keys() != graph.neighbours.keys():
        raise ValueError(
            f"The graph is of {len(graph.neighbours)} clients and keys are of {len(known)}; they "
            "must be the same clients."
        )
    for key in known.values():
        if len(key.sealing) != KEY_BYTES or len(key.masking) != KEY_BYTES:
            raise ValueError(f"Keys of client {key.client} must have {KEY_BYTES} bytes each.")
    said = {
        client: Introduction(
            graph.threshold,
            {other: known[other].sealing for other in others},
            {other: known[other].masking for other in others},
        )
        for client, others in graph.neighbours.items()
    }
    return ServerState(graph, known, {}, frozenset(), np.zeros(0, np.uint32)), said


def deliver(
    state: ServerState, shares: Iterable[SealedShares]
) -> tuple[ServerState, dict[int, Delivery]]:
    """Hands each client that shared the shares of its neighbours that did.

    Raises:
      ValueError: shares of a stranger, for others than its neighbours, or of too few clients.
    """
    sent = _by_client(shares, "shares")
    for client, message in sent.items():
        neighbours = state.graph.neighbours.get(client, ())
        if not neighbours or message.sealed.keys() != set(neighbours):
            raise ValueError(
                f"Client {client} sealed shares for {sorted(message.sealed)}; its neighbours are "
                f"{sorted(neighbours)}."
            )
    _check_enough(state.graph, sent.keys(), "shared their secrets")
    parcels = {
        client: Delivery({
            other: sent[other].sealed[client]
            for other in state.graph.neighbours[client]
            if other in sent
        })
        for client in sent
    }  # fmt: skip
    return state._replace(digests={i: message.digest for i, message in sent.items()}), parcels


def collect(
    state: ServerState, uploads: Iterable[MaskedUpload]
) -> tuple[ServerState, dict[int, Survivors]]:
    """Adds uploads up, one at a time, and asks those who sent them for shares.

    Raises:
      ValueError: an upload of a stranger, a second one, one of another length, or too few.
    """
    total, present = None, set()
    for message in uploads:
        client = message.client
        if client not in state.digests or client in present:
            why = "has uploaded already" if client in present else "has shared no secrets"
            raise ValueError(f"Client {client} {why}; its upload is refused.")
        words = checked_words(message.words, f"Client {client} uploaded")
        if total is not None and words.shape != total.shape:
            raise ValueError(
                f"Client {client} uploaded {len(words)} words, and others {len(total)}."
            )
        total = words.copy() if total is None else np.add(total, words, out=total)
        present.add(client)
    _check_enough(state.graph, present, "uploaded")
    assert total is not None
    asked = {}
    for client in present:
        near = [i for i in (client, *state.graph.neighbours[client]) if i in state.digests]
        asked[client] = Survivors(
            tuple(i for i in near if i in present), tuple(i for i in near if i not in present)
        )
    return state._replace(present=frozenset(present), total=total), asked


def finish(state: ServerState, revealed: Sequence[Revealed]) -> np.ndarray:
    """The sum u32[m] of the words of those who uploaded, modulo 2^32.

    Raises:
      ValueError: shares of strangers, of a client's two secrets, too few, or damaged.
    """
    answers = _by_client(revealed, "revealed shares")
    dropped = state.digests.keys() - state.present
    seeds: dict[int, dict[int, bytes]] = {client: {} for client in state.present}
    keys: dict[int, dict[int, bytes]] = {client: {} for client in dropped}
    for client, answer in answers.items():
        near = {client, *state.graph.neighbours.get(client, ())}
        wanted = (state.present & near, dropped & near)
        if client not in state.present or (
            (answer.seeds.keys(), answer.masking_keys.keys()) != wanted
        ):
            raise ValueError(
                f"Client {client} revealed shares that were not asked for, or not all that were; "
                "they are refused."
            )
        for other, part in answer.seeds.items():
            seeds[other][client + 1] = part
        for other, part in answer.masking_keys.items():
            keys[other][client + 1] = part
    total = state.total.copy()
    for client, parts in sorted(seeds.items()):
        seed = _restored(state, client, parts, "seed")
        if digest(seed) != state.digests[client]:
            raise ValueError(f"Shares of the seed of client {client} were changed; no sum is read.")
        add_mask(total, seed, -1)
    for client, parts in sorted(keys.items()):
        beside = {i for i in state.graph.neighbours[client] if i in state.present}
        if not beside:  # nobody has used its key
            continue
        private = _restored(state, client, parts, "masking key")
        if public_key(private) != state.keys[client].masking:
            raise ValueError(
                f"Shares of the masking key of client {client} were changed; no sum is read."
            )
        publics = {other: state.keys[other].masking for other in sorted(beside)}
        for other, seed in agreed(private, publics, b"masks").items():
            add_mask(total, seed, -pair_sign(other, client))
    return total


def _restored(state: ServerState, client: int, parts: dict[int, bytes], what: str) -> bytes:
    threshold = state.graph.threshold
    if len(parts) < threshold:
        raise ValueError(
            f"The {what} of client {client} needs {threshold} shares and {len(parts)} came; the "
            "sum stays hidden."
        )
    try:
        return combine(parts, threshold)
    except ValueError as error:
        raise ValueError(f"The {what} of client {client} is lost: {error}") from None


def _check_enough(graph: Graph, clients: Iterable[int], did: str) -> None:
    """Raises ValueError where too few clients are left, of all or of a neighbourhood."""
    left = set(clients)
    if len(left) < graph.least:
        raise ValueError(
            f"Only {len(left)} of {len(graph.neighbours)} clients {did}; a sum of fewer than "
            f"{graph.least} is not read."
        )
    for client in sorted(left):
        near = len(left.intersection(graph.neighbours[client])) + 1
        if near < graph.threshold:
            raise ValueError(
                f"Only {near} of client {client} and its neighbours {did}; its masks can be taken "
                f"off with {graph.threshold} of them, so no sum is read."
            )


def _by_client(messages: Iterable, what: str) -> dict:
    found: dict = {}
    for message in messages:
        if message.client in found:
            raise ValueError(f"Client {message.client} sent its {what} twice.")
        found[message.client] = message
    return found
