"""FedNova: clients that take more steps pull no harder.

    x <- x + (sum_i p_i a_i) sum_i p_i (y_i - x) / a_i,   p_i = n_i / sum n

with a_i = a(K_i) the steps of client i, weighted as momentum accumulates them
(`jaxfm.federated.parts.sgd`). With equal steps it is federated averaging; with unequal ones
federated averaging minimises another objective than the clients' mean. One number more than in
federated averaging is uploaded.
Source: Wang et al. 2020, section 4.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Exact,
    Mean,
    Profile,
    mean,
    scaled,
)
from jaxfm.federated.algorithms.fed_avg import FedAvgState
from jaxfm.federated.averaging import Movement, difference, moved, send_variables
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.parts.sgd import accumulated, sgd_of
from jaxfm.federated.registry import register
from jaxfm.model import Array, Key, Model, Variables
from jaxfm.tasks import Task


class FedNovaUpload(NamedTuple):
    """Sums: n_i (y_i - x) / a_i (statistics: undivided) over n_i, and n_i a_i."""

    movement: Mean
    steps: Array


@register(like="fed_avg")
def fed_nova(model: Model, task: Task, local: Local) -> Algorithm:
    """Federated averaging of normalised movements.

    Partition: parameters and statistics are shared; statistics are averaged as they are.

    Args:
      model, task: as in `fed_avg`.
      local: with an optimizer that is gradient descent, with or without momentum.
    Raises:
      ValueError: another optimizer.
    """
    momentum = sgd_of(local.optimizer, "fed_nova").momentum
    fit = local_fit(objective(model, task), local)

    def client(download: Variables, memory, data: ClientData, profile: Profile, key: Key):
        trained, info = fit(download, data, profile.max_steps, key)
        examples, steps = info.examples, accumulated(info.spent.steps, momentum)
        params, stats = difference(trained, download)
        each = examples / jnp.where(steps > 0, steps, 1)
        movement = Movement(scaled(each, params), scaled(examples, stats))
        return FedNovaUpload(Mean(movement, Exact(examples)), examples * steps), memory, info

    def server(state: FedAvgState, totals: FedNovaUpload, public, key: Key):
        params, stats = mean(totals.movement)
        steps = mean(Mean(totals.steps, totals.movement.den))
        params = jax.tree.map(lambda d: steps.astype(d.dtype) * d, params)
        return FedAvgState(moved(state.variables, (params, stats))), {}

    return Algorithm(FedAvgState, (Bucket(model, send_variables, client),), server, model)
