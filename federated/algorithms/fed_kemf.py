"""FedKEMF: a tiny knowledge network travels; every client keeps a network of its own design.

    client   minimise  CE(v(x), y) + CE(u(x), y) + m KL(u || v) + m KL(v || u),    u from w
    server   w0 = w + sum_i n_i (u_i - w) / sum_i n_i
             w <- argmin_w KL(teacher || f_w) on unlabelled data, from w0; the u_i vote the teacher

Each KL moves its second network only (deep mutual learning). Uploads have the size of w whatever
the clients' networks v_i are. Without public data the server stops at w0. Inputs that
nobody has to hold serve, too, since nothing reads labels: `jaxfm.data.noise.smooth_noise` in their
place was worth 9 points over stopping at w0 on digits (docs/results/federated.md).
Source: Yu et al. 2022 (arXiv 2208.07978); Zhang et al. 2018 (deep mutual learning).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxfm.distillation import kl_divergence
from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Profile
from jaxfm.federated.algorithms.fed_avg import difference
from jaxfm.federated.local import Local, Objective, local_fit
from jaxfm.federated.parts.ensemble import (
    Distil,
    Upload,
    Vote,
    check_distil,
    fusion,
    max_vote,
    mean_vote,
)
from jaxfm.model import Array, Key, Model, Variables
from jaxfm.tasks import Task


class FedKemfState(NamedTuple):
    """The knowledge network is all that the server keeps."""

    variables: Variables


def fed_kemf(
    knowledge: Model,
    models: Sequence[Model],
    task: Task,
    local: Local,
    distil: Distil,
    *,
    vote: Vote | None = None,
    mutual: float = 1.0,
    average: bool = True,
) -> Algorithm:
    """Mutual learning on clients, ensemble distillation on the server; one bucket an architecture.

    Partition: the knowledge network is shared, the clients' own ones are personal. These start from
    `model.init` with a key of the client's; for pretrained ones give
    `model._replace(init=lambda key: variables)`.

    Args:
      knowledge: the network that travels; `Rounds.init` takes its variables.
      models: the clients' own networks by bucket, with outputs of the same shape.
      task: the loss of both.
      local: training on the client, of both networks by one optimizer.
      distil: on the server, where `rounds(public={leaf: [P, ...]})` gives it data.
      vote: the teacher; None: the mean of logits.
      mutual: m, the weight of mutual learning.
      average: distillation starts from the clients' average; False: from the last round's w.
    Raises:
      ValueError: no model, a negative weight, settings of distillation out of range.
    """
    if not models:
        raise ValueError("fed_kemf needs at least one model; give the clients' own networks.")
    if not mutual >= 0:
        raise ValueError(f"mutual must not be negative, got {mutual}.")
    check_distil(distil)
    vote = mean_vote() if vote is None else vote
    receive, server = fusion(knowledge, task, distil, vote, average=average)
    buckets = tuple(
        _bucket(knowledge, model, task, local, mutual, vote)._replace(receive=receive)
        for model in models
    )
    return Algorithm(FedKemfState, buckets, server, knowledge)


def fed_kemf_paper(
    knowledge: Model, models: Sequence[Model], task: Task, local: Local, distil: Distil
) -> Algorithm:
    """FedKEMF as published: the teacher is the maximum, and w goes on from the last round's.

    The default differs in both: the mean and a start from the clients' average. The labels that
    the authors' program reads on the server are in neither.
    """
    return fed_kemf(knowledge, models, task, local, distil, vote=max_vote(), average=False)


def mutual_objective(knowledge: Model, own: Model, task: Task, mutual: float) -> Objective:
    """The loss of both networks on one batch; parameters are {"own": ..., "knowledge": ...}.

    Each is the other's teacher, held fixed: the gradient of each is that of its own cross-entropy
    and of the one divergence in which it is the student. Reported is the own network's loss.
    """
    networks = {"own": own, "knowledge": knowledge}

    def loss(params, variables: Variables, batch, real: Array, key: Key):
        inputs, targets, weight = task.prepare(batch, key)
        weight = weight * lax.expand_dims(real, range(1, weight.ndim))
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


def part_of(variables: Variables, name: str) -> Variables:
    """One network of the two."""
    return Variables(*(collection[name] for collection in variables))


def _bucket(
    knowledge: Model, own: Model, task: Task, local: Local, mutual: float, vote: Vote
) -> Bucket:
    fit = local_fit(mutual_objective(knowledge, own, task, mutual), local)

    def send(state: FedKemfState, public) -> Variables:
        return state.variables

    def init_client(download, data: ClientData, profile: Profile, key: Key) -> Variables:
        return own.init(key)

    def client(download: Variables, memory: Variables, data: ClientData, profile, key: Key):
        both = Variables(
            *({"own": v, "knowledge": u} for v, u in zip(memory, download, strict=True))
        )
        trained, info = fit(both, data, profile.max_steps, key)
        move = difference(part_of(trained, "knowledge"), download)
        return Upload(move, info["examples"], vote.known(data)), part_of(trained, "own"), info

    def personal(state: FedKemfState, memory: Variables) -> Variables:
        return memory

    return Bucket(own, send, client, init_client, personal=personal)
