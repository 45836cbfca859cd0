"""Partitions of a data set over clients: who owns which example.

Every function returns one array of rows per client, `list[np.ndarray]` of i64. Arrays are disjoint
and together hold every row (`natural` leaves out rows without an owner). The same seed gives the
same partition. `jaxfm.data.federation.federate` makes a `Federation` of it.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Partition = list[np.ndarray]


def natural(keys: np.ndarray | Sequence, num_clients: int | None = None) -> Partition:
    """Gives each key's rows to one client.

    Args:
      keys: [N], the owner of each row: numbers or strings.
      num_clients: None makes one client of each distinct key, sorted. Given, keys are client
        numbers below it: a number without rows is an empty client, negative ones are nobody's.
    """
    keys = np.asarray(keys)
    if keys.ndim != 1:
        raise ValueError(f"keys must be [N], one owner for each example; got shape {keys.shape}.")
    if num_clients is None:
        names, keys = np.unique(keys, return_inverse=True)
        num_clients = len(names)
    elif not np.issubdtype(keys.dtype, np.integer):
        raise TypeError(f"With num_clients, keys must be client numbers; got dtype {keys.dtype}.")
    elif keys.size and keys.max() >= num_clients:
        raise ValueError(f"keys must be below num_clients={num_clients}; got {keys.max()}.")
    order = np.argsort(keys, kind="stable")
    cuts = np.searchsorted(keys[order], np.arange(num_clients + 1))
    return [order[start:stop] for start, stop in pairwise(cuts)]


def iid(num_examples: int, num_clients: int, *, seed: int) -> Partition:
    """Gives each client an equal share (to within one example) of the shuffled rows."""
    _check_enough(num_examples, num_clients, 1)
    return np.array_split(np.random.default_rng(seed).permutation(num_examples), num_clients)


def shards(
    labels: np.ndarray, num_clients: int, *, shards_per_client: int = 2, seed: int
) -> Partition:
    """Sorts rows by label, cuts them into equal shards and deals each client some of them.

    So a client sees few classes. Source: McMahan et al. 2017, "Communication-Efficient Learning of
    Deep Networks from Decentralized Data", section 3.
    """
    labels = _check_labels(labels)
    if shards_per_client < 1:
        raise ValueError(f"shards_per_client must be at least 1; got {shards_per_client}.")
    num_shards = num_clients * shards_per_client
    _check_enough(len(labels), num_clients, shards_per_client)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    pieces = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], num_shards)
    hands = rng.permutation(num_shards).reshape(num_clients, shards_per_client)
    return [np.concatenate([pieces[piece] for piece in hand]) for hand in hands]


def dirichlet(
    labels: np.ndarray,
    num_clients: int,
    *,
    beta: float,
    seed: int,
    min_examples: int = 1,
    balanced: bool = True,
    num_draws: int = 100,
) -> Partition:
    """Skews labels: each class is shared out by its own draw of proportions from Dir(beta).

    Small beta (0.1) gives clients of few classes, large beta (100) nearly IID ones.

    Args:
      labels: i[N], any number of classes.
      num_clients: C.
      beta: concentration, above 0.
      seed: of every draw.
      min_examples: of each client. The whole partition is drawn again, up to `num_draws` times,
        until every client has as many; if that fails, the last draw is repaired: clients with too
        few are given random examples of whichever client is the largest at the time.
      balanced: clients that already hold N / C examples get nothing of the classes still to come.
    Raises:
      ValueError: fewer than `num_clients * min_examples` examples, beta not above 0.

    Source: Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for
    Federated Visual Classification"; balancing and redrawing as in Li et al. 2021, "Federated
    Learning on Non-IID Data Silos".
    """
    labels = _check_labels(labels)
    _check_positive(beta)
    _check_enough(len(labels), num_clients, min_examples)
    rng = np.random.default_rng(seed)
    for _ in range(max(1, num_draws)):
        clients = _draw_by_label(labels, num_clients, beta, balanced, rng)
        if min(map(len, clients)) >= min_examples:
            return clients
    return _repair(clients, min_examples, rng)


def quantity(
    num_examples: int, num_clients: int, *, beta: float, seed: int, min_examples: int = 1
) -> Partition:
    """Skews quantities: contents are IID, sizes proportional to one draw from Dir(beta).

    Clients below `min_examples` are repaired as in `dirichlet`.
    """
    _check_positive(beta)
    _check_enough(num_examples, num_clients, min_examples)
    rng = np.random.default_rng(seed)
    share = _softmax(_log_dirichlet(beta, num_clients, rng))
    return _repair(_cut(rng.permutation(num_examples), share), min_examples, rng)


def holdout(partition: Partition, fraction: float, *, seed: int) -> tuple[Partition, Partition]:
    """Splits every client's own rows into (the rest, held out), for local test sets.

    A client with two rows or more holds out at least one and keeps at least one; a client with
    fewer holds out none.

    Raises:
      ValueError: a fraction outside of (0, 1), or one that would leave no client a row.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1; got {fraction}.")
    largest = max(map(len, partition), default=0)
    if largest > 2 and round(fraction * largest) >= largest:
        raise ValueError(
            f"Holding out {fraction} of each client's rows leaves nothing to train on, though the "
            f"largest client has {largest}; give a smaller share."
        )
    rng = np.random.default_rng(seed)
    rest, held = [], []
    for rows in partition:
        rows = rng.permutation(rows)
        cut = int(np.clip(round(fraction * len(rows)), 1, len(rows) - 1)) if len(rows) > 1 else 0
        held.append(rows[:cut])
        rest.append(rows[cut:])
    return rest, held


