"""FedRolex: the slice that a weak client trains rolls over the network, one index a round.

A tier holds the indices (k + t) mod S of an axis of size S in round t, with k its window; after S
rounds it has held every index of the axis equally often, where HeteroFL never trains the last ones
on a weak client. Axes of one size roll in step, so of a matrix between two of them a tier holds a
band around the diagonal, as in the paper. Everything else is HeteroFL: the mean over those who
covered a coordinate, and no movement where nobody did. The first round is HeteroFL's.
Source: Alam et al. 2022, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.federated.algorithm import Algorithm, Bucket, Mean, anybody, mean
from jaxfm.federated.averaging import moved
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.registry import register
from jaxfm.federated.slices import check_tiers, slice_bucket
from jaxfm.model import Array, Key, Model, Variables
from jaxfm.subnet import Subnet, axis_sizes
from jaxfm.tasks import Task


class FedRolexState(NamedTuple):
    """The model and i32[], how far the windows have rolled: the rounds in which anybody came."""

    variables: Variables
    shift: Array


@register(like="hetero_fl")
def fed_rolex(model: Model, task: Task, local: Local, tiers: Sequence[Subnet]) -> Algorithm:
    """Width-heterogeneous federated averaging with rolling windows, one bucket a tier.

    Partition: what a tier covers is shared; nothing is personal. One program for all rounds: the
    window is an array of indices.

    Args:
      model: of full width; its `apply` runs the slices too.
      task, local: as in `fed_avg`.
      tiers: what the clients of each bucket hold in the first round; one array an axis.
    Raises:
      ValueError: no tier, one that does not fit the model, or one with layers of unequal width.
    """
    check_tiers(model, tiers, "fed_rolex")
    for number, subnet in enumerate(tiers):
        for name, index in subnet.keep.items():
            if isinstance(index, list | tuple):
                raise ValueError(
                    f"Tier {number} has layers of unequal width along {name!r}; windows roll on "
                    "one array an axis."
                )
    sizes = axis_sizes(jax.eval_shape(model.init, jax.random.key(0)), model.axes)
    fit = local_fit(objective(model, task), local)

    def tier(subnet: Subnet) -> Bucket:
        return slice_bucket(model, fit, lambda server: rolled(subnet, sizes, server.shift))

    def init(variables: Variables) -> FedRolexState:
        return FedRolexState(variables, jnp.zeros((), jnp.int32))

    def server(state: FedRolexState, totals: Mean, public, key: Key):
        shift = state.shift + anybody(totals.den).astype(jnp.int32)
        return FedRolexState(moved(state.variables, mean(totals)), shift), {}

    return Algorithm(init, tuple(map(tier, tiers)), server, model)


def rolled(subnet: Subnet, sizes: dict[str, int], shift: Array) -> Subnet:
    """The subnet with every index moved on by `shift`, around the end of its axis."""
    index = lambda name: (jnp.asarray(subnet.keep[name], jnp.int32) + shift) % sizes[name]
    return Subnet({name: index(name) for name in subnet.keep})
