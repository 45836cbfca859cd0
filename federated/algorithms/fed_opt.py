"""FedOpt: the mean of the clients' movements is a gradient for an optimizer on the server.

    d = sum_i n_i (y_i - x) / sum_i n_i;   x <- x + optimizer(-d)

Source: Reddi et al. 2021 (Adaptive Federated Optimization), algorithms 1 and 2; server momentum:
Hsu et al. 2019, section 4.2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfm.federated.algorithm import Algorithm, Mean, anybody, mean
from jaxfm.federated.averaging import averaging_bucket, moved
from jaxfm.federated.local import Local
from jaxfm.federated.registry import Setting, register
from jaxfm.model import Key, Model, PyTree, Variables
from jaxfm.optimizer import update
from jaxfm.tasks import Task

OWN_STEP = {"one_step": "The server's optimizer makes another step of the mean movement."}


class FedOptState(NamedTuple):
    """The model and the state of the server's optimizer."""

    variables: Variables
    opt_state: PyTree


def adagrad(setting: Setting, *, learning_rate: float = 0.1) -> optax.GradientTransformation:
    """The server's optimizer of a run by name: Adagrad, as in the paper's FedAdagrad.

    Args:
      learning_rate: of the server's steps.
    """
    check_rates(learning_rate=learning_rate)
    return optax.adagrad(learning_rate, initial_accumulator_value=0.0, eps=1e-3)


@register(like="fed_adam", breaks=OWN_STEP, optimizer=adagrad)
def fed_opt(
    model: Model, task: Task, local: Local, optimizer: optax.GradientTransformation
) -> Algorithm:
    """Federated averaging with any optax optimizer on the server.

    Partition: parameters and statistics are shared; statistics are averaged, not optimised. A
    round without a single upload changes nothing, the optimizer's moments included.

    Args:
      model, task, local: as in `fed_avg`.
      optimizer: of the server; `optax.sgd(1.0)` is federated averaging.
    """
    init, server = server_optimizer(optimizer)
    return Algorithm(init, (averaging_bucket(model, task, local),), server, model)


def server_optimizer(optimizer: optax.GradientTransformation):
    """The `init` and `server` of an algorithm whose uploads are a `Mean` of movements.

    Coordinates that nobody covered have a zero gradient; `optax.sgd(1.0)` is plain averaging.
    """

    def init(variables: Variables) -> FedOptState:
        return FedOptState(variables, optimizer.init(variables.params))

    def server(state: FedOptState, totals: Mean, public, key: Key):
        params_step, stats_step = mean(totals)
        gradient = jax.tree.map(
            lambda d, x: -d.astype(x.dtype), params_step, state.variables.params
        )
        updates, opt_state = update(optimizer, gradient, state.opt_state, state.variables.params)
        new = FedOptState(moved(state.variables, (updates, stats_step)), opt_state)
        came = anybody(totals.den)
        return jax.tree.map(lambda a, b: jnp.where(came, a, b), new, state), {}

    return init, server


@register(breaks=OWN_STEP)
def fed_adam(
    model: Model, task: Task, local: Local, *,
    learning_rate: float = 0.01, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3,
) -> Algorithm:  # fmt: skip
    """FedAdam: m and v without bias correction, as in the paper.

    Args:
      model, task, local: as in `fed_avg`.
      learning_rate: of the server's steps.
      b1, b2: decay of the moments m and v.
      tau: adaptivity, which is added to the root of v.
    Raises:
      ValueError: a value out of range.
    """
    check_rates(learning_rate=learning_rate, b1=b1, b2=b2, tau=tau)
    adam = optax.chain(_moments(b1, b2, tau, _adam_v), optax.scale(-learning_rate))
    return fed_opt(model, task, local, adam)


@register(like="fed_adam", breaks=OWN_STEP)
def fed_yogi(
    model: Model, task: Task, local: Local, *,
    learning_rate: float = 0.01, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3,
) -> Algorithm:  # fmt: skip
    """FedYogi: like FedAdam, with a v that moves by the sign of v - d².

    Args:
      model, task, local: as in `fed_avg`.
      learning_rate: of the server's steps.
      b1, b2: decay of the moments m and v.
      tau: adaptivity, which is added to the root of v.
    Raises:
      ValueError: a value out of range.
    """
    check_rates(learning_rate=learning_rate, b1=b1, b2=b2, tau=tau)
    yogi = optax.chain(_moments(b1, b2, tau, _yogi_v), optax.scale(-learning_rate))
    return fed_opt(model, task, local, yogi)


@register(like="fed_adam")
def fed_avg_m(
    model: Model, task: Task, local: Local, *, learning_rate: float = 1.0, momentum: float = 0.9
) -> Algorithm:
    """FedAvgM: server momentum; momentum 0 and learning rate 1 are federated averaging.

    Args:
      model, task, local: as in `fed_avg`.
      learning_rate: of the server's steps.
      momentum: share of the last step that the server keeps.
    Raises:
      ValueError: a value out of range.
    """
    check_rates(learning_rate=learning_rate, momentum=momentum)
    return fed_opt(model, task, local, optax.sgd(learning_rate, momentum))


def check_rates(*, learning_rate: float, tau: float = 1.0, **decays: float) -> None:
    """Raises ValueError for a rate that is not above 0 or a decay that is not in [0, 1)."""
    for name, value in {"learning_rate": learning_rate, "tau": tau}.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be a number above 0.")
    for name, value in decays.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must be a number from 0 and below 1.")


class _Moments(NamedTuple):
    m: PyTree
    v: PyTree


def _adam_v(v, d, b2):
    return b2 * v + (1 - b2) * jnp.square(d)


def _yogi_v(v, d, b2):
    return v - (1 - b2) * jnp.square(d) * jnp.sign(v - jnp.square(d))


def _moments(b1: float, b2: float, tau: float, next_v) -> optax.GradientTransformation:
    """d -> m / (sqrt(v) + tau); v starts at tau²."""

    def init(params) -> _Moments:
        full = lambda value: jax.tree.map(lambda x: jnp.full_like(x, value), params)
        return _Moments(full(0.0), full(tau**2))

    def step(d, state: _Moments, params=None):
        m = jax.tree.map(lambda m, d: b1 * m + (1 - b1) * d, state.m, d)
        v = jax.tree.map(lambda v, d: next_v(v, d, b2), state.v, d)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), m, v), _Moments(m, v)

    return optax.GradientTransformation(init, step)
