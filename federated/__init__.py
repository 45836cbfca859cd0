"""Training over clients whose data stay where they are.

An algorithm is a factory of pure functions (`Algorithm`, `Bucket`); `compile_rounds` compiles whole
rounds of any of them over a device mesh; `train` is a whole run; `client_costs` and `round_costs`
count what it takes. The factories of all registered algorithms (`jaxfm.federated.registry`) are
reached here by name: `jaxfm.federated.fed_avg`.
"""

from jaxfm.federated.accounting.epsilon import Sampling, epsilon_of
from jaxfm.federated.accounting.ledger import (
    ClientCost,
    Work,
    client_costs,
    client_work,
    round_costs,
)
from jaxfm.federated.accounting.memory import ClientMemory, client_memory, compiled_costs
from jaxfm.federated.accounting.metrics import (
    client_metrics,
    global_metrics,
    three_metrics,
    worst_decile,
)
from jaxfm.federated.accounting.privacy import Privacy, plan_correlated, plan_privacy
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

# The contract, and what authors of algorithms build on.
from jaxfm.federated.algorithm import (
    Algorithm,
    Aside,
    Bucket,
    ClientData,
    Exact,
    Info,
    Known,
    Mean,
    Profile,
    Spent,
    Stacked,
    client_variables,
    mean,
    scaled,
    weighted,
    wire_bytes,
)
from jaxfm.federated.averaging import (
    Movement,
    averaging_bucket,
    averaging_client,
    difference,
    moved,
)

# Runs.
from jaxfm.federated.client import client_data, client_key, python_round, run_client
from jaxfm.federated.client_store import ClientStore
from jaxfm.federated.cohort import Cohort, RoundInfo, Status, draw
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.outcome import NothingLearned

# Partitions of the parameter tree.
from jaxfm.federated.partition import (
    check_partition,
    either,
    head,
    norms,
    nothing,
    outside,
    statistics,
    under,
)

# Parts that several algorithms take.
from jaxfm.federated.parts.channel_gates import Gates, channel_gates
from jaxfm.federated.parts.channel_selection import Select, agent, everything, saliency
from jaxfm.federated.parts.ensemble import (
    Distill,
    Vote,
    coverage_vote,
    entropy_vote,
    max_vote,
    mean_vote,
)
from jaxfm.federated.parts.private_gradient import ExamplePrivacy
from jaxfm.federated.placement import Placement, place, wanted_steps
from jaxfm.federated.population import Population
from jaxfm.federated.preparation import Prepared, make_setting, prepare
from jaxfm.federated.registry import Setting, entries, register
from jaxfm.federated.rounds import Rounds, RunState, compile_rounds
from jaxfm.federated.run import TrainedRun, train
from jaxfm.federated.saving import TrainedModel, save_adapter, save_model, trained_model
from jaxfm.federated.slices import slice_bucket
from jaxfm.federated.streamed import StreamedRounds
from jaxfm.federated.wrappers.compression import quantised, top_k, with_compression
from jaxfm.federated.wrappers.masters import wide_model, with_masters
from jaxfm.federated.wrappers.private import with_privacy
from jaxfm.federated.wrappers.private_checks import Quantile
from jaxfm.federated.wrappers.quorum import with_quorum
from jaxfm.federated.wrappers.robust import with_robust
from jaxfm.federated.wrappers.secure import with_secure_sums
from jaxfm.federated.wrappers.sparse_codes import sparse

__all__ = [
    "DEVICES",
    "Algorithm",
    "Aside",
    "Bucket",
    "ClientCost",
    "ClientData",
    "ClientMemory",
    "ClientStore",
    "Cohort",
    "Device",
    "Distill",
    "Exact",
    "ExamplePrivacy",
    "Gates",
    "Info",
    "Known",
    "Local",
    "Mean",
    "Movement",
    "NothingLearned",
    "Placement",
    "Plan",
    "Population",
    "Prepared",
    "Privacy",
    "Profile",
    "Quantile",
    "RoundInfo",
    "Rounds",
    "RunState",
    "Sampling",
    "Select",
    "Setting",
    "Spent",
    "Stacked",
    "Status",
    "StreamedRounds",
    "TrainedModel",
    "TrainedRun",
    "Vote",
    "Work",
    "agent",
    "assign",
    "averaging_bucket",
    "averaging_client",
    "channel_gates",
    "check_partition",
    "client_costs",
    "client_data",
    "client_key",
    "client_memory",
    "client_metrics",
    "client_variables",
    "client_work",
    "compile_rounds",
    "compiled_costs",
    "coverage_vote",
    "difference",
    "draw",
    "either",
    "entries",
    "entropy_vote",
    "epsilon_of",
    "everything",
    "fleet",
    "fleet_profiles",
    "global_metrics",
    "head",
    "local_fit",
    "make_setting",
    "max_vote",
    "mean",
    "mean_vote",
    "moved",
    "norms",
    "nothing",
    "objective",
    "outside",
    "place",
    "plan",
    "plan_correlated",
    "plan_privacy",
    "prepare",
    "profiles",
    "python_round",
    "quantised",
    "register",
    "round_costs",
    "run_client",
    "saliency",
    "save_adapter",
    "save_model",
    "scaled",
    "simulated",
    "slice_bucket",
    "sparse",
    "statistics",
    "three_metrics",
    "top_k",
    "train",
    "trained_model",
    "under",
    "wanted_steps",
    "weighted",
    "wide_model",
    "wire_bytes",
    "with_compression",
    "with_masters",
    "with_privacy",
    "with_quorum",
    "with_robust",
    "with_secure_sums",
    "worst_decile",
]


def __getattr__(name: str):
    known = {} if name.startswith("_") else entries()
    if name not in known:
        raise AttributeError(f"module 'jaxfm.federated' has no attribute {name!r}")
    return known[name].factory


def __dir__() -> list[str]:
    return sorted([*globals(), *entries()])
