"""Gradient inversion: the images of a small batch, from the gradient that was uploaded for it.

    x* = argmin over x in [low, high]^n of  1 - cos(grad L(x, y), g) + alpha TV(x)

by Adam on the signs of the gradient, from random images. A client that takes one step of gradient
descent uploads g times its learning rate, of which the cosine sees only the direction.
Source: Geiping et al. 2020 (Inverting gradients), equation 4 and section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from scipy.optimize import linear_sum_assignment

from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.optimizer import update
from jaxfm.tasks import Task


class Inverted(NamedTuple):
    """What was recovered.

    Attributes:
      images: f32[B, ...], in no order among those of one label.
      mismatch: f32[], 1 - cos of their gradient and the one that was given; 0 is a perfect match.
    """

    images: Array
    mismatch: Array


def batch_gradient(
    model: Model, variables: Variables, task: Task, batch: dict[str, Array]
) -> PyTree:
    """The gradient of the task's mean loss on a batch, like the parameters, in evaluation mode."""

    return gradient_by(model.apply, variables, task, batch)


def gradient_by(
    apply: Callable, variables: Variables, task: Task, batch: dict[str, Array]
) -> PyTree:
    """As `batch_gradient`, by a model's `apply`, which compiled functions may be told apart by."""

    def loss(params: PyTree) -> Array:
        inputs, targets, weight = task.prepare(batch, None)
        outputs, _ = apply(variables._replace(params=params), inputs)
        total, count = task.loss(outputs, targets, weight)
        return total / jnp.where(count > 0, count, 1)

    return jax.grad(loss)(variables.params)


def invert_gradient(
    model: Model,
    variables: Variables,
    task: Task,
    gradient: PyTree,
    labels: Array,
    shape: tuple[int, ...],
    key: Key,
    *,
    leaf: str = "image",
    steps: int = 1000,
    restarts: int = 1,
    learning_rate: float = 0.1,
    total_variation: float = 1e-2,
    box: tuple[float, float] = (0.0, 1.0),
) -> Inverted:
    """Images whose gradient points where a given one does; the best of some random starts.

    Args:
      model, variables, task: that the gradient was taken with.
      gradient: like `variables.params`; an upload's movement, less its sign.
      labels: i32[B], which an attacker knows or reads off the last layer's gradient.
      shape: of one image, f32.
      key: of the starts.
      leaf: of the batch that holds images.
      steps: of Adam; its rate falls tenfold after 3/8, 5/8 and 7/8 of them, as in the paper.
      restarts: starts, side by side.
      learning_rate: of the first steps.
      total_variation: alpha, of the mean difference of neighbours; 0 for what is no image.
      box: least and largest value of a pixel.
    Raises:
      ValueError: steps or restarts below 1, or total_variation below 0.
    """
    if steps < 1 or restarts < 1 or total_variation < 0:
        raise ValueError(
            f"steps={steps} and restarts={restarts} must be at least 1, and "
            f"total_variation={total_variation} at least 0."
        )
    size = (len(labels), *shape)
    drops = {int(steps * part): 0.1 for part in (3 / 8, 5 / 8, 7 / 8)}
    schedule = optax.piecewise_constant_schedule(learning_rate, drops)
    adam = optax.adam(schedule)

    def mismatch(images: Array) -> Array:
        batch = {leaf: images, "label": jnp.asarray(labels)}
        return 1 - cosine(batch_gradient(model, variables, task, batch), gradient)

    def cost(images: Array) -> Array:
        return mismatch(images) + total_variation * _variation(images)

    def step(carry, _):
        images, state = carry
        signs = jnp.sign(jax.grad(cost)(images))
        updates, state = update(adam, signs, state, images)
        return (jnp.clip(images + updates, *box), state), None

    def one(key: Key) -> Inverted:
        start = jax.random.uniform(key, size, minval=box[0], maxval=box[1])
        (images, _), _ = lax.scan(step, (start, adam.init(start)), length=steps)
        return Inverted(images, mismatch(images))

    tries = jax.jit(lambda keys: lax.map(one, keys))(jax.random.split(key, restarts))
    return jax.tree.map(lambda x: x[jnp.argmin(tries.mismatch)], tries)


def reconstruction_error(images: Array, recovered: Array) -> np.ndarray:
    """The mean squared error f64[B] of each image beside the recovered one that is its match."""
    true, found = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (images, recovered))
    errors = np.square(true[:, None] - found[None]).mean(-1)
    rows, columns = linear_sum_assignment(errors)
    return errors[rows, columns]


def cosine(a: PyTree, b: PyTree) -> Array:
    """The cosine f32[] of two trees of floats, as long vectors."""
    inner = lambda x, y: sum(
        jnp.vdot(p.astype(jnp.float32), q.astype(jnp.float32))
        for p, q in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )
    return inner(a, b) * lax.rsqrt(inner(a, a) * inner(b, b) + 1e-30)


def _variation(images: Array) -> Array:
    """Mean absolute difference of neighbors along the two axes of images [B, H, W, ...]."""
    if images.ndim < 3:
        return jnp.zeros(())
    return jnp.abs(jnp.diff(images, axis=1)).mean() + jnp.abs(jnp.diff(images, axis=2)).mean()
