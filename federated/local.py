"""A client's own training: epochs of shuffled mini-batches, compiled, with two hooks.

The objective says what is minimised (distillation and mutual learning are objectives of their
own); the gradient hook changes its gradient (proximal terms, control variates, masks).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxfm.federated.algorithm import ClientData, Info, Spent, full_width
from jaxfm.federated.parts.microbatches import in_pieces
from jaxfm.federated.parts.private_gradient import (
    ExamplePrivacy,
    places,
    poisson_batch,
    private_gradient,
)
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.optimizer import apply_gradients
from jaxfm.tasks import Task, prepare_weighted

UNLIMITED_STEPS = 2**30  # a `max_steps` that no client reaches
_SMALL = 256  # rows that are sorted in no time


class Local(NamedTuple):
    """How a client trains in one round.

    Attributes:
      optimizer: starts anew in every round, if the algorithm does not say that clients keep it.
      batch_size: examples a step; the last batch of an epoch may be short and is weighted so.
      epochs: passes over the client's data, as far as its profile's `max_steps` allows.
      private: gradients that are differentially private by example, of batches by Poisson sampling,
        `batch_size` on average; None: plain gradients of shuffled batches.
      microbatch: rows whose activations are in memory at a time, the gradients of which are added
        up to the same step; it divides batch_size. 0: all of a batch. (`private` has chunks.)
    """

    optimizer: optax.GradientTransformation
    batch_size: int
    epochs: int = 1
    private: ExamplePrivacy | None = None
    microbatch: int = 0


# (params, variables, batch, real f32[B], key) -> (loss, (stats, total, count)); `real` is 0 for
# rows that only fill the batch, total / count is the mean loss in the task's own unit.
Objective = Callable[..., tuple[Array, tuple[PyTree, Array, Array]]]
# (gradient, params) -> gradient
GradHook = Callable[[PyTree, PyTree], PyTree]


def objective(model: Model, task: Task) -> Objective:
    """The task's mean loss over the real rows of a batch."""

    def loss(params, variables: Variables, batch, real: Array, key: Key):
        inputs, targets, weight = prepare_weighted(task, batch, real, key)
        output, stats = model.apply(variables._replace(params=params), inputs, train=True, key=key)
        total, count = task.loss(output, targets, weight)
        return total / jnp.where(count > 0, count, 1), (stats, total, count)

    return loss


class _Carry(NamedTuple):
    variables: Variables
    opt_state: PyTree
    total: Array
    count: Array  # type: ignore[assignment]  # hides a method of tuple


class ContinuedFit(NamedTuple):
    """Local training whose optimizer goes on where the client's last round left it.

    Attributes:
      start: `(variables) -> opt_state`, before the first round.
      fit: `(variables, opt_state, data, max_steps, key) -> (variables, opt_state, info: Info)`.
    """

    start: Callable[[Variables], PyTree]
    fit: Callable[..., tuple[Variables, PyTree, Info]]


def local_fit(loss: Objective, local: Local, grad_hook: GradHook | None = None) -> Callable:
    """Returns `fit(variables, data, max_steps, key) -> (variables, info: Info)`.

    Only `variables.params` are trained; frozen parameters are in no gradient and no optimizer
    state. Parameters of 16 bits are trained as copies of 32 bits, since steps much smaller than a
    number would be rounded away; gradients and hooks see 16 bits, and the end is rounded once.
    Numbers of steps and examples are arrays, so they never recompile. Under `vmap` all clients run
    as many steps as the longest, and those that are done keep their values.

    Raises:
      ValueError: batch_size or epochs below 1; settings of `local.private` out of range; a
        microbatch that does not divide batch_size.
    """
    start, fit = continued_fit(loss, local, grad_hook)

    def anew(variables: Variables, data: ClientData, max_steps: Array, key: Key):
        trained, _, info = fit(variables, start(variables), data, max_steps, key)
        return trained, info

    return anew


