"""Training of a dense or a pruned model on rows of a task, in one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxfm.model import Array, Key, PyTree, Variables
from jaxfm.optimizer import update
from jaxfm.tasks import Task

Forward = Callable[[Variables, PyTree, Key], tuple[PyTree, PyTree]]
"""`(variables, inputs, key) -> (outputs, stats)` in training mode."""


def fine_tuner(
    forward: Forward, task: Task, optimizer: optax.GradientTransformation, batch_size: int
) -> Callable[[Variables, Mapping[str, Any], int, Key], Variables]:
    """Returns `fit(variables, examples, steps, key) -> variables`, one compiled scan.

    Batches are drawn with replacement; updates are multiplied by a cosine that falls from 1 to 0.

    Args:
      forward: of a `Model`, `lambda v, x, key: model.apply(v, x, train=True, key=key)`; of a pruned
        network, `sliced(network, kept, 1)` without the key.
      task: what is learned.
      optimizer: of the parameters.
      batch_size: rows per step.
    """
    loss = task_loss(forward, task)

    @functools.partial(jax.jit, static_argnums=2)
    def fit(variables: Variables, examples: PyTree, steps: int, key: Array) -> Variables:
        rows = len(next(iter(examples.values())))
        schedule = optax.cosine_decay_schedule(1.0, steps)

        def step(carry, i):
            variables, opt_state = carry
            rows_key, batch_key = jax.random.split(jax.random.fold_in(key, i))
            chosen = jax.random.randint(rows_key, (batch_size,), 0, rows)
            batch = {name: leaf[chosen] for name, leaf in examples.items()}
            grads, stats = jax.grad(loss, has_aux=True)(
                variables.params, variables, batch, batch_key
            )
            updates, opt_state = update(optimizer, grads, opt_state, variables.params)
            with jax.numpy_dtype_promotion("standard"):  # bfloat16 updates, float32 schedule
                updates = jax.tree.map(lambda u: (u * schedule(i)).astype(u.dtype), updates)
            params = optax.apply_updates(variables.params, updates)
            return (variables._replace(params=params, stats=stats), opt_state), None

        start = (variables, optimizer.init(variables.params))
        return jax.lax.scan(step, start, jnp.arange(steps))[0][0]

    return lambda variables, examples, steps, key: fit(variables, dict(examples), steps, key)


def task_loss(forward: Forward, task: Task) -> Callable[..., tuple[Array, PyTree]]:
    """Returns `loss(params, variables, batch, key) -> (mean loss f32[], stats)`."""

    def loss(params: PyTree, variables: Variables, batch: PyTree, key: Key):
        inputs, targets, weight = task.prepare(batch, key)
        outputs, stats = forward(variables._replace(params=params), inputs, key)
        total, count = task.loss(outputs, targets, weight)
        return total / jnp.where(count > 0, count, 1), stats

    return loss
