"""Strategies by name, each with what it needs to know of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxfm.model import PyTree
from jaxfm.search.strategies.agmc import agmc, agmc_published, warm_up_of
from jaxfm.search.strategies.cma_es import cma_es
from jaxfm.search.strategies.gnn_rl import gnn_rl
from jaxfm.search.strategies.gnn_rl_published import gnn_rl_published
from jaxfm.search.strategies.magnitude import magnitude
from jaxfm.search.strategies.nsga2 import nsga2
from jaxfm.search.strategies.policy_graph import policy_graph
from jaxfm.search.strategies.random_search import random_search
from jaxfm.search.strategies.strategy import Problem, Strategy
from jaxfm.search.strategies.uniform import uniform
from jaxfm.search.trace.cost import costs
from jaxfm.search.trace.groups import Network, Scores

STRATEGY_NAMES = (
    "gnn_rl", "gnn_rl_published", "agmc", "agmc_published", "nsga2", "cma_es", "random", "uniform",
    "magnitude",
)  # fmt: skip
ONE_CANDIDATE = ("uniform", "magnitude")  # strategies that need a single evaluation


def make_strategy(
    name: str,
    network: Network,
    params: PyTree,
    problem: Problem,
    scores: Scores,
    *,
    evaluations: int = 256,
    macs_share: float = 0.5,
    policy: PyTree = None,
) -> Strategy:
    """Returns the strategy of a name with its default settings.

    Args:
      name: one of `STRATEGY_NAMES`.
      network: whose groups are searched.
      params: its dense parameters.
      problem: what is searched.
      scores: importance of every unit, for "magnitude".
      evaluations: candidates that will be tried; AGMC begins with a share of them at random.
      macs_share: share of the multiply-adds at which episodes of "gnn_rl_published" end.
      policy: for "gnn_rl", parameters to start from.
    Raises:
      ValueError: an unknown name.
    """
    num_groups = len(problem.sizes)
    graph = lambda: policy_graph(network, params)

    def published() -> Strategy:
        own, dense = costs(network), network.sizes.astype(np.int64)
        share = lambda counts: own.macs(counts) / float(own.macs(dense))
        return gnn_rl_published(graph(), share, macs_share)

    def by_magnitude() -> Strategy:
        return magnitude(problem, [np.asarray(s).mean(0) if s.ndim > 1 else s for s in scores])

    makers: dict[str, Callable[[], Any]] = {
        "gnn_rl": lambda: gnn_rl(graph(), policy=policy),
        "gnn_rl_published": published,
        "agmc": lambda: agmc(graph(), warm_up=warm_up_of(evaluations)),
        "agmc_published": lambda: agmc_published(graph(), warm_up=warm_up_of(evaluations)),
        "nsga2": lambda: nsga2(problem.sizes),
        "cma_es": lambda: cma_es(num_groups),
        "random": lambda: random_search(num_groups),
        "uniform": lambda: uniform(num_groups),
        "magnitude": by_magnitude,
    }
    if name not in makers:
        raise ValueError(f"strategy={name!r} is unknown; choose from {STRATEGY_NAMES}.")
    return makers[name]()


def round_evaluations(name: str, strategy: Strategy, evaluations: int) -> int:
    """Returns how many candidates are tried: whole batches, and one where there is one to try."""
    if name in ONE_CANDIDATE:
        return strategy.batch
    return max(1, evaluations // strategy.batch) * strategy.batch
