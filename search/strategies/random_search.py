"""Random search: the baseline that every learned strategy has to beat at equal evaluations."""

from __future__ import annotations

import jax

from jaxfm.model import Array, Key
from jaxfm.search.strategies.strategy import Strategy


def random_search(num_groups: int, *, batch: int = 16, spread: float = 1.0) -> Strategy:
    """Returns a strategy that draws logit_g ~ N(0, spread²), centred on uniform pruning.

    Args:
      num_groups: G.
      batch: candidates that are evaluated side by side.
      spread: standard deviation; with 1, two thirds of the ratios around 0.5 lie between 0.27 and
        0.73.
    """

    def init(key: Key) -> tuple[()]:
        return ()

    def ask(state: tuple[()], key: Key) -> tuple[Array, tuple[()]]:
        return spread * jax.random.normal(key, (batch, num_groups)), state

    def tell(state: tuple[()], actions: Array, counts: Array, scores: Array) -> tuple[()]:
        return state

    return Strategy(init, ask, tell, batch)
