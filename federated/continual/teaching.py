"""Learning without forgetting: the model of the last stage teaches the one that goes on.

    minimise  F_i(y) + strength T² KL(softmax(f(x; a) / T) || softmax(f(x; y) / T))

with a the variables at the end of the last stage and x the rows that the client has now.
Source: Li and Hoiem 2016 (Learning without Forgetting), equation 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.distillation import kl_divergence
from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Mean, Profile, mean
from jaxfm.federated.averaging import averaging_client, moved
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import RunState
from jaxfm.model import Array, Key, Model, Variables
from jaxfm.tasks import Task, prepare_weighted


class LwfState(NamedTuple):
    """The server's state.

    Attributes:
      variables: the global model.
      teacher: the variables at the end of the last stage.
      strength: f32[], of the second term; 0 in the first stage.
    """

    variables: Variables
    teacher: Variables
    strength: Array


class Lwf(NamedTuple):
    """An algorithm, and what happens between two stages.

    Attributes:
      algorithm: for `learn`.
      consolidate: `(state, population) -> state`, which makes the model its own teacher.
    """

    algorithm: Algorithm
    consolidate: Callable[[RunState, Population], RunState]


def lwf(
    model: Model, task: Task, local: Local, *, strength: float = 1.0, temperature: float = 2.0
) -> Lwf:
    """Federated averaging with distillation from the last stage's model.

    Args:
      model: with logits.
      task, local: as in `fed_avg`.
      strength: of the distillation; 0 is federated averaging.
      temperature: T.
    Raises:
      ValueError: settings out of range.
    """
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength={strength} must be a weight of at least 0.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be above 0 and finite.")
    plain = objective(model, task)

    def taught(download: LwfState) -> Callable:
        def loss(params, variables: Variables, batch, real: Array, key: Key):
            own, (stats, total, count) = plain(params, variables, batch, real, key)
            inputs, _, weight = prepare_weighted(task, batch, real, key)
            teacher, _ = model.apply(download.teacher, inputs)
            student, _ = model.apply(variables._replace(params=params), inputs)
            apart, rows = kl_divergence(teacher, student, weight, temperature)
            extra = download.strength * apart / jnp.where(rows > 0, rows, 1)
            return own + extra, (stats, total, count)

        return loss

    def client(download: LwfState, memory, data: ClientData, profile: Profile, key: Key):
        fit = averaging_client(local_fit(taught(download), local))
        return fit(download.variables, memory, data, profile, key)

    def server(state: LwfState, totals: Mean, public, key: Key):
        return state._replace(variables=moved(state.variables, mean(totals))), {}

    def init(variables: Variables) -> LwfState:
        return LwfState(variables, jax.tree.map(jnp.copy, variables), jnp.zeros(()))

    def consolidate(state: RunState, people: Population) -> RunState:
        own = state.server
        teacher = jax.tree.map(jnp.copy, own.variables)
        on = jnp.full_like(own.strength, strength)
        return state._replace(server=own._replace(teacher=teacher, strength=on))

    bucket = Bucket(model, lambda server, public: server, client)
    return Lwf(Algorithm(init, (bucket,), server, model), consolidate)
