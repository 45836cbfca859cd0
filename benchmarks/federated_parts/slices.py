"""What the slices of RaFFM, ADP and SPATL are worth, measured on runs that are done."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from federated_parts.runs import OWN, Run, bucket_of
from federated_parts.work import TASK, Work, accuracy
from jaxfm.data.federation import Federation, all_rows
from jaxfm.federated import (
    Bucket,
    Population,
    Setting,
    client_costs,
    client_metrics,
    client_variables,
    profiles,
)
from jaxfm.federated.algorithms.adp import gates_for, kept_channels
from jaxfm.federated.parts.channel_gates import gated_model
from jaxfm.federated.preparation import make_tiers
from jaxfm.model import Variables, count_parameters
from jaxfm.search import masked, model_network, recalibrate, repair
from jaxfm.search.trace.cost import counts_of
from jaxfm.search.trace.groups import Network
from jaxfm.subnet import Subnet, axis_sizes, extract

BATCH = 64  # rows that statistics are measured on at a time


def measure_slices(
    runs: Mapping[str, Run], work: Work, setting: Setting, keep: float
) -> dict[str, float]:
    """Returns the figures of all slices that the runs allow; `federated_table` explains them.

    Args:
      runs: by the name of the row, FedAvg among them.
      work, setting: of the runs.
      keep: the share of the multiply-adds that ADP's clients keep.
    """
    found: dict[str, float] = {}
    drop = lambda name: round(100 * (runs["fed_avg"].end(OWN) - runs[name].end(OWN)), 2)
    for prefix, name in (("", "raffm"), ("low_", "raffm_low")):
        if name in runs:
            figures = leading_slices(runs[name], work, setting)
            found |= {f"{prefix}raffm_{figure}": value for figure, value in figures.items()}
    if "spatl_personal" in runs:
        found |= salient_slices(runs["spatl_personal"], work, setting)
    if "adp" in runs:
        found["adp_flops"] = kept_share(runs["adp"], work, setting, keep)
        found["adp_accuracy_drop"] = drop("adp")
    if "adp_federated" in runs:
        found["adp_federated_drop"] = drop("adp_federated")
    return found


def leading_slices(run: Run, work: Work, setting: Setting) -> dict[str, float]:
    """Of RaFFM: how far a slice lies below the full network, and how small the tiers are."""
    model, tier, gaps = work.model, slice_of(setting, 0.6), []
    for state in run.ends:
        whole = state.server.variables
        small = extract(whole, model.axes, tier)
        gap = accuracy(model, whole, work.test) - accuracy(model, small, work.test)
        gaps.append(100 * gap)
    bucket = bucket_of(run.algorithm, work.size.clients)
    people = Population(work.train[0], profiles(work.size.clients), bucket)
    sizes = [c.parameters for c in client_costs(run.algorithm, people, setting.variables)]
    return {
        "subnet_gap": round(float(np.mean(gaps)), 2),
        "full_over_mean_parameters": round(float(sizes[0] / np.mean(sizes)), 2),
    }


def slice_of(setting: Setting, share: float) -> Subnet:
    """The leading slice, all widths alike, whose share of the parameters is nearest."""
    variables = jax.eval_shape(lambda: setting.variables)
    sizes = axis_sizes(variables, setting.model.axes)
    whole = count_parameters(variables.params)

    def cut(ratio: float) -> Subnet:
        return make_tiers(sizes, setting.axes, (float(ratio),))[0]

    def gap(ratio: float) -> float:
        slice_ = jax.eval_shape(lambda v: extract(v, setting.model.axes, cut(ratio)), variables)
        return abs(count_parameters(slice_.params) / whole - share)

    return cut(min(np.linspace(0.3, 1, 57), key=gap))


def kept_share(run: Run, work: Work, setting: Setting, keep: float) -> float:
    """Of ADP: the mean share of the multiply-adds that clients keep when the target is reached."""
    gates, shares = gates_for(setting, keep=keep), []
    dense = gates.macs(gates.network.sizes.astype(np.int64))
    for state in run.ends:
        late = state.server._replace(round=np.int32(10**6))
        for client in range(work.size.clients):
            scores = jax.tree.map(lambda x, i=client: x[i], state.memories[0])
            kept = jax.device_get(kept_channels(gates, late, scores))
            shares.append(gates.macs(counts_of(gates.network, kept)) / dense)
    return round(float(np.mean(shares)), 4)


def salient_slices(run: Run, work: Work, setting: Setting) -> dict[str, float]:
    """Of SPATL: how many points clients lose on own rows with only their salient channels.

    The slices are taken as they are; "measured", both the slice and the whole network with
    statistics of norms measured anew on the client's training rows; "repaired", the slice also
    fitted on these rows by least squares before that.
    """
    (bucket,) = run.algorithm.buckets
    network = model_network(setting.model, setting.variables, setting.inputs)
    held = bucket._replace(
        model=gated_model(network, work.model),
        personal=lambda _, memory: memory[0]._replace(masks=memory[1]),
    )
    own = run.algorithm._replace(buckets=(held,))
    measure = client_metrics(own, np.zeros(work.size.clients, int), TASK, batch_size=BATCH)
    each = jax.jit(lambda server, memories, rows: lax.map(
        lambda client: _networks(bucket, network, server, *client), (memories, rows)
    ))  # fmt: skip
    found: dict[str, list[float]] = {}
    for seed, state in enumerate(run.ends):
        rows = _some_rows(work.train[seed], 4 * BATCH)
        for name, ends in each(state.server, state.memories[0], rows).items():
            scores = measure(state._replace(memories=(ends,)), work.own[seed])["accuracy"]
            found.setdefault(name, []).append(100 * float(np.nanmean(scores)))
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    return {
        "spatl_slice_drop": round(mean["whole"] - mean["slice"], 2),
        "spatl_slice_drop_measured": round(mean["whole_measured"] - mean["slice_measured"], 2),
        "spatl_slice_drop_repaired": round(mean["whole_measured"] - mean["slice_repaired"], 2),
        "spatl_whole_measured_gain": round(mean["whole_measured"] - mean["whole"], 2),
    }


def _networks(
    bucket: Bucket, network: Network, server, memory, examples
) -> dict[str, tuple[Variables, tuple]]:
    """The forms of one client's network by name: variables, and the masks of its channels."""
    whole, flat = client_variables(bucket, server, memory), TASK.prepare(examples, None)[0]
    inputs = flat.reshape(-1, BATCH, *flat.shape[1:])
    everything, salient = tuple(jnp.ones_like(m) for m in memory.masks), memory.masks

    def measured(variables: Variables, masks: tuple) -> tuple[Variables, tuple]:
        train = lambda v, x: masked(network, 1)(v, masks, x)[1]
        return recalibrate(train, variables, inputs), masks

    return {
        "whole": (whole, everything),
        "whole_measured": measured(whole, everything),
        "slice": (whole, salient),
        "slice_measured": measured(whole, salient),
        "slice_repaired": measured(repair(network, whole, salient, flat), salient),
    }


def _some_rows(federation: Federation, count: int) -> dict[str, np.ndarray]:
    """Leaves [C, count, ...]: as many rows of each client, repeated where it has fewer."""
    index = np.stack([np.resize(rows, count) for rows in all_rows(federation)])
    return {name: leaf[index] for name, leaf in federation.examples.items()}
