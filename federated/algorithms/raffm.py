"""RaFFM: clients train leading slices of one model whose important units were put first.

    order    each axis that slices cut, by salience: per layer, and per head inside heads
    client   min CE(slice) + d KL(slice || student inside it), the slice's prediction held fixed
    server   x_j <- x_j + sum_i n_i (y_ij - x_j) / sum_i n_i   over those i whose slice has j

Reordering permutes every occurrence of an axis alike, so it changes no output; it happens in
`init`, hence at the start of a run, and in the server's step after every `reorder_every` rounds.
Slices are physically extracted. After training `jaxfm.subnet.extract` cuts any leading slice of the
server's variables, one between the tiers too: a model of its own, without retraining.
Source: Yu et al. 2023 (arXiv 2310.00247), salient parameter prioritisation. The paper
ranks queries and keys, by the mean of their norms; here all axes that slices cut are ranked, by the
product of the norms of all maps through a unit, since a unit that any of them ignores does nothing.
In-place distillation: Yu and Huang 2019, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.distillation import kl_divergence
from jaxfm.federated.algorithm import Algorithm, Bucket, Exact, Mean, mean
from jaxfm.federated.averaging import Movement, moved
from jaxfm.federated.local import Local, Objective, local_fit, objective
from jaxfm.federated.parts.unit_salience import free_axes, mean_norm, salience
from jaxfm.federated.registry import register
from jaxfm.federated.slices import are_nested, check_tiers, slice_bucket
from jaxfm.model import Array, Key, Model, PyTree, Variables, count_parameters
from jaxfm.search.elastic.supernet import reorder
from jaxfm.subnet import Subnet, axis_sizes, extract
from jaxfm.tasks import Task, prepare_weighted

# (params, axes, name) -> f32[size], f32[layer, size] or f32[layer, kv_heads, size]
Importance = Callable[[PyTree, PyTree, str], Array]


class RaffmState(NamedTuple):
    """The model, in order, and i32[], the rounds in which anybody came."""

    variables: Variables
    round: Array


class Slices(NamedTuple):
    """Sums of all tiers: each coordinate's own mean, and f32[], the weight of all who came."""

    mean: Mean
    weight: Array


@register(
    axes=None, importance=None, student=None,
    breaks={"one_step": "The model is put in an order of its own before the first round."},
)  # fmt: skip
def raffm(
    model: Model,
    task: Task,
    local: Local,
    tiers: Sequence[Subnet],
    *,
    axes: Sequence[str] | None = None,
    importance: Importance | None = None,
    reorder_every: int = 0,
    distill: float = 0.0,
    temperature: float = 1.0,
    student: Subnet | None = None,
) -> Algorithm:
    """Federated averaging of leading slices of a model in order of salience, one bucket a tier.

    The server's model is in this order from the start: compare its outputs with those of the
    variables that you gave, not its coordinates. Partition: what a tier covers is shared; nothing
    is personal. One full tier, without distillation, is federated averaging.

    Args:
      model: of full width; its `apply` runs the slices too.
      tiers: what the clients of each bucket hold, `jaxfm.subnet.width(sizes, {axis: share})`.
      axes: to be ranked; None: those of `jaxfm.federated.parts.unit_salience.free_axes`
        that tiers cut; (): none.
      importance: of the units of an axis; None: `salience`.
      reorder_every: rounds after which the model is put in order again; 0: only at the start.
      distill: d, for tiers that hold more than the student; it needs a task of logits.
      temperature: of the distillation.
      student: leading slices that every larger tier holds; None: the smallest tier.
    Raises:
      ValueError: no tier, one that does not fit or is not leading, an axis without a free order, or
        a setting out of range; with distill > 0 a tier that cannot hold the student.
    """
    check_tiers(model, tiers, "raffm")
    for slices in [*tiers, *([student] if student else [])]:
        _check_leading(slices)
    if reorder_every < 0 or not distill >= 0 or not temperature > 0:
        raise ValueError(
            "reorder_every and distill must not be negative and temperature must be above 0; got "
            f"{reorder_every}, {distill}, {temperature}."
        )
    free, cut = free_axes(model), {name for tier in tiers for name in tier.keep}
    axes = [name for name in free if name in cut] if axes is None else list(axes)
    if not set(axes) <= set(free):
        raise ValueError(f"axes={axes} cannot all be reordered; those that can are {list(free)}.")
    losses = _losses(model, task, tiers, student, distill, temperature)

    def rank(variables: Variables) -> Variables:
        return prioritise(model, variables, axes, importance) if axes else variables

    def init(variables: Variables) -> RaffmState:
        return RaffmState(rank(variables), jnp.zeros((), jnp.int32))

    def server(state: RaffmState, totals: Slices, public, key: Key):
        came = totals.weight > 0
        count = state.round + came.astype(jnp.int32)
        variables = moved(state.variables, mean(totals.mean))
        if reorder_every:
            due = came & (count % reorder_every == 0)
            variables = lax.cond(due, rank, lambda same: same, variables)
        return RaffmState(variables, count), {}

    def tier(loss: Objective, subnet: Subnet) -> Bucket:
        bucket = slice_bucket(model, local_fit(loss, local), lambda server: subnet)
        lift = lambda server, sums: Slices(bucket.lift(server, sums), sums.den.value)
        return bucket._replace(lift=lift)

    buckets = tuple(map(tier, losses, tiers))
    return Algorithm(init, buckets, server, model, is_nested=are_nested(tiers))


