"""CMA-ES: a Gaussian over actions whose mean, step and covariance follow the better half.

Source: Hansen 2016, "The CMA Evolution Strategy: A Tutorial" (arXiv 1604.00772), figure 6 and
table 1; numbers in comments are those of its equations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, Key
from jaxfm.search.strategies.strategy import Strategy


class CmaState(NamedTuple):
    """The search distribution N(mean, sigma² C) and its evolution paths."""

    mean: Array  # f32[G]
    sigma: Array  # f32[]
    covariance: Array  # f32[G, G]
    path_sigma: Array  # f32[G]
    path_c: Array  # f32[G]
    generation: Array  # i32[]


def cma_es(num_groups: int, *, batch: int = 16, sigma: float = 0.7) -> Strategy:
    """Returns covariance matrix adaptation that starts from uniform pruning.

    Args:
      num_groups: G.
      batch: candidates per generation.
      sigma: first step size, in logits.
    Raises:
      ValueError: a batch below 4, which is too small to rank.
    """
    if batch < 4:
        raise ValueError(f"batch={batch} is too small for CMA-ES to rank; give at least 4.")
    size = num_groups
    half = batch // 2
    weights = math.log((batch + 1) / 2) - np.log(np.arange(1, half + 1))
    weights = (weights / weights.sum()).astype(np.float32)
    mu_eff = float(1 / np.sum(weights**2))
    c_sigma = (mu_eff + 2) / (size + mu_eff + 5)  # 55
    damping = 1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (size + 1)) - 1) + c_sigma
    c_c = (4 + mu_eff / size) / (size + 4 + 2 * mu_eff / size)  # 56
    c_1 = 2 / ((size + 1.3) ** 2 + mu_eff)  # 57
    c_mu = min(1 - c_1, 2 * (mu_eff - 2 + 1 / mu_eff) / ((size + 2) ** 2 + mu_eff))  # 58
    expected_norm = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))

    def init(key: Key) -> CmaState:
        zero = jnp.zeros(size)
        return CmaState(
            mean=zero, sigma=jnp.float32(sigma), covariance=jnp.eye(size),
            path_sigma=zero, path_c=zero, generation=jnp.int32(0),
        )  # fmt: skip

    def axes(covariance: Array) -> tuple[Array, Array]:
        values, vectors = jnp.linalg.eigh(covariance)
        return jnp.sqrt(jnp.clip(values, 1e-12, 1e12)), vectors

    def ask(state: CmaState, key: Key) -> tuple[Array, CmaState]:
        scale, vectors = axes(state.covariance)
        z = jax.random.normal(key, (batch, size))
        steps = (z * scale[None]) @ vectors.T
        return state.mean[None] + state.sigma * steps, state

    def tell(state: CmaState, actions: Array, counts: Array, scores: Array) -> CmaState:
        order = jnp.argsort(-scores)[:half]
        y = (actions[order] - state.mean[None]) / state.sigma
        y_mean = weights @ y  # 41
        scale, vectors = axes(state.covariance)
        whitened = vectors @ ((vectors.T @ y_mean) / scale)
        keep = math.sqrt(c_sigma * (2 - c_sigma) * mu_eff)
        path_sigma = (1 - c_sigma) * state.path_sigma + keep * whitened  # 43
        norm = jnp.linalg.norm(path_sigma)
        sigma = state.sigma * jnp.exp(c_sigma / damping * (norm / expected_norm - 1))  # 44
        generation = state.generation + 1
        unbiased = jnp.sqrt(1 - (1 - c_sigma) ** (2.0 * generation.astype(jnp.float32)))
        # 45: the path stands still while the step size grows fast.
        moving = (norm / unbiased < (1.4 + 2 / (size + 1)) * expected_norm).astype(jnp.float32)
        path_c = (1 - c_c) * state.path_c
        path_c = path_c + moving * math.sqrt(c_c * (2 - c_c) * mu_eff) * y_mean
        stalled = (1 - moving) * c_c * (2 - c_c)
        covariance = (1 - c_1 - c_mu + c_1 * stalled) * state.covariance
        covariance = covariance + c_1 * jnp.outer(path_c, path_c)
        covariance = covariance + c_mu * (y.T * weights[None]) @ y  # 47
        return CmaState(
            mean=state.mean + state.sigma * y_mean, sigma=jnp.clip(sigma, 1e-4, 5.0),
            covariance=0.5 * (covariance + covariance.T),
            path_sigma=path_sigma, path_c=path_c, generation=generation,
        )  # fmt: skip

    return Strategy(init, ask, tell, batch)
