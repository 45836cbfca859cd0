"""The sandwich rule: the largest, the smallest and random members of a supernet learn together.

Source: Yu and Huang 2019 (universally slimmable networks), sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxfm.distillation import kl_divergence
from jaxfm.model import Array, Model, PyTree, Variables
from jaxfm.optimizer import apply_gradients
from jaxfm.search.elastic.supernet import Supernet
from jaxfm.tasks import Task


def sandwich(
    net: Supernet,
    model: Model,
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    num_random: int = 2,
) -> Callable[..., tuple[Variables, PyTree, Array]]:
    """Returns `step(variables, opt_state, batch, key) -> (variables, opt_state, losses)`, jitted.

    One step minimises CE(largest) + KL(largest || smallest) + Σ KL(largest || random) with fixed
    soft targets; losses are f32[2 + num_random] in that order. Members are masks, so they share one
    compilation, and they run one after the other. Statistics of batch norm are those of the
    largest; `recalibrate` estimates those of a member. The first `opt_state` is
    `optimizer.init(variables.params)`.

    Args:
      net: the supernet.
      model: the model that it was made of.
      task: what the members learn.
      optimizer: of all members' parameters.
      num_random: number of random members per step.
    Raises:
      ValueError: num_random < 0.
    """
    if num_random < 0:
        raise ValueError(f"num_random={num_random} must be at least 0.")

    def mean(total: Array, weight: Array) -> Array:
        return total / jnp.maximum(weight, 1)

    @jax.jit
    def step(variables, opt_state, batch, key):
        prepare_key, sample_key, run_key = jax.random.split(key, 3)
        inputs, targets, weight = task.prepare(batch, prepare_key)
        members = jnp.concatenate(
            [jnp.asarray(net.smallest)[None], net.sample(sample_key, num_random)]
        )

        def largest(params):
            own = variables._replace(params=params)
            logits, stats = model.apply(own, inputs, train=True, key=run_key)
            return mean(*task.loss(logits, targets, weight)), (logits, stats)

        def member(params, counts, teacher):
            own = net.mask(variables._replace(params=params), counts)
            logits, _ = model.apply(own, inputs, train=True, key=run_key)
            return mean(*kl_divergence(teacher, logits, weight))

        (first, (teacher, stats)), grads = jax.value_and_grad(largest, has_aux=True)(
            variables.params
        )

        def add(grads, counts):
            loss, own = jax.value_and_grad(member)(
                variables.params, counts, lax.stop_gradient(teacher)
            )
            return jax.tree.map(jnp.add, grads, own), loss

        grads, losses = lax.scan(add, grads, members)
        params, opt_state = apply_gradients(optimizer, grads, opt_state, variables.params)
        losses = jnp.concatenate([first[None], losses])
        return variables._replace(params=params, stats=stats), opt_state, losses

    return step


def sandwich_steps(
    net: Supernet,
    model: Model,
    task: Task,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    steps: int,
    *,
    num_random: int = 2,
) -> Callable[[Any, Mapping[str, Array]], tuple[Any, Array]]:
    """Returns `(state, examples) -> (state, losses)`, one compiled scan of `sandwich`.

    Batches are drawn with replacement from keys folded by step, so that a resumed run sees the
    same. The state is donated.

    Args:
      net, model, task, optimizer, num_random: as in `sandwich`.
      batch_size: rows per step.
      steps: number of steps.
    Returns:
      A function of a NamedTuple `state` with fields `variables`, `opt_state`, `step` i32[] and
      `key`; losses are f32[steps, 2 + num_random].
    """
    step = sandwich(net, model, task, optimizer, num_random=num_random)

    def one(state: Any, examples: Mapping[str, Array]) -> tuple[Any, Array]:
        rows_key, key = jax.random.split(jax.random.fold_in(state.key, state.step))
        size = next(iter(examples.values())).shape[0]
        rows = jax.random.randint(rows_key, (batch_size,), 0, size)
        batch = {name: leaf[rows] for name, leaf in examples.items()}
        variables, opt_state, losses = step(state.variables, state.opt_state, batch, key)
        after = state._replace(variables=variables, opt_state=opt_state, step=state.step + 1)
        return after, losses

    run = lambda state, examples: lax.scan(lambda s, _: one(s, examples), state, length=steps)
    return jax.jit(run, donate_argnums=0)
