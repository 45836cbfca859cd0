"""NSGA-II: a population ranked by Pareto fronts, bred by simulated binary crossover.

Genes are kept ratios in (0, 1) as the projection realised them, so that a child inherits what was
measured. Without further objectives it is an elitist genetic algorithm on the score.

Source: Deb et al. 2002, section III; crossover and mutation Deb & Agrawal 1995, Deb & Goyal 1996,
with the probabilities of BootstrapNAS (arXiv 2112.10878) unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, Key
from jaxfm.search.strategies.pareto import crowding, fronts
from jaxfm.search.strategies.strategy import Strategy, ratios, to_logits


class NsgaState(NamedTuple):
    """The surviving population."""

    genes: Array  # f32[n, G]
    objectives: Array  # f32[n, K], +inf before the first generation
    born: Array  # bool[], whether there is a population yet


def nsga2(
    sizes: np.ndarray,
    *,
    batch: int = 16,
    objectives: Callable[[Array], Array] | None = None,
    crossover: float = 0.9,
    mutation: float | None = None,
    eta_crossover: float = 10.0,
    eta_mutation: float = 3.0,
    spread: float = 1.0,
) -> Strategy:
    """Returns evolution of a population of `batch` candidates.

    Args:
      sizes: i32[G], channels of each group.
      batch: size of the population and children per generation; even.
      objectives: `(counts f32[G]) -> f32[K]`, costs that are minimised beside the score; None means
        none.
      crossover: probability that two parents are mixed.
      mutation: probability for each gene; None means 1/G, one gene per child on average.
      eta_crossover, eta_mutation: distribution indices; children of larger ones stay nearer to
        their parents.
      spread: standard deviation of the first generation's logits, as in `random_search`.

    Raises:
      ValueError: batch is odd or below 4.
    """
    if batch < 4 or batch % 2:
        raise ValueError(f"batch={batch} must be even and at least 4: parents mate in pairs.")
    num_groups = len(sizes)
    rate = 1 / num_groups if mutation is None else mutation

    def goals(counts: Array, scores: Array) -> Array:
        first = -scores[:, None]
        if objectives is None:
            return first
        further = jax.vmap(objectives)(counts.astype(jnp.float32))
        return jnp.concatenate([first, further], axis=1)

    def init(key: Key) -> NsgaState:
        counts = jax.ShapeDtypeStruct((batch, num_groups), jnp.int32)
        scores = jax.ShapeDtypeStruct((batch,), jnp.float32)
        shape = jax.eval_shape(goals, counts, scores).shape
        genes = jnp.full((batch, num_groups), 0.5)
        return NsgaState(genes, jnp.full(shape, jnp.inf), jnp.array(False))

    def parents(state: NsgaState, key: Key) -> Array:
        rank = fronts(state.objectives)
        apart = crowding(state.objectives, rank)
        pairs = jax.random.randint(key, (2, batch), 0, batch)
        a, b = pairs[0], pairs[1]
        first = (rank[a] < rank[b]) | ((rank[a] == rank[b]) & (apart[a] > apart[b]))
        return state.genes[jnp.where(first, a, b)]

    def ask(state: NsgaState, key: Key) -> tuple[Array, NsgaState]:
        keys = jax.random.split(key, 4)
        children = _cross(parents(state, keys[0]), keys[1], crossover, eta_crossover)
        children = to_logits(_mutate(children, keys[2], rate, eta_mutation))
        fresh = spread * jax.random.normal(keys[3], children.shape)
        return jnp.where(state.born, children, fresh), state

    def tell(state: NsgaState, actions: Array, counts: Array, scores: Array) -> NsgaState:
        genes = jnp.concatenate([state.genes, ratios(counts, sizes)])
        values = jnp.concatenate([state.objectives, goals(counts, scores)])
        rank = fronts(values)
        apart = crowding(jnp.where(jnp.isinf(values), 1e9, values), rank)
        best = jnp.lexsort((-apart, rank))[:batch]
        return NsgaState(genes[best], values[best], jnp.array(True))

    return Strategy(init, ask, tell, batch)


def _cross(genes: Array, key: Key, probability: float, eta: float) -> Array:
    """Crosses neighbours by simulated binary crossover: spread as after one-point crossover."""
    keys = jax.random.split(key, 3)
    mother, father = genes[0::2], genes[1::2]
    u = jax.random.uniform(keys[0], mother.shape)
    low = (2 * u) ** (1 / (eta + 1))
    high = (1 / jnp.maximum(2 * (1 - u), 1e-6)) ** (1 / (eta + 1))
    beta = jnp.where(u <= 0.5, low, high)
    mix = jax.random.bernoulli(keys[1], probability, (mother.shape[0], 1))
    each = jax.random.bernoulli(keys[2], 0.5, mother.shape)
    beta = jnp.where(mix & each, beta, 1.0)
    one = 0.5 * ((1 + beta) * mother + (1 - beta) * father)
    two = 0.5 * ((1 - beta) * mother + (1 + beta) * father)
    return jnp.clip(jnp.stack([one, two], axis=1).reshape(genes.shape), 0.0, 1.0)


def _mutate(genes: Array, key: Key, rate: float, eta: float) -> Array:
    """Mutates genes by polynomial mutation within [0, 1]."""
    key_u, key_hit = jax.random.split(key)
    u = jax.random.uniform(key_u, genes.shape)
    down = (2 * u) ** (1 / (eta + 1)) - 1
    up = 1 - jnp.maximum(2 * (1 - u), 0.0) ** (1 / (eta + 1))
    hit = jax.random.bernoulli(key_hit, rate, genes.shape)
    return jnp.clip(genes + jnp.where(hit, jnp.where(u < 0.5, down, up), 0.0), 0.0, 1.0)
