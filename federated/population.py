"""Everybody who might take part in a run: clients, their data and their machines."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from jaxfm.data.federation import Federation
from jaxfm.federated.algorithm import Profile


class Population(NamedTuple):
    """Everybody who might take part.

    Attributes:
      federation: the clients' training data.
      profiles: their machines, leaves [C].
      bucket: i32[C], which bucket of the algorithm each client belongs to.
      local_validation: rows that clients hold back from training and may select by, over the same
        examples; None: none.
      home: i32[C], the device along the mesh axis "clients" that alone holds a client's data and
        memory; None: every device holds everybody's. Of clients that live on another process, a
        process may give empty data.
    """

    federation: Federation
    profiles: Profile
    bucket: np.ndarray
    local_validation: Federation | None = None
    home: np.ndarray | None = None


def check_population(
    population: Population, *, num_buckets: int, cohort_size: int, devices: int
) -> None:
    """Checks that the parts of a population fit each other and a run.

    Args:
      num_buckets: of the algorithm.
      cohort_size: clients drawn a round.
      devices: along the mesh axis "clients".
    Raises:
      ValueError: what does not fit, by name.
    """
    num_clients = population.federation.count.shape[0]
    validation, home = population.local_validation, population.home
    sizes = {"bucket": len(population.bucket), "index": len(population.federation.index.start)}
    sizes |= {} if validation is None else {"local_validation": validation.count.shape[0]}
    sizes |= {} if home is None else {"home": len(home)}
    sizes |= {f"profiles.{n}": x.shape[0] for n, x in population.profiles._asdict().items()}
    wrong = {name: size for name, size in sizes.items() if size != num_clients}
    if wrong:
        raise ValueError(
            f"The federation has {num_clients} clients, but leading sizes are {wrong}."
        )
    if not 1 <= cohort_size <= num_clients:
        raise ValueError(
            f"cohort_size={cohort_size} must be from 1 to the number of clients, {num_clients}."
        )
    why = f"the algorithm has buckets 0 to {num_buckets - 1}"
    _check_range("bucket", population.bucket, num_buckets, why)
    if home is not None:
        why = f'the mesh axis "clients" has devices 0 to {devices - 1}'
        _check_range("home", home, devices, why)
    index, count = population.federation.index, population.federation.count
    num_examples = jax.tree.leaves(population.federation.examples)[0].shape[0]
    _check_range("index", index.values, num_examples, f"there are {num_examples} examples")
    for client in np.flatnonzero((np.asarray(count) < 0) | (np.asarray(count) > index.size))[:1]:
        raise ValueError(
            f"Client {client} has count {count[client]}; its index has {index.size[client]} rows."
        )


def check_unmoved(before: Population, after: Population) -> None:
    """Checks that no client has changed its bucket or home; raises ValueError if one has."""
    for name in ("bucket", "home"):
        if not np.array_equal(getattr(before, name), getattr(after, name)):
            raise ValueError(
                f"Clients cannot change their {name} between calls: call compile_rounds again."
            )


def _check_range(name: str, values, limit: int, why: str) -> None:
    low, high = int(np.min(values)), int(np.max(values))
    if low < 0 or high >= limit:
        raise ValueError(f"{name} has values from {low} to {high}; {why}.")
