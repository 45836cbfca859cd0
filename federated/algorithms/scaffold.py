"""SCAFFOLD: clients correct each step for the drift that control variates have learned.

    y <- y - r (g - c_i + c);   x <- x + sum_i n_i (y_i - x) / sum_i n_i
    c_i <- c_i - c + (x - y_i) (1 - m) / (K r);   c <- c + sum_i (change of c_i) / N

over those who report, with N all clients (`jaxfm.federated.parts.control_variates`). Movements are
weighted as in federated averaging, so that without variates it is federated averaging; variates
are the paper's plain mean. A client downloads x and c, twice the bytes of federated averaging, and
uploads only the change of c_i, from which the server recovers y_i.
Source: Karimireddy et al. 2020, algorithm 1, option II.
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
    weighted,
)
from jaxfm.federated.averaging import moved
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.parts.control_variates import (
    check_num_clients,
    common_variate,
    corrected,
    movement,
    next_variate,
    no_variates,
    run_length,
)
from jaxfm.federated.parts.sgd import sgd_of
from jaxfm.federated.registry import register
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.tasks import Task


class ScaffoldState(NamedTuple):
    """The server: the model and c, a tree like its parameters; also what a client downloads."""

    variables: Variables
    variate: PyTree


class ScaffoldUpload(NamedTuple):
    """What one client sends.

    Attributes:
      gain: the change of c_i, like the parameters.
      length: f32[], K r / (1 - m); with it the gain says where the client ended.
      stats: the movement of the statistics, weighted by n_i.
    """

    gain: PyTree
    length: Array
    stats: Mean


class ScaffoldSums(NamedTuple):
    """The weighted movement, and the changes of c_i, which count alike."""

    movement: Mean
    gain: PyTree


@register(breaks={"identical_clients": "The variate c is divided by all clients, absent ones too."})
def scaffold(model: Model, task: Task, local: Local, *, num_clients: int) -> Algorithm:
    """Federated averaging of clients that correct their drift; full gradient information by c.

    Partition: parameters and statistics are shared; c_i is a client's memory. Statistics are
    averaged, and have no variates.

    Args:
      model, task: as in `fed_avg`.
      local: with an optimizer that is gradient descent, with or without momentum. Where it clips,
        a variate is the mean of clipped gradients.
      num_clients: N, all clients there are, also those who never take part.
    Raises:
      ValueError: another optimizer; num_clients below 1.
    """
    check_num_clients(num_clients)
    sgd = sgd_of(local.optimizer, "scaffold")
    loss = objective(model, task)

    def init(variables: Variables) -> ScaffoldState:
        return ScaffoldState(variables, no_variates(variables.params))

    def send(server: ScaffoldState, public) -> ScaffoldState:
        return server

    def init_client(download: ScaffoldState, data, profile, key) -> PyTree:
        return no_variates(download.variables.params)

    def client(download: ScaffoldState, own: PyTree, data: ClientData, profile: Profile, key: Key):
        start, common = download
        fit = local_fit(loss, local, corrected(own, common))
        trained, info = fit(start, data, profile.max_steps, key)
        steps = info.spent.steps
        new = next_variate(own, common, start.params, trained.params, steps, sgd)
        gain, stats = jax.tree.map(jnp.subtract, (new, trained.stats), (own, start.stats))
        stats = weighted(info.examples, Exact(stats))
        return ScaffoldUpload(gain, run_length(steps, sgd), stats), new, info

    def receive(server: ScaffoldState, public, upload: ScaffoldUpload) -> ScaffoldSums:
        stats, examples = upload.stats.num, upload.stats.den.value
        move = scaled(examples, movement(upload.gain, server.variate, upload.length))
        return ScaffoldSums(Mean((move, stats), examples), upload.gain)

    def server(state: ScaffoldState, totals: ScaffoldSums, public, key: Key):
        variate = common_variate(state.variate, totals.gain, num_clients)
        return ScaffoldState(moved(state.variables, mean(totals.movement)), variate), {}

    return Algorithm(init, (Bucket(model, send, client, init_client, receive),), server, model)
