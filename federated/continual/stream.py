"""A stream of data as a schedule: what clients hold, stage after stage.

    stages = by_groups(train, test, train["label"] // 2, test["label"] // 2, num_clients=10, ...)
    stages = rehearsed(stages, capacity=50)

Every stage holds rows of the same examples, so that a run over all of them compiles once. Replay is
part of the schedule, too: what a client keeps of the past are more rows of its own. It depends on
the seed alone, so a resumed run sees the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxfm.data.federation import Federation, federate, leading_size, of_one_shape
from jaxfm.data.partition import iid


class Stage(NamedTuple):
    """A stretch of a stream.

    Attributes:
      name: for reports.
      federation: what clients hold in it.
      rounds: of training.
      test: examples [M, ...], by which it is measured what of this stage is known.
    """

    name: str
    federation: Federation
    rounds: int
    test: Mapping[str, np.ndarray]


def by_groups(
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
    train_group: np.ndarray,
    test_group: np.ndarray,
    *,
    num_clients: int,
    rounds: int,
    seed: int = 0,
    owner: np.ndarray | None = None,
) -> list[Stage]:
    """Returns a stage for each group of rows, in the order of their values.

    Groups are classes that come one after another (`label // 2`), sources of text, writers' years.

    Args:
      train, test: examples, leaves [N, ...] and [M, ...].
      train_group, test_group: [N] and [M], the group of each row.
      num_clients: among whom the rows of a group are dealt.
      rounds: of each stage.
      seed: of the dealing.
      owner: i[N], the client that a row belongs to, where there is one; None: rows are dealt out
        equally, at random.
    Raises:
      ValueError: unequal sizes, fewer than two groups, a group without test rows, an owner that is
        not among the clients.
    """
    train_group, test_group = np.asarray(train_group), np.asarray(test_group)
    for name, group, examples in (("train", train_group, train), ("test", test_group, test)):
        if group.shape != (leading_size(examples),):
            raise ValueError(
                f"{name}_group has shape {group.shape}; give one number for each of the "
                f"{leading_size(examples)} rows."
            )
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: give at least 1 for each stage.")
    groups = np.unique(train_group)
    if len(groups) < 2:
        raise ValueError(f"A stream needs two groups of rows or more; there is only {groups[0]!r}.")
    if owner is not None and (owner.min() < 0 or owner.max() >= num_clients):
        raise ValueError(
            f"owner has values from {owner.min()} to {owner.max()}; clients are 0 to "
            f"{num_clients - 1}."
        )
    stages = []
    for number, group in enumerate(groups):
        rows = np.flatnonzero(train_group == group)
        seen = np.flatnonzero(test_group == group)
        if not seen.size:
            raise ValueError(f"No test row belongs to the group {group!r}.")
        if owner is None:
            parts = [rows[part] for part in iid(len(rows), num_clients, seed=seed + number)]
        else:
            parts = [rows[owner[rows] == client] for client in range(num_clients)]
        own = {name: np.asarray(leaf)[seen] for name, leaf in test.items()}
        stages.append(Stage(str(group), federate(train, parts), rounds, own))
    return _of_one_shape(stages)


def rehearsed(stages: Sequence[Stage], capacity: int, *, seed: int = 0) -> list[Stage]:
    """Returns the stream with replay: each client keeps some rows of all it has had before.

    The memory is a uniform sample of the past (a reservoir: Vitter 1985, algorithm R).

    Args:
      stages: of a stream.
      capacity: rows that a client can keep; 0: none.
      seed: of the draws.
    Raises:
      ValueError: a negative capacity.
    """
    if capacity < 0:
        raise ValueError(f"capacity={capacity}: give the rows that a client can keep, 0 or more.")
    num_clients = len(stages[0].federation.count)
    streams = [np.random.default_rng((seed, client)) for client in range(num_clients)]
    kept: list[np.ndarray] = [np.zeros(0, np.int64) for _ in range(num_clients)]
    seen, out = np.zeros(num_clients, np.int64), []
    examples = {name: np.asarray(x) for name, x in stages[0].federation.examples.items()}
    for stage in stages:
        own = [stage.federation.rows_of(client) for client in range(num_clients)]
        parts = [np.concatenate(pair) for pair in zip(own, kept, strict=True)]
        out.append(stage._replace(federation=federate(examples, parts)))
        for client, rows in enumerate(own):
            kept[client] = _sampled(streams[client], kept[client], rows, seen[client], capacity)
            seen[client] += len(rows)
    return _of_one_shape(out)


def _sampled(
    rng: np.random.Generator, kept: np.ndarray, rows: np.ndarray, seen: int, capacity: int
) -> np.ndarray:
    """A uniform sample of all rows so far, of a sample of `seen` earlier ones and `rows`."""
    memory = list(kept)
    for number, row in enumerate(rng.permutation(rows), start=int(seen)):
        if len(memory) < capacity:
            memory.append(row)
        elif capacity and (place := rng.integers(number + 1)) < capacity:
            memory[place] = row
    return np.asarray(memory, np.int64)


def _of_one_shape(stages: Sequence[Stage]) -> list[Stage]:
    """The stages with indices of equal shapes, so that rounds compile once."""
    federations = of_one_shape([stage.federation for stage in stages])
    return [
        stage._replace(federation=federation)
        for stage, federation in zip(stages, federations, strict=True)
    ]
