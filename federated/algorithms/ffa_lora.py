"""FFA-LoRA: A is drawn once, shared and frozen; only B is trained.

    B <- sum_i p_i B_i,   and so   sum_i p_i s A B_i = s A (sum_i p_i B_i)

exactly. Uploads are sums, half as large as those of `fed_lora`, and noise added to B is not
multiplied by noise added to A. A travels once, with the backbone.
Source: Sun et al. 2024 (Improving LoRA in Privacy-preserving Federated Learning), section 4.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxfm.federated.algorithm import Algorithm, Bucket, Mean, mean
from jaxfm.federated.algorithms.fed_avg import FedAvgState
from jaxfm.federated.averaging import averaging_client, moved
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.parts.adapter_sites import is_factor, sites_of
from jaxfm.federated.registry import register
from jaxfm.model import Key, Model, Variables
from jaxfm.tasks import Task
from jaxfm.trees import join_tree, split_tree


@register(
    like="fed_lora",
    adapted=True,
    breaks={"one_step": "A does not move."},
)
def ffa_lora(model: Model, task: Task, local: Local) -> Algorithm:
    """Averaging of B with A frozen.

    Partition: all that is trained is shared; the backbone and A are frozen.

    Args:
      model: with a low-rank adapter.
      task, local: as in `fed_avg`.
    Raises:
      ValueError: no low-rank adapter.
    """
    is_fixed = is_factor(sites_of(model, "ffa_lora"), "a")
    fit = local_fit(objective(model, task), local)

    def send(state: FedAvgState, public) -> Variables:
        params, fixed = split_tree(state.variables.params, is_fixed)
        frozen = join_tree(state.variables.frozen, fixed)
        return state.variables._replace(params=params, frozen=frozen)

    def server(state: FedAvgState, totals: Mean, public, key: Key):
        params, fixed = split_tree(state.variables.params, is_fixed)
        after = moved(state.variables._replace(params=params), mean(totals))
        after = after._replace(params=join_tree(after.params, fixed))
        return FedAvgState(after), {"aggregation_error": jnp.zeros((), jnp.float32)}

    return Algorithm(FedAvgState, (Bucket(model, send, averaging_client(fit)),), server, model)
