"""The contract of every search strategy, and what a strategy knows of its problem.

A strategy proposes how much of each channel group to keep and learns from the scores. It sees only
arrays: group sizes, a projection onto the budget, scores. What the groups are and which network
they belong to is known to `jaxfm.search.evaluation`.

An *action* is one logit per group. All logits of a candidate are shifted together until the
candidate meets its budget (`jaxfm.search.strategies.project`), so the strategy chooses proportions
and the budget sets the level; equal logits are uniform pruning, whatever their value.

A complete strategy, hill climbing from the best candidate so far:

>>> import jax, jax.numpy as jnp
>>> from typing import NamedTuple
>>> class Climb(NamedTuple):
...     best: jax.Array   # f32[G]
...     score: jax.Array  # f32[]
>>> def climb(num_groups, *, batch=8, step=0.5):
...     def init(key):
...         return Climb(jnp.zeros(num_groups), jnp.array(-jnp.inf))
...     def ask(state, key):
...         noise = step * jax.random.normal(key, (batch, num_groups))
...         return state.best[None] + noise, state
...     def tell(state, actions, counts, scores):
...         i = jnp.argmax(scores)
...         better = scores[i] > state.score
...         best = jnp.where(better, actions[i], state.best)
...         return Climb(best, jnp.maximum(scores[i], state.score))
...     return Strategy(init, ask, tell, batch)
>>> from jaxfm.search.strategies.loop import run
>>> from jaxfm.search.strategies.strategy import separable
>>> run(separable(), climb(6), 64, jax.random.key(0)).best_score > -0.1
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, Key, PyTree
from jaxfm.search.strategies.project import Budget, projection, within


class Strategy(NamedTuple):
    """A way to search, as pure functions over a pytree of arrays.

    Attributes:
      init: `(key) -> state`.
      ask: `(state, key) -> (actions f32[n, G], state)`, n vectors of logits to try.
      tell: `(state, actions f32[n, G], counts i32[n, G], scores f32[n]) -> state`. `counts` are the
        channels that the projection made of the actions; scores are finite, higher is better.
      batch: n, the number of candidates of each `ask`.
    """

    init: Callable[[Key], Any]
    ask: Callable[[Any, Key], tuple[Array, Any]]
    tell: Callable[[Any, Array, Array, Array], Any]
    batch: int


class Problem(NamedTuple):
    """What is searched, as arrays and pure functions.

    Attributes:
      sizes: i32[G], channels of each group.
      project: `(logits f32[G]) -> counts i32[G]`, always within the budgets.
      fits: `(counts f32[G]) -> bool[]`, whether all budgets hold.
      evaluate: `(data, counts i32[n, G]) -> scores f32[n]`, higher is better.
      data: what `evaluate` reads (weights, images); an argument of the compiled loop, not a
        constant in it.
      costs: `(counts f32[G]) -> f32[K]`, further quantities that a Pareto front trades against the
        score; lower is better.
    """

    sizes: np.ndarray
    project: Callable[[Array], Array]
    fits: Callable[[Array], Array]
    evaluate: Callable[[PyTree, Array], Array]
    data: PyTree
    costs: Callable[[Array], Array]


def problem(
    sizes: np.ndarray,
    budgets: tuple[Budget, ...],
    evaluate: Callable[[PyTree, Array], Array],
    data: PyTree = (),
    *,
    channel_multiple: int = 1,
    fill: bool = True,
    costs: Callable[[Array], Array] | None = None,
) -> Problem:
    """Returns a problem whose candidates meet `budgets`.

    Args:
      sizes: i32[G], channels of each group.
      budgets: what every candidate meets.
      evaluate: `(data, counts i32[n, G]) -> scores f32[n]`, higher is better.
      data: what `evaluate` reads.
      channel_multiple, fill: as in `projection`.
      costs: `Problem.costs`; None means those of the budgets, each divided by its limit.
    Raises:
      ValueError: as `projection`.
    """
    sizes = np.asarray(sizes, np.int32)

    def shares(counts: Array) -> Array:
        return jnp.stack([b.cost(counts) / b.limit for b in budgets])

    return Problem(
        sizes=sizes,
        project=projection(sizes, budgets, channel_multiple=channel_multiple, fill=fill),
        fits=lambda counts: within(budgets, counts),
        evaluate=evaluate,
        data=data,
        costs=shares if costs is None else costs,
    )


def ratios(counts: Array, sizes: np.ndarray) -> Array:
    """Returns kept shares `counts / sizes`, f32 of the shape of `counts` i32[..., G]."""
    return counts.astype(jnp.float32) / jnp.broadcast_to(
        jnp.asarray(sizes, jnp.float32), counts.shape
    )


def to_logits(ratio: Array) -> Array:
    """Returns finite logits f32[...] of ratios in [0, 1], the inverse of the logistic function."""
    ratio = jnp.clip(ratio, 1e-3, 1 - 1e-3)
    return jnp.log(ratio) - jnp.log1p(-ratio)


def separable(num_groups: int = 6, *, target: np.ndarray | None = None, seed: int = 0) -> Problem:
    """Returns a problem with a known answer, for trying strategies out.

    Group g has 32 channels that cost w_g each, and the score is  -mean_g (k_g / 32 - target_g)²,
    at most 0. The budget is what the target itself costs, so the best score is 0 up to rounding.
    """
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.5, 2.0, num_groups).astype(np.float32)
    sizes = np.full(num_groups, 32, np.int32)
    if target is None:
        target = rng.uniform(0.15, 0.85, num_groups)
    target = np.asarray(target, np.float32)
    limit = float(np.sum(weight * sizes * target))
    data = {"target": jnp.asarray(target)}

    def cost(counts: Array) -> Array:
        return jnp.sum(counts * weight)

    def evaluate(data: PyTree, counts: Array) -> Array:
        aim = jnp.broadcast_to(data["target"], counts.shape)
        return -jnp.mean((ratios(counts, sizes) - aim) ** 2, axis=1)

    return problem(sizes, (Budget("cost", cost, limit),), evaluate, data)
