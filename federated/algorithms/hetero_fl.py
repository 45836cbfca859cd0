"""HeteroFL: each client trains the slice of the model that its machine can carry.

A tier is a `Subnet`: the window of each axis that its clients hold. The server averages each
coordinate over those who covered it; a coordinate that nobody covered keeps its value. Slices are
physically extracted, so small tiers are really faster, and lighter on the wire.
Source: Diao et al. 2021, algorithm 1 and, with `scaler`, section 3's 1 / ratio on activations.
Norms count the channels that are there and need none; without norms a slice's activations are
smaller than the whole network's. The paper's masked loss and post-hoc statistics are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import optax

from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Mean, Profile, scaled
from jaxfm.federated.algorithms.fed_avg import Movement, difference
from jaxfm.federated.algorithms.fed_opt import FedOptState, server_optimizer
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.model import Key, Model, Variables, is_axes
from jaxfm.subnet import Subnet, axis_sizes, cover, embed, extract
from jaxfm.tasks import Task


def hetero_fl(
    model: Model,
    task: Task,
    local: Local,
    tiers: Sequence[Subnet],
    optimizer: optax.GradientTransformation | None = None,
    *,
    scaler: bool = False,
) -> Algorithm:
    """Width-heterogeneous federated averaging, one bucket a tier.

    One tier of full width is federated averaging. Partition: what a tier covers is shared; nothing
    is personal.

    Args:
      model: of full width; its `apply` runs the slices too.
      tiers: what the clients of each bucket hold.
      optimizer: on the server, as in `fed_opt`; None: plain averaging.
      scaler: for networks of convolutions and dense layers without norms (`scaled_slice`).
    Raises:
      ValueError: no tier, or one that does not fit the model.
    """
    check_tiers(model, tiers, "hetero_fl")
    init, server = server_optimizer(optimizer or optax.sgd(1.0))
    runs = lambda subnet: scaled_slice(model, subnet) if scaler else model
    buckets = tuple(_tier(runs(subnet), task, local, subnet) for subnet in tiers)
    return Algorithm(init, buckets, server, model)


def _tier(model: Model, task: Task, local: Local, subnet: Subnet) -> Bucket:
    fit = local_fit(objective(model, task), local)
    sent_axes = Movement(model.axes.params, model.axes.stats)
    full = jax.eval_shape(model.init, jax.random.key(0))
    like = Movement(full.params, full.stats)

    def send(server: FedOptState, public) -> Variables:
        return extract(server.variables, model.axes, subnet)

    def client(download: Variables, memory, data: ClientData, profile: Profile, key: Key):
        trained, info = fit(download, data, profile.max_steps, key)
        examples = info["examples"]
        return Mean(scaled(examples, difference(trained, download)), examples), memory, info

    def lift(server: FedOptState, sums: Mean) -> Mean:
        num = embed(sums.num, sent_axes, subnet, like)
        return Mean(num, scaled(sums.den, cover(sent_axes, subnet, like)))

    def personal(server: FedOptState, memory) -> Variables:
        return send(server, None)

    return Bucket(model, send, client, lift=lift, personal=personal)


def scaled_slice(model: Model, subnet: Subnet) -> Model:
    """The model for slices whose every layer hears as much as in the whole network.

    A kernel's last axis is what it writes, the others are what it reads: it is times full / held
    units of these, which, as relu and pooling pass factors on, is the paper's scaler.
    """
    full = jax.eval_shape(model.init, jax.random.key(0))
    held = jax.eval_shape(lambda v: extract(v, model.axes, subnet), full)

    def gain(axes: tuple, whole: jax.ShapeDtypeStruct, part: jax.ShapeDtypeStruct) -> float:
        reads = zip(axes[:-1], whole.shape[:-1], part.shape[:-1], strict=True)
        return math.prod(of / there for name, of, there in reads if name in subnet.keep)

    gains = jax.tree.map(gain, model.axes.params, full.params, held.params, is_leaf=is_axes)

    def apply(variables: Variables, *inputs, **options):
        params = jax.tree.map(lambda g, x: g * x if g != 1 else x, gains, variables.params)
        return model.apply(variables._replace(params=params), *inputs, **options)

    return model._replace(apply=apply)


def check_tiers(model: Model, tiers: Sequence[Subnet], who: str) -> None:
    """Raises ValueError where an algorithm, `who`, has no tier, or one that does not fit."""
    if not tiers:
        raise ValueError(f"{who} needs at least one tier; Subnet({{}}) is the whole model.")
    full = jax.eval_shape(model.init, jax.random.key(0))
    sizes = axis_sizes(full, model.axes)
    for number, subnet in enumerate(tiers):
        for name in subnet.keep:
            if name not in sizes:
                raise ValueError(
                    f"Tier {number} names the axis {name!r}; the model has {sorted(sizes)}."
                )
        jax.eval_shape(lambda v, subnet=subnet: extract(v, model.axes, subnet), full)
