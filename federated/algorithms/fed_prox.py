"""FedProx: local training with a proximal term that holds clients near the server.

Each client minimises  F_i(y) + (mu / 2) |y - x|²,  so its gradient gains mu (y - x).
Source: Li et al. 2020 (Federated Optimization in Heterogeneous Networks), equation 2.
"""

from __future__ import annotations

import jax

from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.averaging import averaging_bucket
from jaxfm.federated.local import Local
from jaxfm.federated.registry import register
from jaxfm.model import Model, Variables
from jaxfm.tasks import Task


@register(like="fed_avg")
def fed_prox(model: Model, task: Task, local: Local, *, mu: float = 0.01) -> Algorithm:
    """Federated averaging of proximal clients; mu = 0 is federated averaging.

    Partition: as in federated averaging.

    Args:
      model, task, local: as in `fed_avg`.
      mu: weight of the proximal term.
    Raises:
      ValueError: mu is negative or not finite.
    """
    if not 0 <= mu < float("inf"):
        raise ValueError(f"mu={mu} must be a weight of at least 0.")

    def towards(download: Variables):
        return lambda grads, params: jax.tree.map(
            lambda g, y, x: g + mu * (y - x), grads, params, download.params
        )

    bucket = averaging_bucket(model, task, local, grad_hook_at=towards)
    return fed_avg(model, task, local)._replace(buckets=(bucket,))
