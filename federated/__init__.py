"""Training over clients whose data stay where they are.

An algorithm is a factory of pure functions (`Algorithm`, `Bucket`); `rounds` compiles whole rounds
of any of them over a device mesh; `client_costs` and `round_costs` count what they take.
"""

from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Known,
    Mean,
    Profile,
    mean,
    scaled,
)
from jaxfm.federated.evaluate import client_metrics, global_metrics, three_metrics, worst_decile
from jaxfm.federated.fed_avg import fed_avg
from jaxfm.federated.fed_opt import fed_adam, fed_avg_m, fed_opt, fed_yogi
from jaxfm.federated.fed_prox import fed_prox
from jaxfm.federated.hetero_fl import hetero_fl
from jaxfm.federated.ledger import ClientCost, client_costs, round_costs
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.resources import assign, profiles
from jaxfm.federated.rounds import Population, Rounds, RunState, rounds

__all__ = [
    "Algorithm",
    "Bucket",
    "ClientCost",
    "ClientData",
    "Known",
    "Local",
    "Mean",
    "Population",
    "Profile",
    "Rounds",
    "RunState",
    "assign",
    "client_costs",
    "client_metrics",
    "fed_adam",
    "fed_avg",
    "fed_avg_m",
    "fed_opt",
    "fed_prox",
    "fed_yogi",
    "global_metrics",
    "hetero_fl",
    "local_fit",
    "mean",
    "objective",
    "profiles",
    "round_costs",
    "rounds",
    "scaled",
    "three_metrics",
    "worst_decile",
]
