"""FedDyn: each client's objective moves with its past, so that all agree at the common optimum.

Client i minimises   F_i(y) - <l_i, y> + (alpha / 2) |y - x|²,   then   l_i <- l_i - alpha (y_i - x)
the server           h <- h - (alpha / N) sum_i (y_i - x);   x <- mean_i y_i - h / alpha

over those who report, with N all clients. l_i ends as the gradient of F_i where client i ended; it
stays at home, so the bytes are those of federated averaging. Clients count alike, as in the paper.
Source: Acar et al. 2021, algorithm 1.
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
    weighted,
)
from jaxfm.federated.averaging import difference, moved, send_variables
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.parts.control_variates import check_total
from jaxfm.federated.registry import register
from jaxfm.model import Key, Model, PyTree, Variables
from jaxfm.tasks import Task


class FedDynState(NamedTuple):
    """The model and h, a tree like its parameters."""

    variables: Variables
    drift: PyTree


class FedDynUpload(NamedTuple):
    """Sums: of the parameters' movements over the number of clients, of the statistics' over the
    number of examples."""

    params: Mean
    stats: Mean


@register(
    breaks={
        "identical_clients": "The drift h is divided by all clients, absent ones too.",
        "one_step": "The server adds h / alpha to the movement.",
    },
)
def fed_dyn(
    model: Model, task: Task, local: Local, *, num_clients: int, alpha: float = 0.01
) -> Algorithm:
    """Dynamic regularisation.

    Partition: parameters and statistics are shared; l_i, a tree like the parameters, is a client's
    memory. Statistics are averaged by examples.

    Args:
      model, task: as in `fed_avg`.
      local: any optimizer; the closer clients come to their minimum, the closer this is to the
        paper's method.
      num_clients: N, all clients there are, also those who never take part.
      alpha: weight of the regularisation; the paper uses 0.1 to 0.001.
    Raises:
      ValueError: alpha is not positive; num_clients below 1.
    """
    check_total("num_clients", num_clients)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha} must be a weight above 0.")
    loss = objective(model, task)
    zeros = lambda variables: jax.tree.map(jnp.zeros_like, variables.params)

    def init_client(download: Variables, data, profile, key) -> PyTree:
        return zeros(download)

    def client(download: Variables, slope: PyTree, data: ClientData, profile: Profile, key: Key):
        bend = lambda grads, params: jax.tree.map(
            lambda g, y, s, x: g - s + alpha * (y - x), grads, params, slope, download.params
        )
        trained, info = local_fit(loss, local, bend)(download, data, profile.max_steps, key)
        params, stats = difference(trained, download)
        slope = jax.tree.map(lambda s, d: s - alpha * d, slope, params)
        here = Exact(jnp.ones((), jnp.float32))
        upload = FedDynUpload(Mean(params, here), weighted(info.examples, stats))
        return upload, slope, info

    def server(state: FedDynState, totals: FedDynUpload, public, key: Key):
        drift = jax.tree.map(
            lambda h, d: (h.astype(d.dtype) - alpha / num_clients * d).astype(h.dtype),
            state.drift,
            totals.params.num,
        )
        pull = lambda d, h: d - h.astype(d.dtype) / alpha
        step = jax.tree.map(pull, mean(totals.params), drift)
        new = FedDynState(moved(state.variables, (step, mean(totals.stats))), drift)
        # Without a report h would go on pulling.
        came = totals.params.den.value > 0
        return jax.tree.map(lambda a, b: jnp.where(came, a, b), new, state), {}

    return Algorithm(
        lambda variables: FedDynState(variables, zeros(variables)),
        (Bucket(model, send_variables, client, init_client),),
        server,
        model,
    )