def match_labels(
    partition: Partition, labels: np.ndarray, other_labels: np.ndarray, *, seed: int
) -> Partition:
    """Shares out another data set (a test set) in each client's proportions of classes.

    Each class of `other_labels` goes to clients in proportion to what they own of it in
    `partition` of `labels`; a class that no client owns is shared out equally.
    """
    labels, other_labels = _check_labels(labels), _check_labels(other_labels)
    rng = np.random.default_rng(seed)
    pieces = []
    for label in np.unique(other_labels):
        owned = np.array([np.sum(labels[rows] == label) for rows in partition], float)
        owned = owned if owned.sum() else np.ones_like(owned)
        rows = rng.permutation(np.flatnonzero(other_labels == label))
        pieces.append(_cut(rows, owned / owned.sum()))
    return [np.concatenate(client) for client in zip(*pieces, strict=True)]


def _draw_by_label(
    labels: np.ndarray, num_clients: int, beta: float, balanced: bool, rng: np.random.Generator
) -> Partition:
    sizes = np.zeros(num_clients, np.int64)
    pieces = []
    for label in np.unique(labels):
        log_share = _log_dirichlet(beta, num_clients, rng)
        if balanced:
            # Never all at once: while rows remain, some client holds less than the mean.
            log_share[sizes >= len(labels) / num_clients] = -np.inf
        rows = rng.permutation(np.flatnonzero(labels == label))
        pieces.append(_cut(rows, _softmax(log_share)))
        sizes += [len(piece) for piece in pieces[-1]]
    return [rng.permutation(np.concatenate(client)) for client in zip(*pieces, strict=True)]


def _log_dirichlet(beta: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns log-shares of a Dirichlet draw, up to a constant; shares could underflow."""
    # Gamma(beta) = Gamma(beta + 1) * U^(1 / beta)
    log_uniform = -rng.exponential(size=size)
    return np.log(rng.gamma(beta + 1, size=size)) + log_uniform / beta


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _cut(rows: np.ndarray, share: np.ndarray) -> Partition:
    cuts = np.rint(np.cumsum(share)[:-1] * len(rows)).astype(np.int64)
    return np.split(rows, np.minimum(cuts, len(rows)))


def _repair(clients: Partition, min_examples: int, rng: np.random.Generator) -> Partition:
    clients = list(clients)
    sizes = np.array([len(rows) for rows in clients])
    for poor in np.flatnonzero(sizes < min_examples):
        while sizes[poor] < min_examples:
            rich = int(np.argmax(sizes))
            taken = rng.integers(sizes[rich])
            clients[poor] = np.append(clients[poor], clients[rich][taken])
            clients[rich] = np.delete(clients[rich], taken)
            sizes[poor] += 1
            sizes[rich] -= 1
    return clients


def _check_labels(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0:
        raise ValueError(f"labels must be [N] with N above 0; got shape {labels.shape}.")
    return labels


def _check_positive(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be above 0; got {beta}.")


def _check_enough(num_examples: int, num_clients: int, min_examples: int) -> None:
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1; got {num_clients}.")
    most = num_examples // max(1, min_examples)
    if num_clients > most:
        raise ValueError(
            f"{num_examples} examples cannot give each of {num_clients} clients {min_examples}; "
            + (f"use at most {most} clients." if most else f"ask for at most {num_examples}.")
        )
