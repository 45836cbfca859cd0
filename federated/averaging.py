"""The shared parts of federated averaging: what clients upload, and how the server moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.federated.algorithm import (
    Bucket,
    ClientData,
    Exact,
    Info,
    Mean,
    Profile,
    exact,
    weighted,
)
from jaxfm.federated.local import GradHook, Local, local_fit, objective
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.tasks import Task


class Movement(NamedTuple):
    """The movement of a client's variables; frozen parameters have none.

    Attributes:
      params: of the trained parameters, a tree like them.
      stats: of the statistics; `Exact` in an upload, since a rounded variance may be negative.
    """

    params: PyTree
    stats: PyTree


def difference(trained: Variables, start: Variables) -> Movement:
    """What moved: `trained` minus `start`."""
    less = lambda a, b: jax.tree.map(jnp.subtract, a, b)
    return Movement(less(trained.params, start.params), Exact(less(trained.stats, start.stats)))


def moved(variables: Variables, step: tuple, rate: Array | float = 1.0) -> Variables:
    """`variables` plus rate * step, with `step` (params, stats) in any float dtype."""

    def add(x, d):
        new = x.astype(d.dtype) + jnp.asarray(rate, d.dtype) * d
        # A count, say: to the nearest, since a mean of threes may be 2.9999998.
        whole = jnp.issubdtype(x.dtype, jnp.integer)
        return (jnp.round(new) if whole else new).astype(x.dtype)

    params, stats = step
    return variables._replace(
        params=jax.tree.map(add, variables.params, params),
        stats=jax.tree.map(add, variables.stats, exact(stats)),
    )


def where_covered(covered: PyTree, tree: PyTree) -> PyTree:
    """The tree, and zeros outside of the coordinates that are `covered`, bool like it."""
    return jax.tree.map(lambda m, x: jnp.where(m, x, jnp.zeros((), x.dtype)), covered, tree)


Fit = Callable[..., tuple[Variables, Info]]  # (variables, data, max_steps, key)


def averaging_client(fit: Fit) -> Callable[..., tuple[Mean, PyTree, Info]]:
    """Returns a `Bucket.client` that fits what it downloads and uploads n_i (y_i - x) and n_i."""

    def client(download: Variables, memory, data: ClientData, profile: Profile, key: Key):
        trained, info = fit(download, data, profile.max_steps, key)
        return weighted(info.examples, difference(trained, download)), memory, info

    return client


def averaging_bucket(
    model: Model,
    task: Task,
    local: Local,
    grad_hook_at: Callable[[Variables], GradHook] | None = None,
) -> Bucket:
    """Clients that train the whole model and upload n_i (y_i - x) and n_i.

    Args:
      model, task, local: what they train, on which loss, and how.
      grad_hook_at: `(download) -> GradHook`, for algorithms that change the local gradient.
    """
    loss = objective(model, task)

    fit = local_fit(loss, local)  # which refuses settings out of range, with a hook or without

    def bent(download: Variables, *rest):
        assert grad_hook_at is not None
        return local_fit(loss, local, grad_hook_at(download))(download, *rest)

    return Bucket(model, send_variables, averaging_client(bent if grad_hook_at else fit))


def send_variables(server, public) -> Variables:
    """A `Bucket.send`: the whole global model."""
    return server.variables
