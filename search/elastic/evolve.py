"""The best member of a supernet within a budget: an accuracy predictor, then evolution.

A small MLP learns the score of architectures from some that were measured; NSGA-II then evolves
architectures against it. Each is projected onto the budget, so none has to be drawn again.
Source: Cai et al. 2020 (Once-for-All), section 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxfm.model import Array, Key
from jaxfm.optimizer import apply_gradients
from jaxfm.search.elastic.supernet import Supernet
from jaxfm.search.strategies.loop import run
from jaxfm.search.strategies.nsga2 import nsga2
from jaxfm.search.strategies.project import Budget, within
from jaxfm.search.strategies.strategy import Problem, ratios


class Predictor(NamedTuple):
    """A fitted predictor of scores.

    Attributes:
      predict: `(counts i32[n, G]) -> scores f32[n]`.
      rank_correlation: Spearman's ρ on the held-out architectures.
    """

    predict: Callable[[Array], Array]
    rank_correlation: float


def rank_correlation(a: Array, b: Array) -> Array:
    """Returns Spearman's ρ of f32[n] and f32[n], in [-1, 1]; ties are ranked in their order."""
    ranks = [jnp.argsort(jnp.argsort(x)).astype(jnp.float32) for x in (a, b)]
    x, y = (rank - rank.mean() for rank in ranks)
    return (x * y).sum() / jnp.sqrt((x * x).sum() * (y * y).sum())


def fit_predictor(
    net: Supernet,
    counts: np.ndarray,
    scores: np.ndarray,
    key: Key,
    *,
    hidden: int = 64,
    steps: int = 500,
    learning_rate: float = 1e-2,
    held_out: float = 0.2,
) -> Predictor:
    """Fits an MLP with two hidden layers to measured architectures, in one compiled loop.

    Args:
      net: the supernet.
      counts, scores: i32[n, G] and f32[n], measured, in random order.
      key: key of the initial weights.
      hidden: width of the MLP.
      steps, learning_rate: those of Adam on the whole set.
      held_out: share of the rows, at the end, that only measures the rank correlation.
    Raises:
      ValueError: fewer than two rows on either side, or lengths that differ.
    """
    n = len(scores)
    train = n - round(n * held_out)
    if len(counts) != n or train < 2 or n - train < 2:
        raise ValueError(
            f"{len(counts)} architectures and {n} scores with held_out={held_out} leave {train} to "
            f"fit and {n - train} to test; give at least two of each."
        )
    x = ratios(jnp.asarray(counts), net.largest)
    y = jnp.asarray(scores, jnp.float32)
    centre, spread = y[:train].mean(), y[:train].std() + 1e-12
    params = _fit(
        _initial(key, x.shape[1], hidden), x[:train], (y[:train] - centre) / spread, steps,
        learning_rate,
    )  # fmt: skip

    def predict(counts: Array) -> Array:
        return _mlp(params, ratios(counts, net.largest)) * spread + centre

    rho = rank_correlation(predict(jnp.asarray(counts))[train:], y[train:])
    return Predictor(predict, float(rho))


def evolve(
    net: Supernet,
    predict: Callable[[Array], Array],
    budgets: Sequence[Budget],
    key: Key,
    *,
    population: int = 32,
    generations: int = 20,
) -> np.ndarray:
    """Returns counts i32[G] of the member with the highest predicted score within the budgets.

    Args:
      net: the supernet.
      predict: `(counts i32[n, G]) -> scores f32[n]`, higher is better.
      budgets: what the member meets.
      key: key of the search.
      population: members per generation, even.
      generations: number of generations.
    Raises:
      ValueError: a budget below the smallest member, or an odd population.
    """
    problem = Problem(
        sizes=net.largest,
        project=net.fit(budgets),
        fits=lambda counts: within(budgets, counts),
        evaluate=lambda _, counts: predict(counts),
        data=(),
        costs=lambda counts: jnp.stack([b.cost(counts) / b.limit for b in budgets]),
    )
    strategy = nsga2(net.largest, batch=population)
    return run(problem, strategy, population * generations, key).best_counts


def _initial(key: Key, inputs: int, hidden: int) -> list[tuple[Array, Array]]:
    sizes = (inputs, hidden, hidden, 1)
    keys = jax.random.split(key, 3)
    draw = lambda k, i, o: jax.random.normal(k, (i, o)) * (2 / i) ** 0.5
    return [
        (draw(k, i, o), jnp.zeros(o)) for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def _mlp(params: list[tuple[Array, Array]], x: Array) -> Array:
    for i, (kernel, bias) in enumerate(params):
        x = x @ kernel + jnp.broadcast_to(bias, (x.shape[0], len(bias)))
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x[:, 0]


def _fit(params, x: Array, y: Array, steps: int, learning_rate: float):
    optimizer = optax.adam(learning_rate)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.square(_mlp(p, x) - y).mean())(params)
        return apply_gradients(optimizer, grads, state, params), None

    start = params, optimizer.init(params)
    (params, _), _ = jax.jit(lambda start: lax.scan(step, start, length=steps))(start)
    return params