def continued_fit(loss: Objective, local: Local, grad_hook: GradHook | None = None) -> ContinuedFit:
    """As `local_fit`, for clients that keep their optimizer's state from round to round."""
    size = local.batch_size
    if size < 1 or local.epochs < 1:
        raise ValueError(f"batch_size and epochs must be at least 1, got {size}, {local.epochs}.")
    private = local.private
    if private is not None and local.microbatch:
        raise ValueError(
            f"microbatch={local.microbatch} changes nothing with gradients private by example; "
            "give those a chunk."
        )
    if private is not None:
        private.check()
        gradient = private_gradient(loss, private, size)
    else:
        gradient = jax.value_and_grad(loss, has_aux=True)
        gradient = in_pieces(gradient, size, local.microbatch or size)

    def batch_of(data: ClientData, i: Array, order: Array, key: Key) -> tuple[Array, Array]:
        """The rows of a step, and 1 for those that are real."""
        if private is not None:
            room = places(size, data.index.shape[0], private.chunk)
            return poisson_batch(data, size, room, jax.random.fold_in(key, i))
        place = i * size + jnp.arange(size)
        # A short batch is filled up with rows of the same client: batch norm sees them.
        rows = data.index[order[place % data.count]]
        return rows, (place < data.count).astype(jnp.float32)

    def start(variables: Variables) -> PyTree:
        return local.optimizer.init(jax.tree.map(full_width, variables.params))

    def fit(variables: Variables, opt_state: PyTree, data: ClientData, max_steps: Array, key: Key):
        steps_per_epoch = (data.count + size - 1) // size
        dtypes = jax.tree.map(lambda x: x.dtype, variables.params)
        narrow = lambda params: jax.tree.map(lambda x, dtype: x.astype(dtype), params, dtypes)

        def step(i, carry: _Carry, order, key) -> _Carry:
            rows, real = batch_of(data, i, order[0], order[1])
            batch = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), dict(data.examples))
            params = carry.variables.params
            seen = narrow(params)
            (_, (stats, total, count)), grads = gradient(
                seen, carry.variables._replace(params=seen), batch, real,
                jax.random.fold_in(key, i),
            )  # fmt: skip
            grads = grads if grad_hook is None else grad_hook(grads, seen)
            grads = jax.tree.map(full_width, grads)
            params, opt_state = apply_gradients(local.optimizer, grads, carry.opt_state, params)
            variables = carry.variables._replace(params=params, stats=stats)
            return _Carry(variables, opt_state, carry.total + total, carry.count + count)

        def epoch(e, carry: _Carry) -> _Carry:
            order_key, step_key = jax.random.split(jax.random.fold_in(key, e))
            order = (_shuffled(order_key, data), order_key)
            steps = jnp.clip(max_steps - e * steps_per_epoch, 0, steps_per_epoch)
            return lax.fori_loop(0, steps, lambda i, c: step(i, c, order, step_key), carry)

        zero = jnp.zeros((), jnp.float32)
        masters = jax.tree.map(full_width, variables.params)
        carry = _Carry(variables._replace(params=masters), opt_state, zero, zero)
        if local.epochs == 1:
            carry = epoch(0, carry)
        else:  # as many as there is time for
            epochs = jnp.clip(-(-max_steps // jnp.maximum(steps_per_epoch, 1)), 0, local.epochs)
            carry = lax.fori_loop(0, epochs, epoch, carry)
        steps = jnp.minimum(max_steps, local.epochs * steps_per_epoch).astype(jnp.float32)
        trained = carry.variables._replace(params=narrow(carry.variables.params))
        info = Info(Spent(steps), examples_of(data), carry.total, carry.count)
        return trained, carry.opt_state, info

    return ContinuedFit(start, fit)


def examples_of(data: ClientData) -> Array:
    """f32[]: how much a client counts: its rows, or the sum of their "weight" where they have one.

    A row of weight 2 then counts as two rows, in training as in evaluation.
    """
    if "weight" not in data.examples:
        return data.count.astype(jnp.float32)
    weight, lanes = data.examples["weight"], min(128, data.index.shape[0])

    def add(i: Array, total: Array) -> Array:
        place = i * lanes + jnp.arange(lanes)
        own = weight[jnp.take(data.index, place, mode="clip")].astype(jnp.float32)
        return total + jnp.where(place < data.count, own, 0).sum()

    return lax.fori_loop(0, -(-data.count // lanes), add, jnp.zeros((), jnp.float32))


def _shuffled(key: Key, data: ClientData) -> Array:
    """i32: positions in `data.index`, the real ones first and in random order.

    What is sorted is as long as the client needs, in a few sizes, and not as its table, which is as
    long as the largest client's. The order is the same: a draw does not depend on how many follow.
    (Under `vmap` all sizes are sorted, together a seventh more than the longest.)
    """
    rows = data.index.shape[0]
    sizes = [*itertools.takewhile(lambda n: n < rows, (_SMALL * 8**k for k in itertools.count()))]
    sizes.append(rows)

    def of(size: int) -> Callable[[], Array]:
        def order() -> Array:
            draws = jax.random.bits(key, (size,))
            last = jnp.where(jnp.arange(size) < data.count, draws, ~jnp.zeros_like(draws))
            return jnp.pad(jnp.argsort(last, stable=True).astype(jnp.int32), (0, rows - size))

        return order

    if len(sizes) == 1:
        return of(rows)()
    number = (data.count > jnp.array(sizes[:-1])).sum(dtype=jnp.int32)
    return lax.switch(number, [of(size) for size in sizes])
