"""Federated averaging.

    x <- x + sum_i n_i (y_i - x) / sum_i n_i

with y_i the parameters after client i's local epochs and n_i its number of examples.
Source: McMahan et al. 2017, algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Mean, Profile, mean, scaled
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.tasks import Task


class FedAvgState(NamedTuple):
    """The model is all that the server keeps."""

    variables: Variables


def fed_avg(model: Model, task: Task, local: Local) -> Algorithm:
    """Federated averaging of parameters and statistics.

    Partition: parameters and statistics are shared; nothing is personal.

    Args:
      model: what all clients train.
      task: its loss.
      local: optimizer, batch size and epochs on the client.
    """

    def server(state: FedAvgState, totals: Mean, public, key: Key):
        return FedAvgState(moved(state.variables, mean(totals))), {}

    return Algorithm(FedAvgState, (averaging_bucket(model, task, local),), server, model)


def averaging_bucket(model: Model, task: Task, local: Local, grad_hook_at=None) -> Bucket:
    """Clients that train the whole model and upload n_i (y_i - x) and n_i.

    Args:
      grad_hook_at: `(download) -> GradHook`, for algorithms that bend the local gradient.
    """
    loss = objective(model, task)
    fit = local_fit(loss, local)

    def send(server, public) -> Variables:
        return server.variables

    def client(download: Variables, memory, data: ClientData, profile: Profile, key: Key):
        bent = local_fit(loss, local, grad_hook_at(download)) if grad_hook_at else fit
        trained, info = bent(download, data, profile.max_steps, key)
        examples = info["examples"]
        return Mean(scaled(examples, difference(trained, download)), examples), memory, info

    return Bucket(model, send, client)


class Movement(NamedTuple):
    """Of the trainable part and of the statistics, each a tree like the variables' own.

    Compression leaves what is called `stats` alone (`compress.EXACT`).
    """

    params: PyTree
    stats: PyTree


def difference(trained: Variables, start: Variables) -> Movement:
    """What moved: `trained` minus `start`."""
    less = lambda a, b: jax.tree.map(jnp.subtract, a, b)
    return Movement(less(trained.params, start.params), less(trained.stats, start.stats))


def moved(variables: Variables, step: tuple, rate: Array | float = 1.0) -> Variables:
    """`variables` plus rate * step, with `step` (params, stats) in any float dtype."""
    add = lambda x, d: (x.astype(d.dtype) + jnp.asarray(rate, d.dtype) * d).astype(x.dtype)
    params, stats = step
    return variables._replace(
        params=jax.tree.map(add, variables.params, params),
        stats=jax.tree.map(add, variables.stats, stats),
    )
