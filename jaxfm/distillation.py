"""Distillation: a small model learns to predict what a large one does.

    minimise  T² KL(softmax(teacher / T) || softmax(student / T))

Source: Hinton et al. 2015, section 2. The teacher may be the student's own parent
(`jaxfm.subnet.extract`), an ensemble, or any function that gives logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxfm.data.federation import leading_size
from jaxfm.model import Array, Key, Model, Variables
from jaxfm.optimizer import apply_gradients
from jaxfm.tasks import Task


def kl_divergence(
    teacher: Array, student: Array, weight: Array, temperature: float = 1.0
) -> tuple[Array, Array]:
    """Returns (weighted sum of T² KL(teacher || student) in nats, sum of weights), in f32.

    Args:
      teacher, student: logits [..., V].
      weight: f32[...], 0 to ignore.
    """
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    divergence = (jnp.exp(log_p) * (log_p - log_q)).sum(-1) * temperature**2
    return jnp.sum(jnp.where(weight > 0, divergence * weight, 0)), jnp.sum(weight)


def distill(
    student: Model,
    variables: Variables,
    teacher: Callable[[Array], Array],
    task: Task,
    examples: Mapping[str, Array],
    *,
    steps: int,
    batch_size: int,
    optimizer: optax.GradientTransformation,
    key: Key,
    temperature: float = 1.0,
    divergence: Callable[..., tuple[Array, Array]] = kl_divergence,
) -> tuple[Variables, Array]:
    """Trains the student on the teacher's predictions, all steps in one compiled scan.

    Args:
      student: its `apply` gives logits.
      variables: the initial variables of the student.
      teacher: `(inputs) -> logits` of the same shape. A closure over parameters makes them
        constants of the program, so use `jax.tree_util.Partial(f, variables)` for large ones.
      task: makes inputs and weights of a batch; its targets are ignored.
      examples: leaves [N, ...]; batches are drawn with replacement.
      steps, batch_size: of training.
      key: of the draws.
      temperature: T.
      divergence: what is minimised, called like `kl_divergence`.
    Returns:
      The trained variables and the loss of each step, f32[steps].
    Raises:
      ValueError: no examples, leaves of different lengths, or steps, batch_size or temperature
        out of range.
    """
    if leading_size(examples) == 0:
        raise ValueError("There are no examples to distill on.")
    if steps < 1 or batch_size < 1 or temperature <= 0:
        raise ValueError(
            f"steps and batch_size must be at least 1 and temperature above 0; got {steps}, "
            f"{batch_size}, {temperature}."
        )
    program = partial(_distill, student.apply, task, optimizer, steps, batch_size, temperature)
    run = partial(program, divergence)
    return run(variables, jax.tree_util.Partial(teacher), dict(examples), key)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def _distill(
    apply, task, optimizer, steps, batch_size, temperature, divergence, variables, teacher,
    examples, key,
):  # fmt: skip
    size = leading_size(examples)

    def loss(params, variables, batch, key):
        inputs, _, weight = task.prepare(batch, key)
        logits, stats = apply(variables._replace(params=params), inputs, train=True, key=key)
        target = lax.stop_gradient(teacher(inputs))
        total, count = divergence(target, logits, weight, temperature)
        return total / jnp.maximum(count, 1), stats

    def step(carry, key):
        variables, opt_state = carry
        rows_key, batch_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (batch_size,), 0, size)
        batch = {name: jnp.asarray(leaf)[rows] for name, leaf in examples.items()}
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, stats), grads = gradient(variables.params, variables, batch, batch_key)
        params, opt_state = apply_gradients(optimizer, grads, opt_state, variables.params)
        return (variables._replace(params=params, stats=stats), opt_state), value

    start = variables, optimizer.init(variables.params)
    (variables, _), losses = lax.scan(step, start, jax.random.split(key, steps))
    return variables, losses
