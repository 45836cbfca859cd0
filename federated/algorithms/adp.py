"""ADP: every client trains the part of the network that its own data use, within a budget.

    client   (y_i, m_i) <- local steps from x on the units that its gates keep in this round
    server   x <- x + Σ_i n_i m_i (y_i - x) / Σ_i n_i m_i

with m_i the coordinates of those units (`jaxfm.federated.parts.channel_gates`); a coordinate that
nobody keeps does not move.
Source: Yu et al. 2021 (Adaptive dynamic pruning for non-IID federated learning).

In the paper gates are ReLU(W s + b) of each example, the largest r |g| multiply the output, and r
leaves about r² of the operations; here they hold for a client, so that a really smaller network
runs. The paper's successor zeroes single weights (`fed_dp`), by which nothing runs faster.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Exact,
    Mean,
    Profile,
    anybody,
    mean,
    scaled,
    wire_bytes,
)
from jaxfm.federated.averaging import Movement, difference, moved, where_covered
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.parts.channel_gates import Gates, channel_gates, gated_model
from jaxfm.federated.registry import Setting, register
from jaxfm.model import Array, Key, Model, Variables
from jaxfm.search.pruning import Pruned, pruned
from jaxfm.search.ranking import Scores
from jaxfm.search.trace.models import model_network
from jaxfm.tasks import Task


class AdpState(NamedTuple):
    """What the server keeps, and what it sends.

    Attributes:
      variables: of the dense model.
      scores: the clients' mean, where gates are federated; else ().
      round: i32[], rounds in which anybody came.
    """

    variables: Variables
    scores: Scores
    round: Array


class AdpUpload(NamedTuple):
    """What one client sends; coordinates that are not covered cost no bytes.

    Attributes:
      step: n_i m_i (y_i - x).
      examples: f32[], n_i.
      masks: the units of m_i.
      scores: n_i times the client's gates, where gates are federated; else ().
    """

    step: Movement
    examples: Array
    masks: tuple[Array, ...]
    scores: Scores


def gates_for(setting: Setting, *, keep: float = 0.5) -> Gates:
    """The gates of a run; the target is reached after half of its rounds.

    Args:
      keep: share of the multiply-adds that every client keeps.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} must be a share above 0 and up to 1.")
    return channel_gates(
        model_network(setting.model, setting.variables, setting.inputs),
        setting.task,
        batch_size=setting.local.batch_size,
        target=keep,
        rounds=max(1, setting.num_rounds // 2),
    )


@register(gates=gates_for)
def adp(
    model: Model, task: Task, local: Local, gates: Gates, *, federated_gates: bool = False
) -> Algorithm:
    """Structured pruning by each client's data, down to a share of the multiply-adds.

    A target of 1 is federated averaging. Partition: parameters and statistics are shared, as far as
    a client keeps them; personal gates stay with it. The global model is dense; the personal
    metrics are those of the pruned ones, by the gates of a client's last round; a client that no
    round drew has those of the first network until it is `calibrated`.

    Args:
      model, task, local: as in `fed_avg`.
      gates: of `channel_gates`, for a network made of the model.
      federated_gates: average the clients' gates on the server, so that all keep the same units;
        otherwise they follow from a client's data alone.
    """
    own = gated_model(gates.network, model)
    fit = local_fit(objective(own, task), local)
    dense = float(gates.macs(gates.network.sizes.astype(np.int64)))

    def init(variables: Variables) -> AdpState:
        return AdpState(variables, gates.silent if federated_gates else (), jnp.int32(0))

    def init_client(download: AdpState, data: ClientData, profile: Profile, key: Key) -> Scores:
        return () if federated_gates else gates.measure(download.variables, data)

    def client(download: AdpState, memory: Scores, data: ClientData, profile: Profile, key: Key):
        scores = gates.measure(download.variables, data)
        chosen = download.scores if federated_gates else scores
        counts = gates.widths(chosen, download.round)
        kept = gates.masks(chosen, counts)
        start = download.variables._replace(masks=kept)
        trained, info = fit(start, data, profile.max_steps, key)
        step = scaled(info.examples, difference(trained, download.variables))
        step = where_covered(_covered(gates, kept), step)
        gained = scaled(info.examples, scores) if federated_gates else ()
        upload = AdpUpload(step, info.examples, kept, gained)
        # A machine that runs the slice computes and sends so much.
        steps, size = info.spent.steps, local.batch_size
        flops = 6 * gates.macs(counts) * steps * size + 2 * dense * info.examples
        info = info.measured(flops=flops, bytes_up=wire_bytes(upload, travels(upload)))
        return upload, () if federated_gates else scores, info

    def receive(server: AdpState, public, upload: AdpUpload) -> Mean:
        den = jax.tree.map(
            lambda m: jnp.where(m, upload.examples, 0), _covered(gates, upload.masks)
        )
        units = (upload.examples,) * len(upload.scores)
        return Mean((upload.step, upload.scores), (den, units))

    def travels(upload: AdpUpload) -> AdpUpload:
        # Federated masks follow from the download, personal ones are a bit a unit.
        bits = 0.0 if federated_gates else 1 / 8
        shares = jax.tree.map(lambda m: m.mean(dtype=jnp.float32), _covered(gates, upload.masks))
        whole = jax.tree.map(lambda _: 1.0, upload)
        return whole._replace(step=shares, masks=(bits,) * len(upload.masks))

    def server(state: AdpState, totals: Mean, public, key: Key):
        came = anybody(totals.den)
        step, new = mean(totals)
        scores = jax.tree.map(lambda x, old: jnp.where(came, x, old), new, state.scores)
        came = came.astype(jnp.int32)
        return AdpState(moved(state.variables, step), scores, state.round + came), {}

    bucket = Bucket(
        own, lambda server, public: server, client, init_client, receive,
        shared=functools.partial(_gated, gates), travels=travels,
        personal=None if federated_gates else functools.partial(_gated, gates),
    )  # fmt: skip
    return Algorithm(init, (bucket,), server, model)


def _gated(gates: Gates, server: AdpState, memory: Scores = ()) -> Variables:
    """The variables of the network that a client keeps."""
    return server.variables._replace(masks=kept_channels(gates, server, memory))


def _covered(gates: Gates, kept: tuple[Array, ...]) -> Movement:
    """bool, like a movement: the coordinates of the kept units."""
    coordinates = gates.coverage(kept)
    return Movement(coordinates.params, Exact(coordinates.stats))


def kept_channels(gates: Gates, server: AdpState, scores: Scores = ()) -> tuple[Array, ...]:
    """A group's bool[size]: the units that a client keeps in this round.

    Args:
      scores: the client's memory; (): the server's own.
    """
    chosen = scores or server.scores
    return gates.masks(chosen, gates.widths(chosen, server.round))


def calibrated(gates: Gates, server: AdpState, examples: Mapping[str, Any]) -> Scores:
    """The memory of a client that the run never saw, from its examples alone.

    Args:
      examples: leaves [n, ...]; labels as the task wants them, but they are not used.
    """
    num = jax.tree.leaves(examples)[0].shape[0]
    rows = jnp.arange(num, dtype=jnp.int32)
    return gates.measure(server.variables, ClientData(examples, rows, jnp.int32(num)))


def extracted(gates: Gates, server: AdpState, scores: Scores = ()) -> Pruned:
    """A client's model as a really smaller function; arguments as of `kept_channels`."""
    kept = jax.device_get(kept_channels(gates, server, scores))
    return pruned(gates.network, server.variables, kept)