@register(
    like="hetero_fl",
    breaks={
        "identical_clients": "Clients count alike, whatever a slice holds.",
        "statistics": "Clients count alike, whatever a slice holds.",
        "one_step": "The model is put in an order of its own before the first round.",
    },
)
def raffm_published(model: Model, task: Task, local: Local, tiers: Sequence[Subnet]) -> Algorithm:
    """RaFFM as its authors' program does it: x_j <- sum of y_ij over those who have j, / clients.

    Clients count alike, and a coordinate that only m of K held shrinks by m / K: the model tends to
    its smallest slice. Queries and keys alone are ranked, by the mean of their norms, after each
    round. Here heads are cut inside each head; the program cuts across them.
    """
    axes = [name for name in free_axes(model) if name == "qk_dim"]
    ours = raffm(model, task, local, tiers, axes=axes, importance=mean_norm, reorder_every=1)

    def alike(bucket: Bucket) -> Bucket:
        def client(*args):
            upload, memory, info = bucket.client(*args)
            weight = (upload.den.value > 0).astype(jnp.float32)
            return Mean(mean(upload), Exact(weight)), memory, info

        return bucket._replace(client=client)

    def server(state: RaffmState, totals: Slices, public, key: Key):
        def diluted(num, den, x):
            return num - ((totals.weight - den) * x.astype(jnp.float32)).astype(num.dtype)

        own = Movement(state.variables.params, Exact(state.variables.stats))
        num = jax.tree.map(diluted, totals.mean.num, totals.mean.den, own)
        return ours.server(state, totals._replace(mean=Mean(num, totals.weight)), public, key)

    return ours._replace(buckets=tuple(map(alike, ours.buckets)), server=server)


def prioritise(
    model: Model,
    variables: Variables,
    axes: Sequence[str] | None = None,
    importance: Importance | None = None,
) -> Variables:
    """The same function with the important units of each axis first; traceable.

    Axes None: all `free_axes` but the residual stream's, "embed".
    """
    if axes is None:
        axes = [name for name in free_axes(model) if name != "embed"]
    rate = salience if importance is None else importance
    return reorder(model, variables, axes, importance=rate)


def slice_objective(
    model: Model, task: Task, student: Subnet, distill: float, temperature: float = 1.0
) -> Objective:
    """The task's loss, plus `distill` times the divergence of the student inside from the whole.

    Teacher and student share parameters; the divergence moves those of the student alone.
    """

    def loss(params, variables: Variables, batch, real: Array, key: Key):
        inputs, targets, weight = prepare_weighted(task, batch, real, key)
        whole = variables._replace(params=params)
        logits, stats = model.apply(whole, inputs, train=True, key=key)
        total, count = task.loss(logits, targets, weight)
        inside = extract(whole, model.axes, student)
        said, _ = model.apply(inside, inputs, train=True, key=key)
        gap, rows = kl_divergence(lax.stop_gradient(logits), said, weight, temperature)
        value = total / jnp.where(count > 0, count, 1)
        return value + distill * gap / jnp.where(rows > 0, rows, 1), (stats, total, count)

    return loss


def _losses(
    model: Model, task: Task, tiers: Sequence[Subnet], student: Subnet | None, distill: float,
    temperature: float,
) -> list[Objective]:  # fmt: skip
    """What the clients of each tier minimise."""
    plain = objective(model, task)
    if distill == 0:
        return [plain] * len(tiers)
    student = _smallest(model, tiers) if student is None else student
    taught = slice_objective(model, task, student, distill, temperature)
    return [taught if larger else plain for larger in _larger(model, tiers, student)]


def _check_leading(slices: Subnet) -> None:
    for name, index in slices.keep.items():
        for row in map(np.asarray, index if isinstance(index, list | tuple) else [index]):
            if row.ndim != 1 or not np.array_equal(row, np.arange(len(row))):
                raise ValueError(
                    f"keep[{name!r}]={row.tolist()} is no leading slice; important units are put "
                    "first, so give np.arange(count)."
                )


def _smallest(model: Model, tiers: Sequence[Subnet]) -> Subnet:
    full = jax.eval_shape(model.init, jax.random.key(0))
    cut = lambda tier: jax.eval_shape(lambda v: extract(v, model.axes, tier), full)
    return min(tiers, key=lambda tier: count_parameters(cut(tier).params))


def _larger(model: Model, tiers: Sequence[Subnet], student: Subnet) -> list[bool]:
    """Which tiers hold more than the student; raises where one does not hold it, or none more."""
    full = axis_sizes(jax.eval_shape(model.init, jax.random.key(0)), model.axes)
    width = lambda name, x: len(x.keep.get(name, range(full[name])))
    for number, tier in enumerate(tiers):
        for name in [*tier.keep, *student.keep]:
            if any(isinstance(x.keep.get(name), list | tuple) for x in (tier, student)):
                raise ValueError(f"distill > 0 needs one width for all layers; not so {name!r}.")
            held, needed = width(name, tier), width(name, student)
            if needed > held:
                raise ValueError(
                    f"Tier {number} holds {held} of {name!r}, the student {needed}: with "
                    "distill > 0 every tier holds the student; give one that fits in all."
                )
    larger = [any(width(n, student) < width(n, tier) for n in student.keep) for tier in tiers]
    if not any(larger):
        raise ValueError("With distill > 0 some tier must hold more than the student does.")
    return larger
