"""What clients and the server of a secure sum say to each other, in order.

| stage | a client sends | the server answers |
|---|---|---|
| advertise | `Keys` | `Introduction`: its neighbours' keys |
| share | `SealedShares` of its two secrets | `Delivery`: those of its neighbours for it |
| upload | `MaskedUpload` | `Survivors`: which of its neighbours uploaded |
| unmask | `Revealed`: one share of each | |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Keys(NamedTuple):
    """A client's fresh public keys.

    Attributes:
      client: its number in the round.
      sealing: 32 bytes, for shares in transit.
      masking: 32 bytes, for masks of pairs; its private part is shared among the neighbours.
    """

    client: int
    sealing: bytes
    masking: bytes


class Introduction(NamedTuple):
    """A client's neighbours, and how many shares give a secret back.

    Attributes:
      threshold: t.
      sealing, masking: public keys by neighbour.
    """

    threshold: int
    sealing: dict[int, bytes]
    masking: dict[int, bytes]


class SealedShares(NamedTuple):
    """A client's shares, each readable by one neighbour.

    Attributes:
      client: whose.
      sealed: by neighbour, 88 bytes: a share of the self mask's seed and one of the masking key.
      digest: 32 bytes of the seed, by which the server knows it when it comes back.
    """

    client: int
    sealed: dict[int, bytes]
    digest: bytes


class Delivery(NamedTuple):
    """The sealed shares for one client, by the neighbour that sent them."""

    sealed: dict[int, bytes]


class MaskedUpload(NamedTuple):
    """A client's words u32[m], of which masks leave nothing to see."""

    client: int
    words: np.ndarray


class Survivors(NamedTuple):
    """Which clients, of one and its neighbours, have uploaded and which have not."""

    present: tuple[int, ...]
    dropped: tuple[int, ...]


class Revealed(NamedTuple):
    """The shares that a client holds: of present neighbours' seeds and of dropped ones' keys.

    Attributes:
      client: who holds them.
      seeds: by present client, itself included, 36 bytes.
      masking_keys: by dropped client, 36 bytes.
    """

    client: int
    seeds: dict[int, bytes]
    masking_keys: dict[int, bytes]


def message_bytes(message: Any) -> int:
    """Bytes of a message: four for each number, and the keys, shares and words in it."""
    if isinstance(message, int):
        return 4
    if isinstance(message, bytes):
        return len(message)
    if isinstance(message, np.ndarray):
        return message.nbytes
    if isinstance(message, dict):
        return sum(4 + message_bytes(value) for value in message.values())
    return sum(message_bytes(value) for value in message)
