"""A budget of bytes, up and down and of all clients together, that a run never exceeds.

The ledger says what rounds have taken. Who is drawn for the next one, and who of them reports,
follows from the run's key, so what it can take is known before it runs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.accounting.ledger import ClientCost
from jaxfm.federated.cohort import Rate, draw
from jaxfm.model import Array


class ByteBudget(NamedTuple):
    """What a run may take, and what its clients cost.

    Attributes:
      limit: bytes of all uploads and downloads together.
      costs: of one client, by bucket.
      bucket: i32[C], of each client.
      count: i32[C], their rows.
      cohort_size, rate: as of `cohorts_of`.
      drop_rate: as in `compile_rounds`.
    """

    limit: int
    costs: tuple[ClientCost, ...]
    bucket: np.ndarray
    # This name hides a method of tuple that nobody needs here.
    count: np.ndarray  # type: ignore[assignment]
    cohort_size: int
    rate: Rate = None
    drop_rate: float = 0.0

    def next_round(self, key: Array, number: Array, served: np.ndarray) -> int:
        """Bytes that a round takes at most: exactly so many if no client measures its own.

        Args:
          key, number: of the run and of the round, as in its state.
          served: bool[C], who was drawn before.
        """
        drawn, reports = jax.device_get(
            draw(
                key, number, len(self.count), self.cohort_size, jnp.float32(self.drop_rate),
                self.rate,
            )
        )  # fmt: skip
        total = 0
        for client in drawn[drawn >= 0]:
            cost = self.costs[self.bucket[client]]
            sends = bool(reports[client]) and self.count[client] > 0
            downloads = 1 + cost.most_caught_up * sends
            total += downloads * cost.bytes_down + sends * cost.bytes_up
            total += 0 if served[client] else cost.bytes_once
        return total

    def ends(self, key: Array, number: Array, served: np.ndarray, taken: float) -> str:
        """A sentence if the next round may not fit into what is left; else empty.

        Args:
          key, number, served: as in `next_round`.
          taken: bytes so far.
        """
        needed, left = self.next_round(key, number, served), self.limit - int(taken)
        if needed <= left:
            return ""
        return (
            f"Stopped after round {int(number)}: of byte_budget={self.limit} {left:,} bytes are "
            f"left, and the next round takes up to {needed:,}."
        )
