"""Training on rows of one place: steps of one compiled scan, batches split over the devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfm.federated.local import objective
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.optimizer import apply_gradients
from jaxfm.tasks import Task


class TrainState(NamedTuple):
    """All that training needs to continue."""

    variables: Variables
    opt_state: PyTree
    step: Array
    key: Key


class Central(NamedTuple):
    """How the server trains in a central phase.

    Attributes:
      optimizer: keeps its state from one central phase to the next.
      batch_size: rows of a step.
    """

    optimizer: optax.GradientTransformation
    batch_size: int


def train_steps(
    model: Model,
    task: Task,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    steps: int,
    mesh: Mesh,
    places: PyTree = None,
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, Array]]:
    """Returns `(state, examples) -> (state, losses f32[steps])`, one compiled scan; state donated.

    Batches are drawn with replacement from keys folded by step, so a resumed run sees the same;
    each is split over the mesh axes "clients" and "data", if they divide it.

    Args:
      model, task, optimizer, batch_size, mesh: what is trained, and where.
      steps: of a call.
      places: a NamedSharding for each leaf of the state, such as of `parallel.mesh.spread`, which
        it keeps from step to step; XLA gathers a parameter where it is used. None: as XLA likes.
    """
    step = _one_step(model, task, Central(optimizer, batch_size), mesh)

    def run(state: TrainState, examples):
        def one(state: TrainState, _):
            state, total, count = step(state, examples)
            if places is not None:
                state = lax.with_sharding_constraint(state, places)
            return state, total / jnp.where(count > 0, count, 1)

        return lax.scan(one, state, length=steps)

    everywhere = NamedSharding(mesh, PartitionSpec())
    out = None if places is None else (places, everywhere)
    return jax.jit(run, donate_argnums=0, out_shardings=out)


def central_steps(
    model: Model, task: Task, central: Central, mesh: Mesh
) -> Callable[..., tuple[TrainState, Array, Array]]:
    """As `train_steps`, with the number of steps as an argument: one program for all of them.

    Only the optimizer's state is donated.

    Returns:
      `(state, examples, steps i32[]) -> (state, total f32[], count f32[])`: total / count is the
      mean loss, and count the targets that it was taken over; the same on all devices.
    """
    step = _one_step(model, task, central, mesh)

    def compiled(opt_state: PyTree, state: TrainState, examples, steps: Array):
        def one(_, carry):
            state, *sums = carry
            state, *new = step(state, examples)
            return state, *map(jnp.add, sums, new)

        zero = jnp.zeros((), jnp.float32)
        start = state._replace(opt_state=opt_state)
        return lax.fori_loop(0, steps, one, (start, zero, zero))

    everywhere = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(compiled, donate_argnums=0, out_shardings=everywhere)

    def run(state: TrainState, examples, steps: Array):
        return program(state.opt_state, state._replace(opt_state=()), examples, steps)

    return run


def _one_step(model: Model, task: Task, central: Central, mesh: Mesh) -> Callable:
    """`(state, examples) -> (state, total, count)`, of the loss of one batch."""
    axes = tuple(name for name in ("clients", "data") if mesh.shape.get(name, 1) > 1)
    shards = math.prod(mesh.shape[name] for name in axes)
    split = NamedSharding(
        mesh, PartitionSpec(axes) if central.batch_size % shards == 0 else PartitionSpec()
    )
    gradient = jax.value_and_grad(objective(model, task), has_aux=True)

    def step(state: TrainState, examples) -> tuple[TrainState, Array, Array]:
        size = next(iter(examples.values())).shape[0]
        rows_key, batch_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        rows = jax.random.randint(rows_key, (central.batch_size,), 0, size)
        batch = {name: leaf[rows] for name, leaf in examples.items()}
        batch = lax.with_sharding_constraint(batch, split)
        variables = state.variables
        (_, (stats, total, count)), grads = gradient(
            variables.params, variables, batch, jnp.ones(central.batch_size), batch_key
        )
        params, opt_state = apply_gradients(
            central.optimizer, grads, state.opt_state, variables.params
        )
        new = variables._replace(params=params, stats=stats)
        return TrainState(new, opt_state, state.step + 1, state.key), total, count

    return step
