"""FedProx: local training with a proximal term that holds clients near the server.

Each client minimises  F_i(y) + (mu / 2) |y - x|²,  so its gradient gains mu (y - x).
Source: Li et al. 2020 (Federated Optimization in Heterogeneous Networks), equation 2.
"""

from __future__ import annotations

import jax

from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.algorithms.fed_avg import averaging_bucket, fed_avg
from jaxfm.federated.local import Local
from jaxfm.model import Model, Variables
from jaxfm.tasks import Task


def fed_prox(model: Model, task: Task, local: Local, *, mu: float = 0.01) -> Algorithm:
    """Federated averaging of proximal clients; mu = 0 is federated averaging.

    Partition: as in federated averaging.

    Raises:
      ValueError: mu is negative.
    """
    if mu < 0:
        raise ValueError(f"mu must not be negative, got {mu}.")

    def towards(download: Variables):
        return lambda grads, params: jax.tree.map(
            lambda g, y, x: g + mu * (y - x), grads, params, download.params
        )

    bucket = averaging_bucket(model, task, local, grad_hook_at=towards)
    return fed_avg(model, task, local)._replace(buckets=(bucket,))
