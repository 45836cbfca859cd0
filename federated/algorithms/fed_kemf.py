"""FedKEMF: a small knowledge network travels; every client keeps a network of its own design.

    client   minimise  CE(v(x), y) + CE(u(x), y) + m KL(u || v) + m KL(v || u),    u from w
    server   w0 = w + sum_i n_i (u_i - w) / sum_i n_i
             w <- argmin_w KL(teacher || f_w) on unlabelled data, from w0; the u_i vote the teacher

Each KL moves its second network only (deep mutual learning). Uploads have the size of w whatever
the clients' networks v_i are. Without public data the server stops at w0. Since nothing reads
labels, inputs that nobody has to hold serve as well: `jaxfm.data.smooth_noise` in their place was
worth 9 points over stopping at w0 on digits (docs/results/federated.md).
Source: Yu et al. 2022 (arXiv 2208.07978); Zhang et al. 2018 (deep mutual learning).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxfm.distillation import kl_divergence
from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Exact, Profile
from jaxfm.federated.averaging import difference, send_variables
from jaxfm.federated.local import Local, Objective, local_fit
from jaxfm.federated.parts.ensemble import (
    Distill,
    PredictionUpload,
    Vote,
    check_distill,
    distill_for,
    fusion,
    max_vote,
    mean_vote,
    vote_for,
)
from jaxfm.federated.registry import Setting, register
from jaxfm.model import Array, Key, Model, Variables
from jaxfm.tasks import Task, prepare_weighted


class FedKemfState(NamedTuple):
    """The server keeps the knowledge network, and nothing else."""

    variables: Variables


def smallest_model(setting: Setting) -> Model:
    """The knowledge network of a run: its smallest tier."""
    return setting.models[-1]


@register(model=smallest_model, distill=distill_for, vote=vote_for)
def fed_kemf(
    model: Model,
    task: Task,
    local: Local,
    models: Sequence[Model],
    distill: Distill,
    *,
    vote: Vote | None = None,
    mutual: float = 1.0,
    average: bool = True,
) -> Algorithm:
    """Mutual learning on clients, ensemble distillation on the server; one bucket an architecture.

    Partition: the knowledge network is shared, the clients' own ones are personal. These start from
    `init` of their model with a key of the client's; for pretrained ones give
    `own._replace(init=lambda key: variables)`.

    Args:
      model: the knowledge network, which travels; `Rounds.init` takes its variables.
      task: the loss of both.
      local: training on the client, of both networks by one optimizer.
      models: the clients' own networks by bucket, with outputs of the same shape.
      distill: on the server, where `compile_rounds(public={leaf: [P, ...]})` gives it data.
      vote: the teacher; None: the mean of logits.
      mutual: m, the weight of mutual learning.
      average: start distillation from the clients' average; if not, from the last round's w.
    Raises:
      ValueError: no model, a negative weight, settings of distillation out of range.
    """
    if not models:
        raise ValueError("fed_kemf needs at least one model; give the clients' own networks.")
    if not mutual >= 0:
        raise ValueError(f"mutual={mutual} must be a weight of at least 0.")
    check_distill(distill)
    vote = mean_vote() if vote is None else vote
    receive, server = fusion(model, task, distill, vote, average=average)

    def bucket(own: Model) -> Bucket:
        return _bucket(model, own, task, local, mutual, vote)._replace(receive=receive)

    return Algorithm(FedKemfState, tuple(map(bucket, models)), server, model)


@register(
    like="fed_kemf",
    model=smallest_model,
    distill=distill_for,
    breaks=dict.fromkeys(
        ("one_step", "statistics"), "Weights are not averaged: the server learns by distillation."
    ),
)
def fed_kemf_published(
    model: Model, task: Task, local: Local, models: Sequence[Model], distill: Distill
) -> Algorithm:
    """FedKEMF as published: the teacher is the maximum, and w goes on from the last round's.

    The default differs in both: it takes the mean and starts from the clients' average. The labels
    that the authors' program reads on the server are in neither.
    """
    return fed_kemf(model, task, local, models, distill, vote=max_vote(), average=False)


def mutual_objective(knowledge: Model, own: Model, task: Task, mutual: float) -> Objective:
    """The loss of both networks on one batch; parameters are {"own": ..., "knowledge": ...}.

    Each is the other's teacher, held fixed: the gradient of each is that of its own cross-entropy
    and of the one divergence in which it is the student. Reported is the own network's loss.
    """
    networks = {"own": own, "knowledge": knowledge}

    def loss(params, variables: Variables, batch, real: Array, key: Key):
        inputs, targets, weight = prepare_weighted(task, batch, real, key)
        logits, stats, nats = {}, {}, {}
        for name, network in networks.items():
            part = part_of(variables._replace(params=params), name)
            logits[name], stats[name] = network.apply(part, inputs, train=True, key=key)
            nats[name] = task.loss(logits[name], targets, weight)
        value = jnp.zeros((), jnp.float32)
        for student, teacher in (("own", "knowledge"), ("knowledge", "own")):
            total, count = nats[student]
            gap, rows = kl_divergence(lax.stop_gradient(logits[teacher]), logits[student], weight)
            value += total / jnp.where(count > 0, count, 1)
            value += mutual * gap / jnp.where(rows > 0, rows, 1)
        return value, (stats, *nats["own"])

    return loss


def both_networks(own: Variables, knowledge: Variables) -> Variables:
    """The variables of two networks as those of one."""
    pairs = zip(own, knowledge, strict=True)
    return Variables(*({"own": v, "knowledge": u} for v, u in pairs))


def part_of(variables: Variables, name: str) -> Variables:
    """One network of the two."""
    return Variables(*(collection[name] for collection in variables))


def _bucket(
    knowledge: Model, own: Model, task: Task, local: Local, mutual: float, vote: Vote
) -> Bucket:
    fit = local_fit(mutual_objective(knowledge, own, task, mutual), local)

    def init_client(download, data: ClientData, profile: Profile, key: Key) -> Variables:
        return own.init(key)

    def client(download: Variables, memory: Variables, data: ClientData, profile, key: Key):
        trained, info = fit(both_networks(memory, download), data, profile.max_steps, key)
        move = difference(part_of(trained, "knowledge"), download)
        upload = PredictionUpload(move, Exact(info.examples), Exact(vote.known(data)))
        return upload, part_of(trained, "own"), info

    def personal(state: FedKemfState, memory: Variables) -> Variables:
        return memory

    return Bucket(own, send_variables, client, init_client, personal=personal)
