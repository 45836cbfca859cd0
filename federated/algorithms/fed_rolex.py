"""FedRolex: the slice that a weak client trains rolls over the network, one index a round.

A tier holds the indices (k + t) mod S of an axis of size S in round t, with k its window; after S
rounds it has held every index of the axis alike, where HeteroFL never trains the last ones on a
weak client. Axes of one size roll in step, so that of a matrix between two of them it holds a band
around the diagonal, as in the paper. All else is HeteroFL: the mean over those who covered a
coordinate, and no movement where nobody did. The first round is HeteroFL's.
Source: Alam et al. 2022, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Mean, Profile, mean, scaled
from jaxfm.federated.algorithms.fed_avg import Movement, difference, moved
from jaxfm.federated.algorithms.hetero_fl import check_tiers
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.model import Array, Key, Model, Variables
from jaxfm.subnet import Subnet, axis_sizes, cover, embed, extract
from jaxfm.tasks import Task


class FedRolexState(NamedTuple):
    """The model and i32[], how far the windows have rolled: the rounds in which anybody came."""

    variables: Variables
    shift: Array


def fed_rolex(model: Model, task: Task, local: Local, tiers: Sequence[Subnet]) -> Algorithm:
    """Width-heterogeneous federated averaging with rolling windows, one bucket a tier.

    Partition: what a tier covers is shared; nothing is personal. One program for all rounds: the
    window is an array of indices.

    Args:
      model: of full width; its `apply` runs the slices too.
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

    def server(state: FedRolexState, totals: Mean, public, key: Key):
        anybody = jnp.array([(den > 0).any() for den in jax.tree.leaves(totals.den)]).any()
        variables = moved(state.variables, mean(totals))
        return FedRolexState(variables, state.shift + anybody.astype(jnp.int32)), {}

    init = lambda variables: FedRolexState(variables, jnp.zeros((), jnp.int32))
    buckets = tuple(_tier(model, task, local, subnet) for subnet in tiers)
    return Algorithm(init, buckets, server, model)


def rolled(subnet: Subnet, sizes: dict[str, int], shift: Array) -> Subnet:
    """The subnet with every index moved on by `shift`, around the end of its axis."""
    index = lambda name: (jnp.asarray(subnet.keep[name], jnp.int32) + shift) % sizes[name]
    return Subnet({name: index(name) for name in subnet.keep})


def _tier(model: Model, task: Task, local: Local, subnet: Subnet) -> Bucket:
    fit = local_fit(objective(model, task), local)
    sent_axes = Movement(model.axes.params, model.axes.stats)
    full = jax.eval_shape(model.init, jax.random.key(0))
    like = Movement(full.params, full.stats)
    sizes = axis_sizes(full, model.axes)

    def send(server: FedRolexState, public) -> Variables:
        return extract(server.variables, model.axes, rolled(subnet, sizes, server.shift))

    def client(download: Variables, memory, data: ClientData, profile: Profile, key: Key):
        trained, info = fit(download, data, profile.max_steps, key)
        examples = info["examples"]
        return Mean(scaled(examples, difference(trained, download)), examples), memory, info

    def lift(server: FedRolexState, sums: Mean) -> Mean:
        window = rolled(subnet, sizes, server.shift)
        num = embed(sums.num, sent_axes, window, like)
        return Mean(num, scaled(sums.den, cover(sent_axes, window, like)))

    def personal(server: FedRolexState, memory) -> Variables:
        return send(server, None)

    return Bucket(model, send, client, lift=lift, personal=personal)
