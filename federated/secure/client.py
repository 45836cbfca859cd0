"""A client of a secure sum: it masks its words with what others can take off only from the sum.

    y_i = x_i + mask(b_i) + sum over neighbours j of  +-mask(s_ij)   mod 2^32

with b_i a seed of its own and s_ij agreed with j, added by the smaller of both numbers and
subtracted by the larger, so that masks of pairs that both upload cancel. Shares of b_i and of the
key behind all s_ij lie with the neighbours: of a client that has uploaded they reveal those of b_i,
of one that has not those of its key, never both, or its upload could be read.

Each function takes the state of the stage before and returns the next; a state serves once.
Sources: Bonawitz et al. 2017, figure 4; Bell et al. 2020, algorithm 2. Both honest-but-curious: the
server keeps to the protocol, and it alone carries messages.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from jaxfm.federated.secure.keys import (
    KEY_BYTES,
    KeyPair,
    add_mask,
    agreed,
    digest,
    key_pair,
    seal,
    unseal,
)
from jaxfm.federated.secure.messages import (
    Delivery,
    Introduction,
    Keys,
    MaskedUpload,
    Revealed,
    SealedShares,
    Survivors,
)
from jaxfm.federated.secure.shamir import SHARE_BYTES, Random, split

STAGES = ("advertise", "share", "upload", "unmask")


class ClientState(NamedTuple):
    """What a client keeps to itself during one round.

    Attributes:
      client: its number in the round, from 0 to 65519.
      done: stages that are behind it.
      sealing, masking: its key pairs.
      seed: of its self mask, b_i.
      neighbours: as the server introduced them.
      channels: by neighbour, the secret behind the keys that seal shares.
      shares: by client, itself included: shares of that one's seed and masking key.
    """

    client: int
    done: int
    sealing: KeyPair
    masking: KeyPair
    seed: bytes
    neighbours: Introduction
    channels: dict[int, bytes]
    shares: dict[int, tuple[bytes, bytes]]


def advertise(client: int, random: Random = os.urandom) -> tuple[ClientState, Keys]:
    """Begins a round with fresh keys.

    Args:
      client: its number in the round.
      random: of keys; for tests that repeat.
    """
    sealing, masking = key_pair(random), key_pair(random)
    nobody = Introduction(0, {}, {})
    state = ClientState(client, 1, sealing, masking, random(KEY_BYTES), nobody, {}, {})
    return state, Keys(client, sealing.public, masking.public)


def share(
    state: ClientState, introduction: Introduction, random: Random = os.urandom
) -> tuple[ClientState, SealedShares]:
    """Shares b_i and the masking key among the neighbours and itself.

    Raises:
      ValueError: an introduction to nobody or to itself, or a threshold that is no secret.
    """
    _check_stage(state, 1)
    others = sorted(introduction.masking)
    threshold, most = introduction.threshold, len(others) + 1
    if state.client in others or introduction.sealing.keys() != introduction.masking.keys():
        raise ValueError(
            f"Client {state.client} was introduced to {others}; it needs both keys of others."
        )
    if not 2 <= threshold <= most:
        raise ValueError(
            f"threshold={threshold} must be at least 2 and at most {most}, client {state.client} "
            "and its neighbours."
        )
    points = [client + 1 for client in (state.client, *others)]
    own, *rest = split([state.seed, state.masking.private], points, threshold, random)
    channels = agreed(state.sealing.private, introduction.sealing, b"shares")
    sealed = {
        other: seal(_way(channels[other], state.client, other), b"".join(parts))
        for other, parts in zip(others, rest, strict=True)
    }
    kept = {state.client: (own[0], own[1])}
    state = state._replace(done=2, neighbours=introduction, channels=channels, shares=kept)
    return state, SealedShares(state.client, sealed, digest(state.seed))


def upload(
    state: ClientState, delivery: Delivery, words: np.ndarray
) -> tuple[ClientState, MaskedUpload]:
    """Masks the words u32[m] with those neighbours whose shares arrived.

    Raises:
      ValueError: words of another kind; shares of strangers, changed ones, or too few.
    """
    _check_stage(state, 2)
    words = checked_words(words, f"Client {state.client} uploads")
    strangers = delivery.sealed.keys() - state.channels.keys()
    if strangers:
        raise ValueError(f"Clients {sorted(strangers)} are no neighbours of {state.client}.")
    if len(delivery.sealed) + 1 < state.neighbours.threshold:
        raise ValueError(
            f"Client {state.client} has shares of {len(delivery.sealed)} neighbours; with fewer "
            f"than {state.neighbours.threshold - 1} nobody could restore its masks, and it stays "
            "away."
        )
    shares = dict(state.shares)
    for other, sealed in delivery.sealed.items():
        text = unseal(_way(state.channels[other], other, state.client), sealed)
        if text is None or len(text) != 2 * SHARE_BYTES:
            raise ValueError(
                f"The shares from client {other} to client {state.client} cannot be opened: they "
                "were changed on the way, or belong to another round."
            )
        shares[other] = (text[:SHARE_BYTES], text[SHARE_BYTES:])
    masked = words.copy()
    add_mask(masked, state.seed, 1)
    publics = {other: state.neighbours.masking[other] for other in delivery.sealed}
    for other, seed in agreed(state.masking.private, publics, b"masks").items():
        add_mask(masked, seed, pair_sign(state.client, other))
    return state._replace(done=3, shares=shares), MaskedUpload(state.client, masked)


def unmask(state: ClientState, survivors: Survivors) -> tuple[ClientState, Revealed]:
    """Reveals one share of each neighbour: of the seed if it is present, else of its key.

    Raises:
      ValueError: somebody is named twice or not at all, or too few are present.
    """
    _check_stage(state, 3)
    present, dropped = set(survivors.present), set(survivors.dropped)
    if both := present & dropped:
        raise ValueError(
            f"Clients {sorted(both)} are named as present and as dropped; with both kinds of "
            "shares the server could read what they uploaded, so none is revealed."
        )
    if present | dropped != state.shares.keys() or state.client not in present:
        raise ValueError(
            f"Client {state.client} holds shares of {sorted(state.shares)}, itself present; the "
            f"server named {sorted(present)} as present and {sorted(dropped)} as dropped."
        )
    if len(present) < state.neighbours.threshold:
        raise ValueError(
            f"Only {len(present)} of client {state.client} and its neighbours are present; below "
            f"the threshold of {state.neighbours.threshold} nothing is revealed."
        )
    seeds = {other: state.shares[other][0] for other in sorted(present)}
    keys = {other: state.shares[other][1] for other in sorted(dropped)}
    return state._replace(done=4, shares={}), Revealed(state.client, seeds, keys)


def pair_sign(client: int, other: int) -> int:
    """The sign with which a client adds the mask that it shares with another."""
    return 1 if client < other else -1


def checked_words(words: np.ndarray, who: str) -> np.ndarray:
    """Words as an array; raises ValueError where they are not u32[m]."""
    words = np.asarray(words)
    if words.dtype != np.uint32 or words.ndim != 1:
        raise ValueError(f"{who} {words.dtype}{list(words.shape)}; words are uint32[m].")
    return words


def _way(key: bytes, sender: int, receiver: int) -> bytes:
    """Another key for each direction, so that each seals once."""
    return digest(key + sender.to_bytes(4, "little") + receiver.to_bytes(4, "little"))


def _check_stage(state: ClientState, done: int) -> None:
    if state.done != done:
        last = STAGES[state.done - 1]
        raise ValueError(
            f"Client {state.client} cannot {STAGES[done]} now: its last stage was {last!r}, and "
            "each is done once, in order."
        )
