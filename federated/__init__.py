"""Training over clients whose data stay where they are.

An algorithm is a factory of pure functions (`Algorithm`, `Bucket`); `rounds` compiles whole rounds
of any of them over a device mesh; `client_costs` and `round_costs` count what they take.
"""

from jaxfm.federated.accounting.ledger import (
    ClientCost,
    Work,
    client_costs,
    client_work,
    round_costs,
)
from jaxfm.federated.accounting.metrics import (
    client_metrics,
    global_metrics,
    three_metrics,
    worst_decile,
)
from jaxfm.federated.accounting.resources import (
    DEVICES,
    Device,
    Plan,
    assign,
    fleet,
    fleet_profiles,
    plan,
    profiles,
    simulated,
)
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
from jaxfm.federated.algorithms.adp import Adp, adp
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.algorithms.fed_df import fed_df
from jaxfm.federated.algorithms.fed_dp import fed_dp
from jaxfm.federated.algorithms.fed_dyn import fed_dyn
from jaxfm.federated.algorithms.fed_kemf import fed_kemf, fed_kemf_paper
from jaxfm.federated.algorithms.fed_md import fed_md
from jaxfm.federated.algorithms.fed_nova import fed_nova
from jaxfm.federated.algorithms.fed_opt import fed_adam, fed_avg_m, fed_opt, fed_yogi
from jaxfm.federated.algorithms.fed_per import fed_per
from jaxfm.federated.algorithms.fed_prox import fed_prox
from jaxfm.federated.algorithms.fed_rolex import fed_rolex
from jaxfm.federated.algorithms.hetero_fl import hetero_fl
from jaxfm.federated.algorithms.lg_fed_avg import lg_fed_avg
from jaxfm.federated.algorithms.raffm import prioritised, raffm, raffm_published
from jaxfm.federated.algorithms.rafl import Rafl, held_search, rafl, rafl_published
from jaxfm.federated.algorithms.scaffold import scaffold
from jaxfm.federated.algorithms.spatl import client_model, nothing, spatl, transferred
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.partition import either, head, norms, outside, statistics, under
from jaxfm.federated.parts.channel_selection import Select, agent, everything, saliency
from jaxfm.federated.parts.ensemble import (
    Distil,
    Vote,
    coverage_vote,
    entropy_vote,
    max_vote,
    mean_vote,
)
from jaxfm.federated.rounds import Population, Rounds, RunState, draw, rounds
from jaxfm.federated.wrappers.compress import compressed, quantised, top_k

__all__ = [
    "DEVICES",
    "Adp",
    "Algorithm",
    "Bucket",
    "ClientCost",
    "ClientData",
    "Device",
    "Distil",
    "Known",
    "Local",
    "Mean",
    "Plan",
    "Population",
    "Profile",
    "Rafl",
    "Rounds",
    "RunState",
    "Select",
    "Vote",
    "Work",
    "adp",
    "agent",
    "assign",
    "client_costs",
    "client_metrics",
    "client_model",
    "client_work",
    "compressed",
    "coverage_vote",
    "draw",
    "either",
    "entropy_vote",
    "everything",
    "fed_adam",
    "fed_avg",
    "fed_avg_m",
    "fed_df",
    "fed_dp",
    "fed_dyn",
    "fed_kemf",
    "fed_kemf_paper",
    "fed_md",
    "fed_nova",
    "fed_opt",
    "fed_per",
    "fed_prox",
    "fed_rolex",
    "fed_yogi",
    "fleet",
    "fleet_profiles",
    "global_metrics",
    "head",
    "held_search",
    "hetero_fl",
    "lg_fed_avg",
    "local_fit",
    "max_vote",
    "mean",
    "mean_vote",
    "norms",
    "nothing",
    "objective",
    "outside",
    "plan",
    "prioritised",
    "profiles",
    "quantised",
    "raffm",
    "raffm_published",
    "rafl",
    "rafl_published",
    "round_costs",
    "rounds",
    "saliency",
    "scaffold",
    "scaled",
    "simulated",
    "spatl",
    "statistics",
    "three_metrics",
    "top_k",
    "transferred",
    "under",
    "worst_decile",
]
