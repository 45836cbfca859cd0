"""Search: how to shrink a model to a budget.

`network` reads the channel groups of any function from its jaxpr; `prune` cuts it down to a budget;
`masked` and `sliced` run what is left. `projection` turns any proposal into channel counts that
meet every budget; a `Strategy` proposes; `run` asks, projects, evaluates and tells in one compiled
program. `supernet` orders a model's channels by importance, `sandwich` trains its members together
and `evolve` finds the best member within a budget.
"""

from jaxfm.search.activations import unit_activity
from jaxfm.search.elastic.evolve import evolve, fit_predictor
from jaxfm.search.elastic.member_cost import member_macs
from jaxfm.search.elastic.supernet import Supernet, supernet
from jaxfm.search.elastic.training import sandwich, sandwich_steps
from jaxfm.search.evaluation import halving, split_rows, task_problem
from jaxfm.search.fine_tuning import fine_tuner
from jaxfm.search.latency import Latency, fit_latency
from jaxfm.search.least_squares import repair
from jaxfm.search.member_selection import (
    MemberChoice,
    MemberJudge,
    MemberSearch,
    choose_members,
    judge_members,
)
from jaxfm.search.pruning import Pruned, prune, pruned
from jaxfm.search.ranking import gradient, importance, keep, masks, ranks
from jaxfm.search.recalibration import recalibrate
from jaxfm.search.refinement import Refinement, measure_speed, refine, summarise
from jaxfm.search.saving import load_pruned, save_pruned
from jaxfm.search.session import Rows, Selection, check_shares, select_units
from jaxfm.search.strategies.agmc import agmc, agmc_published
from jaxfm.search.strategies.cma_es import cma_es
from jaxfm.search.strategies.gnn_rl import (
    gnn_rl,
    load_policy,
    save_policy,
    transfer_policy,
)
from jaxfm.search.strategies.gnn_rl_published import gnn_rl_published
from jaxfm.search.strategies.loop import Result, Search, run, search
from jaxfm.search.strategies.magnitude import magnitude
from jaxfm.search.strategies.named import STRATEGY_NAMES, make_strategy
from jaxfm.search.strategies.nsga2 import nsga2
from jaxfm.search.strategies.policy_graph import PolicyGraph, policy_graph
from jaxfm.search.strategies.project import Budget, budgets, projection
from jaxfm.search.strategies.random_search import random_search
from jaxfm.search.strategies.strategy import Problem, Strategy, problem
from jaxfm.search.strategies.uniform import uniform
from jaxfm.search.trace.cost import costs, counts_of, nominal_macs
from jaxfm.search.trace.groups import Network, network
from jaxfm.search.trace.interpret import coverage, cut, full, masked, place, sliced
from jaxfm.search.trace.models import model_network, to_subnet

__all__ = [  # noqa: RUF022  # grouped
    # prune a model in one call
    "Pruned",
    "prune",
    "pruned",
    "load_pruned",
    "save_pruned",
    # read a network: its groups, costs and budgets
    "Network",
    "network",
    "model_network",
    "to_subnet",
    "Budget",
    "budgets",
    "costs",
    "counts_of",
    "nominal_macs",
    "Latency",
    "fit_latency",
    # run what is kept: masked at dense shapes, or really smaller
    "masked",
    "sliced",
    "cut",
    "full",
    "place",
    "coverage",
    # rank units, and choose the first ones
    "importance",
    "gradient",
    "unit_activity",
    "ranks",
    "masks",
    "keep",
    # mend what is left
    "recalibrate",
    "repair",
    # state a search and run it
    "Problem",
    "problem",
    "task_problem",
    "split_rows",
    "projection",
    "Strategy",
    "Search",
    "search",
    "Result",
    "run",
    "halving",
    # a whole search: model and rows in, a refined model out
    "Rows",
    "Selection",
    "select_units",
    "check_shares",
    "Refinement",
    "refine",
    "fine_tuner",
    "measure_speed",
    "summarise",
    # strategies
    "STRATEGY_NAMES",
    "make_strategy",
    "uniform",
    "random_search",
    "magnitude",
    "cma_es",
    "nsga2",
    "agmc",
    "agmc_published",
    "gnn_rl",
    "gnn_rl_published",
    "PolicyGraph",
    "policy_graph",
    "transfer_policy",
    "save_policy",
    "load_policy",
    # supernets: one training, a network for every budget
    "Supernet",
    "supernet",
    "sandwich",
    "sandwich_steps",
    "MemberJudge",
    "judge_members",
    "MemberChoice",
    "MemberSearch",
    "choose_members",
    "member_macs",
    "fit_predictor",
    "evolve",
]
