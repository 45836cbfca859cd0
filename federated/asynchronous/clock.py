"""What makes a whole run asynchronous (`train(..., clock=...)`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxfm.federated.asynchronous.availability import Availability
from jaxfm.federated.asynchronous.schedule import Schedule, buffered, client_seconds
from jaxfm.federated.asynchronous.staleness import Staleness
from jaxfm.federated.placement import Placement


class Clock(NamedTuple):
    """Server steps by a simulated clock; a run with one does not wait for its clients.

    A run's bytes and energy are those of updates that arrived; what was spent on those that were
    lost is not in them.

    Attributes:
      buffer_size: updates of a server step, K.
      staleness: the weight of an update by its age; None: `polynomial(0.5)`.
      rate: on every update.
      mixes_models: a client's model counts, in the place of its movement (FedAsync).
      when: who can be reached; None: everybody.
      max_staleness: updates of models of more steps ago are lost; so many models are kept.
      jitter: deviation of the logarithm of the factor on a client's seconds.
    """

    buffer_size: int
    staleness: Staleness | None = None
    rate: float = 1.0
    mixes_models: bool = False
    when: Availability | None = None
    max_staleness: int = 16
    jitter: float = 0.0

    def plan(
        self, placement: Placement, steps: np.ndarray, concurrency: int, num_steps: int, seed: int
    ) -> Schedule:
        """Returns who arrives when; that of more steps begins like that of fewer.

        Args:
          placement: of clients with machines and one kind of model.
          steps: i32[C], local steps of each client.
          concurrency: clients at work at a time.
          num_steps: server steps.
          seed: of all that is drawn.
        Raises:
          ValueError: as of `buffered`; no machines, or models of several sizes.
        """
        if placement.machines is None:
            raise ValueError(
                "A clock needs clients' machines: place(..., machines=fleet(...)), or --profile."
            )
        if len(placement.costs) != 1:
            raise ValueError("A clock takes algorithms with one kind of client.")
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness={self.max_staleness} must be 0 or more.")
        seconds = client_seconds(placement.machines, placement.costs[0], steps)
        return buffered(
            seconds, concurrency=concurrency, buffer_size=self.buffer_size, num_steps=num_steps,
            when=self.when, max_staleness=self.max_staleness, jitter=self.jitter, seed=seed,
        )  # fmt: skip
