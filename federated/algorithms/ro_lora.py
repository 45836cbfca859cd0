"""RoLoRA: B is trained in one round and A in the next, so that every mean is exact.

    even rounds:  B <- sum_i p_i B_i   with A as it is
    odd rounds:   A <- sum_i p_i A_i   with B as it is

B comes first, since it begins at zero, where A has no gradient. Rounds in which nobody reports do
not count. One program for both: which one it is is an array. Only the half that was trained is
uploaded; both are downloaded, since a client may have missed the round before.
Source: Chen et al. 2024 (Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA),
section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Exact,
    Mean,
    Profile,
    anybody,
    mean,
    weighted,
    wire_bytes,
)
from jaxfm.federated.averaging import difference, moved
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.parts.adapter_sites import is_factor, sites_of
from jaxfm.federated.registry import register
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.tasks import Task


class RoLoraState(NamedTuple):
    """The model, which clients get with it, and i32[], the rounds in which anybody reported."""

    variables: Variables
    turn: Array


class RoLoraUpload(NamedTuple):
    """The movement, zero in the half that was not trained, and the round's turn."""

    movement: Mean
    turn: Exact


@register(like="fed_lora", adapted=True, breaks={"one_step": "A does not move in the first round."})
def ro_lora(model: Model, task: Task, local: Local) -> Algorithm:
    """Averaging of A and of B in turn.

    Partition: all that is trained is shared; the backbone is frozen.

    Args:
      model: with a low-rank adapter.
      task, local: as in `fed_avg`.
    Raises:
      ValueError: no low-rank adapter.
    """
    sites, loss = sites_of(model, "ro_lora"), objective(model, task)
    of = {part: is_factor(sites, part) for part in "ab"}

    def chosen(turn: Array, trained: PyTree, otherwise: PyTree) -> PyTree:
        """Of factors those that are trained in this turn, and `otherwise`; all of the rest."""

        def leaf(path, new: Array, old: Array) -> Array:
            names = tuple(key.key for key in path)
            idle = jnp.where(of["a"](names), turn % 2 == 0, of["b"](names) & (turn % 2 == 1))
            return jnp.where(idle, old, new)

        return jax.tree_util.tree_map_with_path(leaf, trained, otherwise)

    def client(download: RoLoraState, memory, data: ClientData, profile: Profile, key: Key):
        start, turn = download
        held: Callable = lambda params: chosen(turn, params, start.params)
        fit = local_fit(lambda params, *rest: loss(held(params), *rest), local)
        trained, info = fit(start, data, profile.max_steps, key)
        # What weight decay made of the idle half was never used.
        trained = trained._replace(params=held(trained.params))
        movement = weighted(info.examples, difference(trained, start))
        upload = RoLoraUpload(movement, Exact(turn))
        return upload, memory, info.measured(bytes_up=wire_bytes(upload, travels(upload)))

    def travels(upload: RoLoraUpload) -> RoLoraUpload:
        whole = jax.tree.map(lambda _: jnp.ones(()), upload)
        params = whole.movement.num.params
        shares = chosen(upload.turn.value, params, jax.tree.map(jnp.zeros_like, params))
        num = whole.movement.num._replace(params=shares)
        # The server knows the turn.
        return RoLoraUpload(whole.movement._replace(num=num), Exact(jnp.zeros(())))

    def server(state: RoLoraState, totals: Mean, public, key: Key):
        turn = state.turn + anybody(totals.den).astype(jnp.int32)
        after = RoLoraState(moved(state.variables, mean(totals)), turn)
        return after, {"aggregation_error": jnp.zeros((), jnp.float32)}

    bucket = Bucket(
        model, lambda state, public: state, client, travels=travels,
        receive=lambda state, public, upload: upload.movement,
    )  # fmt: skip
    local_fit(loss, local)  # refuses settings out of range
    init = lambda variables: RoLoraState(variables, jnp.zeros((), jnp.int32))
    return Algorithm(init, (bucket,), server, model)
