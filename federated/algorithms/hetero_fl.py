"""HeteroFL: each client trains the widest slice of the model that its machine can hold.

A tier is a `Subnet`: the window of each axis that its clients hold. The server averages each
coordinate over those who covered it; a coordinate that nobody covered keeps its value. Slices are
physically extracted, so small tiers are really faster and cost fewer bytes.
Source: Diao et al. 2021, algorithm 1 and, with `scaler`, section 3's 1 / ratio on activations.
Norms divide by the channels that are there and need no scaler; without norms a slice's activations
are smaller than the whole network's. The paper's masked loss and post-hoc statistics are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import optax

from jaxfm.federated.algorithm import Algorithm, Bucket
from jaxfm.federated.algorithms.fed_opt import server_optimizer
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.registry import register
from jaxfm.federated.slices import are_nested, check_tiers, slice_bucket
from jaxfm.model import Model, Variables, is_axes
from jaxfm.subnet import Subnet, extract
from jaxfm.tasks import Task


@register(optimizer=None)
def hetero_fl(
    model: Model,
    task: Task,
    local: Local,
    tiers: Sequence[Subnet],
    *,
    optimizer: optax.GradientTransformation | None = None,
    scaler: bool = False,
) -> Algorithm:
    """Width-heterogeneous federated averaging, one bucket a tier.

    One tier of full width is federated averaging. Partition: what a tier covers is shared; nothing
    is personal.

    Args:
      model: of full width; its `apply` runs the slices too.
      task, local: as in `fed_avg`.
      tiers: what the clients of each bucket hold.
      optimizer: on the server, as in `fed_opt`; None: plain averaging.
      scaler: scale activations of slices up, for networks of convolutions and dense layers without
        norms (`scaled_slice`).
    Raises:
      ValueError: no tier, or one that does not fit the model.
    """
    check_tiers(model, tiers, "hetero_fl")
    init, server = server_optimizer(optimizer or optax.sgd(1.0))

    def tier(subnet: Subnet) -> Bucket:
        runs = scaled_slice(model, subnet) if scaler else model
        return slice_bucket(runs, local_fit(objective(runs, task), local), lambda server: subnet)

    return Algorithm(init, tuple(map(tier, tiers)), server, model, is_nested=are_nested(tiers))


def scaled_slice(model: Model, subnet: Subnet) -> Model:
    """The model for slices, with each layer's inputs scaled up to the whole network's level.

    A kernel's last axis is what it writes, the others are what it reads: it is multiplied by full /
    held units of these, which, as relu and pooling pass factors on, is the paper's scaler.
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
