"""Who masks with whom: all pairs, or a random graph in which everybody has few neighbours.

With all pairs (Bonawitz et al. 2017) a client of n agrees on n - 1 seeds and expands each into a
mask. A random graph of degree k (Bell et al. 2020) costs it k of each, with k = O(log n): clients
stand on a circle in random order, each next to the k / 2 before and behind it.

Let a share c of the clients collude with an honest-but-curious server, and at most a share d drop
out. Whatever the masks hide stays hidden, but for a probability of 2^-40, if

- nobody has t corrupt neighbours, who could open its secrets:  n P[H(n - 1, c n, k) >= t];
- honest clients that stay are connected, which fails only where k / 2 in a row on the circle are
  corrupt or gone:  n (c + d)^(k / 2);

and a round succeeds, but for a probability of 2^-20, if everybody has t neighbours that stay:
n P[H(n - 1, n - d n, k) < t], with H the hypergeometric distribution.
Source: Bell et al. 2020 (Secure single-server aggregation with (poly)logarithmic overhead),
sections 3.2 and 3.3, for a semi-honest server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxfm.federated.secure.shamir import PRIME


class Graph(NamedTuple):
    """Who masks with whom in a round.

    Attributes:
      neighbours: by client, a number from 0 to 65519 in this round; symmetric.
      threshold: t, shares of a client and its neighbours that give its secrets back.
      least: clients whose sum may be read.
    """

    neighbours: dict[int, tuple[int, ...]]
    threshold: int
    least: int


def complete_graph(clients: Sequence[int], threshold: int | None = None) -> Graph:
    """All pairs; `threshold` clients (None: more than half) must stay, and no fewer can collude.

    Raises:
      ValueError: clients or threshold out of range.
    """
    _check_clients(clients)
    threshold = len(clients) // 2 + 1 if threshold is None else threshold
    if not 2 <= threshold <= len(clients):
        raise ValueError(
            f"threshold={threshold} must be at least 2 and at most {len(clients)}, the clients "
            "that there are."
        )
    return Graph(
        {i: tuple(j for j in clients if j != i) for i in clients}, threshold, least=threshold
    )


def sparse_graph(
    clients: Sequence[int],
    rng: np.random.Generator,
    *,
    corrupt: float = 0.1,
    dropped: float = 0.1,
) -> Graph:
    """A random graph of as few neighbours as its promises need; all pairs where that is not fewer.

    Args:
      clients: of the round.
      rng: of the order on the circle; the server's own.
      corrupt: c, the share of clients that may collude with the server.
      dropped: d, the share of clients that may drop out; with more the sum is refused.
    Raises:
      ValueError: clients or shares out of range.
    """
    _check_clients(clients)
    least = max(2, math.ceil((1 - dropped) * len(clients)))
    found = degree(len(clients), corrupt=corrupt, dropped=dropped)
    if found is None:
        return complete_graph(clients, least)
    size, threshold = found
    return ring(rng.permutation(np.asarray(clients)).tolist(), size, threshold, least)


def ring(order: Sequence[int], size: int, threshold: int, least: int) -> Graph:
    """The graph of a circle: each client next to the size / 2 before and behind it.

    Args:
      order: of the clients on the circle.
      size: k, an even number of neighbours, fewer than there are clients.
      threshold, least: as of `Graph`.
    Raises:
      ValueError: a number out of range.
    """
    _check_clients(order)
    if size % 2 or not 2 <= size < len(order):
        raise ValueError(
            f"size={size} must be an even number of neighbours, at least 2 and below the "
            f"{len(order)} clients."
        )
    if not 2 <= threshold <= size + 1 or not 2 <= least <= len(order):
        raise ValueError(
            f"threshold={threshold} must be from 2 to {size + 1}, a client and its neighbours, "
            f"and least={least} from 2 to {len(order)}, all clients."
        )
    steps = [step for step in range(-size // 2, size // 2 + 1) if step]
    beside = lambda place: tuple(sorted(order[(place + step) % len(order)] for step in steps))
    return Graph({client: beside(i) for i, client in enumerate(order)}, threshold, least)


def degree(
    num_clients: int,
    *,
    corrupt: float = 0.1,
    dropped: float = 0.1,
    security_bits: int = 40,
    failure_bits: int = 20,
) -> tuple[int, int] | None:
    """The least even k, and its t, that keep what the module promises; None: all pairs are needed.

    Raises:
      ValueError: shares of clients out of range.
    """
    if not (corrupt >= 0 and dropped >= 0 and corrupt + dropped < 1):
        raise ValueError(
            f"corrupt={corrupt} and dropped={dropped} must be shares of the clients, together "
            "below 1."
        )
    others, secure, failing = num_clients - 1, 2.0**-security_bits, 2.0**-failure_bits
    bad = min(others, math.ceil(corrupt * num_clients))
    staying = max(0, others - math.ceil(dropped * num_clients))
    for size in range(2, others, 2):
        if num_clients * (corrupt + dropped) ** (size / 2) > secure:
            continue
        corrupt_tail = np.cumsum(_hypergeometric(others, bad, size)[::-1])[::-1]  # P[>= t]
        staying_tail = np.cumsum(_hypergeometric(others, staying, size))  # P[<= t]
        for threshold in range(2, size + 1):
            if num_clients * corrupt_tail[threshold] <= secure:
                if num_clients * staying_tail[threshold - 1] <= failing:
                    return size, threshold
                break
    return None


def _hypergeometric(total: int, marked: int, drawn: int) -> np.ndarray:
    """f64[drawn + 1]: probabilities of so many marked ones among those drawn."""
    ways = math.comb(total, drawn)
    return np.array([
        math.comb(marked, i) * math.comb(total - marked, drawn - i) / ways for i in range(drawn + 1)
    ])  # fmt: skip


def _check_clients(clients: Sequence[int]) -> None:
    if len(clients) < 2 or len(set(clients)) < len(clients):
        raise ValueError(f"A secure sum needs at least 2 distinct clients; got {len(clients)}.")
    if min(clients) < 0 or max(clients) >= PRIME - 1:
        raise ValueError(f"Clients are numbers from 0 to {PRIME - 2} in a round.")
