"""Elastic weight consolidation: what earlier stages rely on moves less.

    minimise  F_i(y) + (strength / 2) sum_k I_k (y_k - a_k)²
    after a stage:  I <- decay I + E_rows (d log p / d y_k)²,   a <- y

with a the parameters at the end of the last stage and I the diagonal of the Fisher information,
which clients measure on their rows and of which the server gets the mean.
Sources: Kirkpatrick et al. 2017, equation 3; Schwarz et al. 2018 (Progress & Compress), section
4.1, for one importance instead of one for each stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Info,
    Mean,
    Profile,
    Spent,
    mean,
    weighted,
)
from jaxfm.federated.averaging import averaging_client, moved
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import RunState, compile_rounds
from jaxfm.model import Key, Model, PyTree, Variables
from jaxfm.tasks import Task, prepare_weighted


class EwcState(NamedTuple):
    """The server's state.

    Attributes:
      variables: the global model.
      anchor: a, like `variables.params`.
      importance: I, like them; zeros in the first stage.
    """

    variables: Variables
    anchor: PyTree
    importance: PyTree


class Ewc(NamedTuple):
    """An algorithm, and what happens between two stages.

    Attributes:
      algorithm: for `learn`.
      consolidate: `(state, population) -> state`: a round in which all clients measure I.
    """

    algorithm: Algorithm
    consolidate: Callable[[RunState, Population], RunState]


class EwcDownload(NamedTuple):
    """What a client needs: the model, the anchor and the importance."""

    variables: Variables
    anchor: PyTree
    importance: PyTree


def ewc(
    model: Model, task: Task, local: Local, *, strength: float = 100.0, decay: float = 1.0
) -> Ewc:
    """Federated averaging with elastic weight consolidation.

    Args:
      model, task, local: as in `fed_avg`.
      strength: of the penalty; 0 is federated averaging.
      decay: of the importance of earlier stages.
    Raises:
      ValueError: settings out of range.
    """
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength={strength} must be a weight of at least 0.")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} must be from 0 to 1.")
    loss = objective(model, task)

    def client(download: EwcDownload, memory, data: ClientData, profile: Profile, key: Key):
        def held(grads: PyTree, params: PyTree) -> PyTree:
            pull = lambda g, y, a, i: g + strength * i * (y - a)
            return jax.tree.map(pull, grads, params, download.anchor, download.importance)

        fit = averaging_client(local_fit(loss, local, held))
        return fit(download.variables, memory, data, profile, key)

    def send(server: EwcState, public) -> EwcDownload:
        return EwcDownload(*server)

    def server(state: EwcState, totals: Mean, public, key: Key):
        return state._replace(variables=moved(state.variables, mean(totals))), {}

    def init(variables: Variables) -> EwcState:
        zeros = jax.tree.map(jnp.zeros_like, variables.params)
        return EwcState(variables, jax.tree.map(jnp.copy, variables.params), zeros)

    algorithm = Algorithm(init, (Bucket(model, send, client),), server, model)
    return Ewc(algorithm, _consolidation(model, task, local.batch_size, decay))


def fisher_information(model: Model, task: Task, batch_size: int) -> Algorithm:
    """An algorithm of one round, after which `server` holds the mean of (d loss / d y)² over rows.

    Its state is (variables, importance); `y` is `variables.params`, the loss that of single rows.
    """

    def squared(variables: Variables, row: PyTree, real) -> PyTree:
        def loss(params):
            batch = jax.tree.map(lambda x: x[None], row)
            own = jnp.asarray(real, jnp.float32)[None]
            inputs, targets, weight = prepare_weighted(task, batch, own, None)
            output, _ = model.apply(variables._replace(params=params), inputs)
            total, count = task.loss(output, targets, weight)
            return total / jnp.where(count > 0, count, 1)

        return jax.tree.map(jnp.square, jax.grad(loss)(variables.params))

    def client(variables: Variables, memory, data: ClientData, profile: Profile, key: Key):
        def step(i, total):
            place = i * batch_size + jnp.arange(batch_size)
            rows = jnp.take(data.index, place, mode="clip")
            batch = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), dict(data.examples))
            own = jax.vmap(squared, (None, 0, 0))(variables, batch, place < data.count)
            return jax.tree.map(lambda t, x: t + x.sum(0), total, own)

        zeros = jax.tree.map(jnp.zeros_like, variables.params)
        steps = -(-data.count // batch_size)
        total = lax.fori_loop(0, steps, step, zeros)
        count = data.count.astype(jnp.float32)
        share = jax.tree.map(lambda x: x / jnp.maximum(count, 1), total)
        info = Info(Spent(steps.astype(jnp.float32)), count, jnp.zeros(()), jnp.zeros(()))
        return weighted(count, share), memory, info

    def server(state: FisherState, totals: Mean, public, key: Key):
        return state._replace(importance=mean(totals)), {}

    def init(variables: Variables) -> FisherState:
        return FisherState(variables, jax.tree.map(jnp.zeros_like, variables.params))

    send = lambda server, public: server.variables
    return Algorithm(init, (Bucket(model, send, client),), server, model)


class FisherState(NamedTuple):
    """The model, and what was measured of it."""

    variables: Variables
    importance: PyTree


def _consolidation(
    model: Model, task: Task, batch_size: int, decay: float
) -> Callable[[RunState, Population], RunState]:
    engines: dict = {}  # compiled when it is first needed, and once

    def consolidate(state: RunState, people: Population) -> RunState:
        if "engine" not in engines:
            measure = fisher_information(model, task, batch_size)
            everybody = len(people.bucket)
            engines["engine"] = compile_rounds(measure, people, cohort_size=everybody)
        engine, own = engines["engine"], state.server
        copied = jax.tree.map(jnp.copy, own.variables)
        after, _ = engine.run(engine.init(copied, jax.random.key(0)), people)
        new = after.server.importance
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(new))):
            raise ValueError("The importance of the parameters is not finite; the run diverged.")
        importance = jax.tree.map(lambda old, x: decay * old + x, own.importance, new)
        anchor = jax.tree.map(jnp.copy, own.variables.params)
        return state._replace(server=own._replace(anchor=anchor, importance=importance))

    return consolidate
