"""RaFFM: clients train leading slices of one model whose important units were put first.

    order    each axis that slices cut, by salience: per layer, and per head inside heads
    client   min CE(slice) + d KL(slice || student inside it), the slice's prediction held fixed
    server   x_j <- x_j + sum_i n_i (y_ij - x_j) / sum_i n_i   over those i whose slice has j

Reordering permutes every occurrence of an axis alike, so it changes no output; it happens in
`init`, hence at the start of a run, and in the server's step after every `reorder_every` rounds.
Slices are physically extracted. After training `jaxfm.subnet.extract` cuts any leading slice of the
server's variables, one between the tiers too: a model of its own, without retraining.
Source: Yu et al. 2023 (arXiv 2310.00247), salient parameter prioritisation. It ranks queries and
keys, by the mean of their norms; here all axes that slices cut, by the product of the norms of all
maps through a unit, since one that any of them ignores does nothing. In-place distillation: Yu and
Huang 2019, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.distillation import kl_divergence
from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Mean, Profile, mean, scaled
from jaxfm.federated.algorithms.fed_avg import Movement, difference, moved
from jaxfm.federated.algorithms.hetero_fl import check_tiers
from jaxfm.federated.local import Local, Objective, local_fit, objective
from jaxfm.federated.parts.unit_salience import free_axes, mean_norm, salience
from jaxfm.model import Array, Key, Model, PyTree, Variables, count_parameters
from jaxfm.search.elastic.supernet import reorder
from jaxfm.subnet import Subnet, axis_sizes, cover, embed, extract
from jaxfm.tasks import Task

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


def raffm(
    model: Model,
    task: Task,
    local: Local,
    tiers: Sequence[Subnet],
    *,
    axes: Sequence[str] | None = None,
    importance: Importance | None = None,
    reorder_every: int = 0,
    distil: float = 0.0,
    temperature: float = 1.0,
    student: Subnet | None = None,
) -> Algorithm:
    """Federated averaging of leading slices of a model in order of salience, one bucket a tier.

    The server's model is `prioritised` from the start: compare its outputs with those of the
    variables that you gave, not its coordinates. Partition: what a tier covers is shared; nothing
    is personal. One full tier, without distillation, is federated averaging.

    Args:
      model: of full width; its `apply` runs the slices too.
      tiers: what the clients of each bucket hold, `jaxfm.subnet.width(sizes, {axis: share})`.
      axes: to be ranked; None: those of `jaxfm.federated.parts.unit_salience.free_axes` that tiers cut; (): none.
      importance: of the units of an axis; None: `salience`.
      reorder_every: rounds after which the model is put in order again; 0: only at the start.
      distil: d, for tiers that hold more than the student; it needs a task of logits.
      temperature: of the distillation.
      student: leading slices that every larger tier holds; None: the smallest tier.
    Raises:
      ValueError: no tier, one that does not fit or is not leading, an axis without a free order, or
        a setting out of range; with distil > 0 a tier that cannot hold the student.
    """
    check_tiers(model, tiers, "raffm")
    for slices in [*tiers, *([student] if student else [])]:
        _check_leading(slices)
    if reorder_every < 0 or not distil >= 0 or not temperature > 0:
        raise ValueError(
            "reorder_every and distil must not be negative and temperature must be above 0; got "
            f"{reorder_every}, {distil}, {temperature}."
        )
    free, cut = free_axes(model), {name for tier in tiers for name in tier.keep}
    axes = [name for name in free if name in cut] if axes is None else list(axes)
    if not set(axes) <= set(free):
        raise ValueError(f"axes={axes} cannot all be reordered; those that can are {list(free)}.")
    losses = [objective(model, task)] * len(tiers)
    if distil > 0:
        student = _smallest(model, tiers) if student is None else student
        taught = distilled(model, task, student, distil, temperature)
        larger = _larger(model, tiers, student)
        losses = [taught if more else plain for more, plain in zip(larger, losses, strict=True)]

    def rank(variables: Variables) -> Variables:
        return prioritised(model, variables, axes, importance) if axes else variables

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

    fits = [local_fit(loss, local) for loss in losses]
    buckets = tuple(_tier(model, fit, tier) for fit, tier in zip(fits, tiers, strict=True))
    return Algorithm(init, buckets, server, model)


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
            return Mean(mean(upload), (upload.den > 0).astype(jnp.float32)), memory, info

        return bucket._replace(client=client)

    def server(state: RaffmState, totals: Slices, public, key: Key):
        def diluted(num, den, x):
            return num - ((totals.weight - den) * x.astype(jnp.float32)).astype(num.dtype)

        own = Movement(state.variables.params, state.variables.stats)
        num = jax.tree.map(diluted, totals.mean.num, totals.mean.den, own)
        return ours.server(state, totals._replace(mean=Mean(num, totals.weight)), public, key)

    return ours._replace(buckets=tuple(map(alike, ours.buckets)), server=server)


def prioritised(
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


def distilled(
    model: Model, task: Task, student: Subnet, distil: float, temperature: float = 1.0
) -> Objective:
    """The task's loss, plus `distil` times the divergence of the student inside from the whole.

    Teacher and student share parameters; the divergence moves those of the student alone.
    """

    def loss(params, variables: Variables, batch, real: Array, key: Key):
        inputs, targets, weight = task.prepare(batch, key)
        weight = weight * lax.expand_dims(real, range(1, weight.ndim))
        whole = variables._replace(params=params)
        logits, stats = model.apply(whole, inputs, train=True, key=key)
        total, count = task.loss(logits, targets, weight)
        inside = extract(whole, model.axes, student)
        said, _ = model.apply(inside, inputs, train=True, key=key)
        gap, rows = kl_divergence(lax.stop_gradient(logits), said, weight, temperature)
        value = total / jnp.where(count > 0, count, 1)
        return value + distil * gap / jnp.where(rows > 0, rows, 1), (stats, total, count)

    return loss


def _tier(model: Model, fit: Callable, subnet: Subnet) -> Bucket:
    sent_axes = Movement(model.axes.params, model.axes.stats)
    full = jax.eval_shape(model.init, jax.random.key(0))
    like = Movement(full.params, full.stats)

    def send(server: RaffmState, public) -> Variables:
        return extract(server.variables, model.axes, subnet)

    def client(download: Variables, memory, data: ClientData, profile: Profile, key: Key):
        trained, info = fit(download, data, profile.max_steps, key)
        examples = info["examples"]
        return Mean(scaled(examples, difference(trained, download)), examples), memory, info

    def lift(server: RaffmState, sums: Mean) -> Slices:
        num = embed(sums.num, sent_axes, subnet, like)
        return Slices(Mean(num, scaled(sums.den, cover(sent_axes, subnet, like))), sums.den)

    def personal(server: RaffmState, memory) -> Variables:
        return send(server, None)

    return Bucket(model, send, client, lift=lift, personal=personal)


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
                raise ValueError(f"distil > 0 needs one width for all layers; not so {name!r}.")
            held, needed = width(name, tier), width(name, student)
            if needed > held:
                raise ValueError(
                    f"Tier {number} holds {held} of {name!r}, the student {needed}: with "
                    "distil > 0 every tier holds the student; give one that fits in all."
                )
    larger = [any(width(n, student) < width(n, tier) for n in student.keep) for tier in tiers]
    if not any(larger):
        raise ValueError("With distil > 0 some tier must hold more than the student does.")
    return larger
