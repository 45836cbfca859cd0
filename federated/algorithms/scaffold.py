"""SCAFFOLD: clients correct each step for the drift that control variates have learned.

    y <- y - r (g - c_i + c);   x <- x + sum_i n_i (y_i - x) / sum_i n_i
    c_i <- c_i - c + (x - y_i) / (r a(K));   c <- c + sum_i n_i (change of c_i) / n

over those who report, with n the examples of all clients. Movements are weighted as in federated
averaging, so that without variates it is federated averaging; variates too, or the run would end
elsewhere (`jaxfm.federated.parts.control_variates` derives it). In the paper all clients count
alike, whatever their sizes: `scaffold_published`. A client downloads x and c, twice the
bytes of federated averaging, and uploads only the change of c_i, from which the server recovers
y_i.
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
    check_total,
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
      length: f32[], r a(K); with it the gain says where the client ended.
      stats: the movement of the statistics, weighted by n_i.
    """

    gain: PyTree
    length: Array
    stats: Mean


class ScaffoldSums(NamedTuple):
    """The weighted movement, and the weighted changes of c_i."""

    movement: Mean
    gain: PyTree


BREAKS = {"identical_clients": "The variate c is divided by all clients, absent ones too."}


@register(breaks=BREAKS)
def scaffold(model: Model, task: Task, local: Local, *, total_examples: float) -> Algorithm:
    """Federated averaging of clients that correct their drift; full gradient information by c.

    Partition: parameters and statistics are shared; c_i is a client's memory. Statistics are
    averaged, and have no variates.

    Args:
      model, task: as in `fed_avg`.
      local: with an optimizer that is gradient descent, with or without momentum. Where it clips,
        a variate is the mean of clipped gradients.
      total_examples: n, of all clients there are, also those who never take part; with weights,
        the sum of these.
    Raises:
      ValueError: another optimizer; total_examples not above 0.
    """
    check_total("total_examples", total_examples)
    return _scaffold(model, task, local, total_examples, alike=False)


@register(like="scaffold", breaks=BREAKS | {"statistics": "All clients count alike."})
def scaffold_published(model: Model, task: Task, local: Local, *, num_clients: int) -> Algorithm:
    """SCAFFOLD as published: clients count alike, whatever their sizes, and so do variates.

    Args:
      model, task, local: as in `scaffold`.
      num_clients: N, all clients there are, also those who never take part.
    Raises:
      ValueError: another optimizer; num_clients below 1.
    """
    check_total("num_clients", num_clients)
    return _scaffold(model, task, local, num_clients, alike=True)


def _scaffold(model: Model, task: Task, local: Local, total: float, alike: bool) -> Algorithm:
    """SCAFFOLD whose clients count by their examples, or alike; `total` is what all of them do."""
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
        # An empty client weighs nothing, and clients that count alike weigh one.
        weight = jnp.sign(info.examples) if alike else info.examples
        stats = weighted(weight, Exact(stats))
        return ScaffoldUpload(gain, run_length(steps, sgd), stats), new, info

    def receive(server: ScaffoldState, public, upload: ScaffoldUpload) -> ScaffoldSums:
        stats, weight = upload.stats.num, upload.stats.den.value
        move = scaled(weight, movement(upload.gain, server.variate, upload.length))
        return ScaffoldSums(Mean((move, stats), weight), scaled(weight, upload.gain))

    def server(state: ScaffoldState, totals: ScaffoldSums, public, key: Key):
        variate = common_variate(state.variate, totals.gain, total)
        return ScaffoldState(moved(state.variables, mean(totals.movement)), variate), {}

    return Algorithm(init, (Bucket(model, send, client, init_client, receive),), server, model)
