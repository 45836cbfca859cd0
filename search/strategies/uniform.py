"""Uniform pruning: one ratio for every group, set by the budget alone."""

from __future__ import annotations

import jax.numpy as jnp

from jaxfm.model import Array, Key
from jaxfm.search.strategies.strategy import Strategy


def uniform(num_groups: int) -> Strategy:
    """Returns a strategy of equal logits; it has nothing to learn and needs one evaluation."""
    return fixed(jnp.zeros(num_groups))


def fixed(logits: Array) -> Strategy:
    """Returns a strategy that always asks for the one candidate `logits` f32[G]."""

    def init(key: Key) -> tuple[()]:
        return ()

    def ask(state: tuple[()], key: Key) -> tuple[Array, tuple[()]]:
        return logits[None], state

    def tell(state: tuple[()], actions: Array, counts: Array, scores: Array) -> tuple[()]:
        return state

    return Strategy(init, ask, tell, 1)
