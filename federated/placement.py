"""Who trains what: clients on their machines, and the model that each of them trains."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxfm.data.dealing import Data
from jaxfm.data.federation import Federation, summary
from jaxfm.federated.accounting.ledger import ClientCost, client_costs
from jaxfm.federated.accounting.memory import compiled_costs
from jaxfm.federated.accounting.resources import (
    Device,
    assign,
    fleet_profiles,
    plan,
    profiles,
)
from jaxfm.federated.algorithm import Algorithm, Profile
from jaxfm.federated.local import UNLIMITED_STEPS, Local
from jaxfm.federated.population import Population
from jaxfm.model import PyTree, Variables


class Placement(NamedTuple):
    """Clients on their machines.

    Attributes:
      costs: of one client, by bucket.
      bucket: i32[C], what each trains.
      profiles: their machines, as clients know them.
      machines: of all clients, with their energy; None: there are none to simulate.
      deadline_s: simulated seconds in which a round ends.
    """

    costs: tuple[ClientCost, ...]
    bucket: np.ndarray
    profiles: Profile
    machines: Device | None
    deadline_s: float


def place(
    algorithm: Algorithm,
    train: Federation,
    variables: Variables,
    *,
    public: PyTree = None,
    local_validation: Federation | None = None,
    machines: Device | None = None,
    steps: np.ndarray | None = None,
    deadline_s: float | None = None,
    max_steps: int = UNLIMITED_STEPS,
) -> Placement:
    """Places clients on machines, each with the largest model that it can hold and train in time.

    Without machines clients take turns: each has the memory that one of the buckets needs. Where
    the algorithm has planned who trains what (`Algorithm.assignment`), that stands.

    Args:
      algorithm: its buckets, the largest model first.
      train: the clients' training data.
      variables: that the run starts from.
      public, local_validation: as in `compile_rounds` and `Population`.
      machines: of all clients, see `fleet`.
      steps: i32[C], local steps that clients would like to take in a round (`wanted_steps`);
        required with machines.
      deadline_s: as in `plan`.
      max_steps: the most local steps of a client without machines.
    Raises:
      ValueError: a client whose memory or whose time suffices for no model.
    """
    num_clients = len(train.count)
    # Costs do not depend on who is in which bucket.
    anywhere = Population(
        train, profiles(num_clients), np.zeros(num_clients, np.int32), local_validation
    )
    # A machine's memory must hold activations, too; without machines only the order counts.
    priced = client_costs if machines is None else compiled_costs
    costs, bucket = priced(algorithm, anywhere, variables, public), algorithm.assignment
    if machines is not None:
        if steps is None:
            raise ValueError("place(machines=...) needs steps=wanted_steps(train, local).")
        chosen = plan(machines, costs, steps, deadline_s, bucket)
        own = fleet_profiles(machines, chosen.max_steps)
        return Placement(costs, chosen.bucket, own, machines, chosen.deadline_s)
    needs = np.array([cost.memory_bytes for cost in costs], np.float64)
    turn = np.arange(num_clients) % len(needs) if bucket is None else bucket
    own = profiles(num_clients, max_steps=max_steps, memory_bytes=1.01 * needs[turn])
    bucket = assign(own, needs.tolist()) if bucket is None else bucket
    return Placement(costs, np.asarray(bucket, np.int32), own, None, float("inf"))


def wanted_steps(train: Federation, local: Local, max_steps: int = UNLIMITED_STEPS) -> np.ndarray:
    """i32[C]: the local steps of a round that each client's data make, up to `max_steps`."""
    steps = local.epochs * -(-np.asarray(train.count) // local.batch_size)
    return np.minimum(steps, max_steps).astype(np.int32)


def capped_epochs(placement: Placement, train: Federation, local: Local) -> str:
    """A sentence on clients whose local epochs end early for lack of steps; empty without any."""
    wanted, allowed = wanted_steps(train, local), np.asarray(placement.profiles.max_steps)
    early = wanted > allowed
    if not early.any():
        return ""
    fewest, most = allowed[early].min(), wanted[early].max()
    return (
        f"Local epochs end early for {early.sum()} of {len(wanted)} clients, after {fewest} steps "
        f"a round or more where epochs={local.epochs} would make up to {most}: max_steps or the "
        "deadline ends them."
    )


def describe_clients(placement: Placement, data: Data) -> str:
    """A table of clients and buckets, for people."""
    labels = data.train.examples.get("label")
    table = summary(data.train, None if labels is None else np.asarray(labels), data.names)
    lines = [table, ""]
    kind = "of parameters, optimizer state and gradient"  # no activations: see `place`
    if placement.machines is not None:
        kind = "while training"
    for b, cost in enumerate(placement.costs):
        lines.append(
            f"bucket {b}: {int((placement.bucket == b).sum())} clients, {cost.parameters:,} "
            f"parameters, {cost.memory_bytes / 1e6:.1f} MB {kind}, "
            f"{cost.bytes_down / 1e6:.2f} MB down and {cost.bytes_up / 1e6:.2f} MB up a round, "
            f"{cost.flops_per_step / 1e9:.2f} GFLOP a step"
        )
    if placement.machines is not None and np.isfinite(placement.deadline_s):
        lines.append(f"a round ends within {placement.deadline_s:.3g} simulated seconds")
    return "\n".join(lines)
