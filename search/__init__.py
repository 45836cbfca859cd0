"""Search: how to shrink a model to a budget.

`network` reads any function's channel groups from its jaxpr; `prune` cuts it down to a budget;
`masked` and `sliced` run what is left. `project` turns any proposal into channel counts that meet
every budget; a `Strategy` proposes; `run` asks, projects, evaluates and tells in one compiled
program; `supernet` orders a model's channels by importance, trains its members together and hands
out the ones that fit.
"""

from jaxfm.search.elastic.member_cost import member_macs
from jaxfm.search.elastic.supernet import supernet
from jaxfm.search.evaluation import halving, split_rows, task_problem
from jaxfm.search.latency import Latency, fit_latency
from jaxfm.search.least_squares import repair
from jaxfm.search.pruning import Pruned, load_pruned, prune, pruned, save_pruned
from jaxfm.search.ranking import importance, keep, masks, ranks
from jaxfm.search.strategies.agmc import agmc, agmc_published
from jaxfm.search.strategies.cma_es import cma_es
from jaxfm.search.strategies.gnn_rl import (
    gnn_rl,
    gnn_rl_published,
    load_policy,
    save_policy,
    transfer_policy,
)
from jaxfm.search.strategies.loop import Result, run, search
from jaxfm.search.strategies.magnitude import magnitude
from jaxfm.search.strategies.nsga2 import nsga2
from jaxfm.search.strategies.policy_graph import PolicyGraph, policy_graph
from jaxfm.search.strategies.project import Budget, budgets, projection
from jaxfm.search.strategies.random_search import random_search
from jaxfm.search.strategies.strategy import Problem, Strategy, problem
from jaxfm.search.strategies.uniform import uniform
from jaxfm.search.trace.cost import Costs, costs, counts_of, nominal_macs
from jaxfm.search.trace.groups import Network, network
from jaxfm.search.trace.interpret import coverage, cut, full, masked, place, sliced
from jaxfm.search.trace.models import model_network, to_subnet
from jaxfm.search.trace.roles import Group

__all__ = [
    "Budget",
    "Costs",
    "Group",
    "Latency",
    "Network",
    "PolicyGraph",
    "Problem",
    "Pruned",
    "Result",
    "Strategy",
    "agmc",
    "agmc_published",
    "budgets",
    "cma_es",
    "costs",
    "counts_of",
    "coverage",
    "cut",
    "fit_latency",
    "full",
    "gnn_rl",
    "gnn_rl_published",
    "halving",
    "importance",
    "keep",
    "load_policy",
    "load_pruned",
    "magnitude",
    "masked",
    "masks",
    "member_macs",
    "model_network",
    "network",
    "nominal_macs",
    "nsga2",
    "place",
    "policy_graph",
    "problem",
    "projection",
    "prune",
    "pruned",
    "random_search",
    "ranks",
    "repair",
    "run",
    "save_policy",
    "save_pruned",
    "search",
    "sliced",
    "split_rows",
    "supernet",
    "task_problem",
    "to_subnet",
    "transfer_policy",
    "uniform",
]
