"""FedMD: clients of any architecture agree on public inputs; only logits travel.

    consensus(x) = mean_i f_i(x)
    client: minimise |f_i(x) - consensus(x)| on public data (digest), then its own loss on its own
    data (revisit), and send f_i(x)

Down and up go 4 bytes for each public example and class; the public data themselves are with
everybody from the start. The first round has no consensus, and only revisits.
Source: Li and Wang 2019 (arXiv 1910.03581), algorithm 1. The paper first trains on labels of the
public data; here these are never read. The distance is the mean absolute one of its program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.cost import count_flops
from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Known,
    Mean,
    Profile,
    mean,
)
from jaxfm.federated.local import UNLIMITED_STEPS, Local, Objective, local_fit, objective
from jaxfm.federated.parts.ensemble import predict, public_inputs
from jaxfm.federated.registry import Setting, register
from jaxfm.model import Array, Key, Model, Variables
from jaxfm.tasks import Task


class FedMdState(NamedTuple):
    """What the clients agree on.

    Attributes:
      variables: as given to `Rounds.init`, untouched: there is no global model.
      consensus: f32[P, ..., K] logits; zeros before the first round.
    """

    variables: Variables
    consensus: Array


class FedMdDownload(NamedTuple):
    """The consensus, and the public data that it is about."""

    consensus: Array
    public: Known


def public_logits(setting: Setting) -> tuple[int, ...]:
    """The shape of the outputs of a run's model on all public data."""
    says = lambda variables: predict(setting.model, variables, setting.public_inputs)
    return jax.eval_shape(says, setting.variables).shape


@register(
    digest=lambda setting: setting.local._replace(epochs=1),
    logits=public_logits,
    breaks=dict.fromkeys(("one_step", "statistics"), "Only predictions of a network travel."),
)
def fed_md(
    models: Sequence[Model], task: Task, local: Local, digest: Local, *, logits: tuple[int, ...]
) -> Algorithm:
    """Agreement by logits; one bucket an architecture.

    Partition: everything is personal. Networks start from `model.init` with a key of the client's;
    `model._replace(init=lambda key: variables)` makes them start from given ones. A client's
    `max_steps` bounds what it does on its own data. `Rounds.init` takes any variables.

    Args:
      models: the clients' networks by bucket, with outputs of the same shape.
      task: the loss on their own data.
      local: training on own data.
      digest: training on the consensus.
      logits: the shape of the outputs on all public data, (P, K) for classification.
    Raises:
      ValueError: no model; no public data in `compile_rounds`, or of another shape.
    """
    if not models:
        raise ValueError("fed_md needs at least one model; give the clients' networks.")

    def init(variables: Variables) -> FedMdState:
        return FedMdState(variables, jnp.zeros(logits, jnp.float32))

    def server(state: FedMdState, totals: Mean, public, key: Key):
        consensus = jnp.where(totals.den > 0, mean(totals), state.consensus)
        return state._replace(consensus=consensus), {}

    buckets = tuple(_bucket(model, task, local, digest, logits) for model in models)
    return Algorithm(init, buckets, server, needs_public=True)


def digest_objective(model: Model) -> Objective:
    """Mean absolute distance of logits to the consensus, over weighted public rows."""

    def loss(params, variables: Variables, batch, real: Array, key: Key):
        weight = batch["weight"]
        weight = weight * lax.expand_dims(real, range(1, weight.ndim))
        own = variables._replace(params=params)
        output, stats = model.apply(own, batch["inputs"], train=True, key=key)
        gap = jnp.abs(output.astype(jnp.float32) - batch["consensus"]).mean(-1)
        total, count = jnp.sum(gap * weight), jnp.sum(weight)
        return total / jnp.where(count > 0, count, 1), (stats, total, count)

    return loss


def _bucket(
    model: Model, task: Task, local: Local, digest: Local, logits: tuple[int, ...]
) -> Bucket:
    revisit = local_fit(objective(model, task), local)
    agree = local_fit(digest_objective(model), digest)

    def send(state: FedMdState, public) -> FedMdDownload:
        inputs, _ = public_inputs(task, public)
        if inputs.shape[0] != logits[0]:
            raise ValueError(
                f"There are {inputs.shape[0]} public examples; fed_md was told logits of shape "
                f"{logits}. Give logits=({inputs.shape[0]}, ...)."
            )
        return FedMdDownload(state.consensus, Known(public))

    def init_client(download, data: ClientData, profile: Profile, key: Key) -> Variables:
        return model.init(key)

    def client(download: FedMdDownload, memory: Variables, data: ClientData, profile, key: Key):
        digest_key, revisit_key = jax.random.split(key)
        inputs, weight = public_inputs(task, download.public.value)
        rows = {"inputs": inputs, "consensus": download.consensus, "weight": weight}
        # No client, and no consensus yet, has nothing to digest.
        some = (data.count > 0) & jnp.any(download.consensus != 0)
        size = jnp.where(some, logits[0], 0).astype(jnp.int32)
        shared = ClientData(rows, jnp.arange(logits[0], dtype=jnp.int32), size)
        first = (memory, shared, jnp.asarray(UNLIMITED_STEPS, jnp.int32), digest_key)
        agreed, about = agree(*first)
        second = (agreed, data, profile.max_steps, revisit_key)
        trained, info = revisit(*second)
        said = predict(model, trained, inputs).astype(jnp.float32)
        one = lambda f, *args: float(count_flops(f, *args))
        digested = about.spent.steps
        flops = digested * one(agree, *first) + info.spent.steps * one(revisit, *second)
        flops += one(lambda v, x: predict(model, v, x), trained, inputs)
        info = info.measured(flops=flops)._replace(extra={"digest_steps": digested})
        return said, trained, info

    def receive(state: FedMdState, public, said: Array) -> Mean:
        return Mean(said, jnp.ones((), jnp.float32))

    def personal(state: FedMdState, memory: Variables) -> Variables:
        return memory

    return Bucket(
        model, send, client, init_client, receive, personal=personal, sends_predictions=True
    )
