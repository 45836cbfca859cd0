"""SPATL: shared encoder, personal predictors, control variates, uploads of salient channels only.

    client   (y, p_i) <- (x, p_i): local steps along g - c_i + c on the encoder, along g on p_i
             m_i <- salient coordinates of the trained encoder
             d_i = change of c_i as in SCAFFOLD, c_i <- c_i + m_i d_i
    up       m_i d_i and which channels these are; m_i (y_i - x) follows from it
             (`jaxfm.federated.parts.control_variates`)
    server   x[k] <- x[k] + sum_i n_i m_i[k] (y_i - x)[k] / sum_i n_i m_i[k]
             c[k] <- c[k] + sum_i n_i m_i[k] d_i[k] / n

over those who report, with n the examples of all clients; a coordinate that nobody sends
does not move. Statistics of norms are averaged whole: what flows into a channel changes though
nobody sends its weights. The predictor p_i never leaves its client: `train_predictor` trains one
for clients that join late. Masks are whole channels, so `client_model` is a really smaller network.

A client's variate moves only where the server hears of it, so that c stays the mean of all c_i,
weighted as in SCAFFOLD. In the published form c_i moves everywhere and c in parts, and it does not;
and clients count alike (`published=True`).
Source: Yu et al. 2022 (SPATL, arXiv 2111.14345), section 4 and equations 3 to 13.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Exact,
    IsPersonal,
    Known,
    Mean,
    mean,
    scaled,
    wire_bytes,
)
from jaxfm.federated.averaging import moved, where_covered
from jaxfm.federated.local import UNLIMITED_STEPS, Local, Objective, local_fit, objective
from jaxfm.federated.partition import (
    check_partition,
    head,
    join_variables,
    nothing,
    split_variables,
)
from jaxfm.federated.parts.channel_selection import Select, select_for
from jaxfm.federated.parts.control_variates import (
    check_total,
    common_variate,
    corrected,
    movement,
    next_variate,
    no_variates,
    run_length,
)
from jaxfm.federated.parts.sgd import sgd_of
from jaxfm.federated.registry import register
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.search.least_squares import repair
from jaxfm.search.pruning import Pruned, pruned
from jaxfm.search.recalibration import recalibrate
from jaxfm.search.trace.interpret import coverage, sliced
from jaxfm.tasks import Task
from jaxfm.trees import join_tree, split_tree

_SELECT = 2**31 - 1  # no epoch's number, whose keys `local_fit` folds


class SpatlState(NamedTuple):
    """The model, with the predictor that all start from, and c, like the encoder's parameters."""

    variables: Variables
    variate: PyTree


class SpatlDownload(NamedTuple):
    """The encoder and c; the first predictor is known to all from the start."""

    encoder: Variables
    variate: PyTree
    first: Known


class SpatlUpload(NamedTuple):
    """What one client sends.

    Coordinates that are not covered are zeros here and nothing on the wire, and a mask is a bit a
    channel (`Bucket.travels`).

    Attributes:
      gain: m_i d_i, like the encoder's parameters.
      length: f32[]; with it the gain says where the client ended.
      stats: n_i times the movement of the encoder's statistics.
      weight: f32[], n_i.
      masks: the channels of m_i.
    """

    gain: PyTree
    length: Array
    stats: Exact
    weight: Array
    masks: tuple[Array, ...]


class SpatlSums(NamedTuple):
    """The encoder's covered movement over covered examples, and what the c_i gained, weighted."""

    movement: Mean
    gain: PyTree


class SpatlMemory(NamedTuple):
    """What a client keeps.

    Attributes:
      predictor: p_i.
      variate: c_i.
      masks: a group's bool[size], the channels it sent last.
      selector: the selector's own state.
      choices: i32[], how often it has chosen.
    """

    predictor: Variables
    variate: PyTree
    masks: tuple[Array, ...]
    selector: PyTree
    choices: Array


@register(
    select=select_for,
    is_personal=lambda setting: setting.is_last,
    breaks={
        "identical_clients": "The variate c is divided by all clients, absent ones too.",
        "one_step": "Only the salient part of a movement is uploaded.",
    },
)
def spatl(
    model: Model,
    task: Task,
    local: Local,
    select: Select,
    *,
    num_clients: int,
    total_examples: float,
    is_personal: IsPersonal = head,
    select_times: int | None = None,
    published: bool = False,
) -> Algorithm:
    """Salient parameter aggregation and transfer learning.

    Partition: `is_personal` says what a client keeps to itself; the rest is the encoder. With
    everything salient and `is_personal=nothing` this is SCAFFOLD.

    Args:
      model, task: as in `fed_avg`.
      local: with an optimizer that is gradient descent, with or without momentum.
      select: which channels are salient, of `jaxfm.federated.parts.channel_selection`.
      num_clients, total_examples: N and n, of all clients there are.
      is_personal: of the path of a leaf.
      select_times: how often a client chooses; then its channels stay, as they must where its
        model has been sliced. None: in every round.
      published: move c_i everywhere, not only where it is sent, and let clients count alike.
    Raises:
      ValueError: another optimizer; nothing is shared; numbers below 1.
    """
    check_total("num_clients", num_clients)
    check_total("total_examples", total_examples)
    if select_times is not None and select_times < 1:
        raise ValueError(f"select_times={select_times}: a client chooses at least once.")
    if is_personal is not nothing:
        check_partition(model, is_personal)
    bucket = _bucket(model, task, local, select, is_personal, select_times, published)

    def init(variables: Variables) -> SpatlState:
        return SpatlState(variables, no_variates(split_tree(variables.params, is_personal)[0]))

    def server(state: SpatlState, totals: SpatlSums, public, key: Key):
        encoder, first = split_variables(state.variables, is_personal)
        variables = join_variables(moved(encoder, mean(totals.movement)), first)
        total = num_clients if published else total_examples
        return SpatlState(variables, common_variate(state.variate, totals.gain, total)), {}

    trait = None if is_personal is nothing else is_personal
    return Algorithm(init, (bucket,), server, model, trait)


def _bucket(
    model: Model, task: Task, local: Local, select: Select, is_personal: IsPersonal,
    select_times: int | None, published: bool,
) -> Bucket:  # fmt: skip
    sgd = sgd_of(local.optimizer, "spatl")
    loss = objective(model, task)
    network = select.network

    def send(server: SpatlState, public) -> SpatlDownload:
        encoder, first = split_variables(server.variables, is_personal)
        return SpatlDownload(encoder, server.variate, Known(first))

    def init_client(download: SpatlDownload, data, profile, key: Key) -> SpatlMemory:
        whole = tuple(
            jnp.ones((g.layers, g.size) if g.layers else (g.size,), bool) for g in network.groups
        )
        return SpatlMemory(
            download.first.value, no_variates(download.encoder.params), whole,
            select.init(key), jnp.int32(0),
        )  # fmt: skip

    def client(download: SpatlDownload, memory: SpatlMemory, data: ClientData, profile, key: Key):
        select_key = jax.random.fold_in(key, _SELECT)
        start = join_variables(download.encoder, memory.predictor)
        own = _everywhere(memory.variate, start.params, is_personal)
        common = _everywhere(download.variate, start.params, is_personal)
        fit = local_fit(loss, local, corrected(own, common))
        trained, info = fit(start, data, profile.max_steps, key)
        encoder, predictor = split_variables(trained, is_personal)
        new = next_variate(
            memory.variate, download.variate, download.encoder.params, encoder.params,
            info.spent.steps, sgd,
        )  # fmt: skip
        masks, selector = _choose(select, select_times, memory, trained, data, select_key)
        covered = split_variables(coverage(network, masks), is_personal)[0]
        gain = where_covered(covered.params, jax.tree.map(jnp.subtract, new, memory.variate))
        kept = new if published else jax.tree.map(jnp.add, memory.variate, gain)
        # An empty client weighs nothing, and clients that count alike weigh one.
        weight = jnp.sign(info.examples) if published else info.examples
        stats = scaled(weight, jax.tree.map(jnp.subtract, encoder.stats, download.encoder.stats))
        length = run_length(info.spent.steps, sgd)
        upload = SpatlUpload(gain, length, Exact(stats), weight, masks)
        info = info.measured(bytes_up=wire_bytes(upload, travels(upload)))
        memory = SpatlMemory(predictor, kept, masks, selector, memory.choices + 1)
        return upload, memory, info

    def receive(server: SpatlState, public, upload: SpatlUpload) -> SpatlSums:
        covered = split_variables(coverage(network, upload.masks), is_personal)[0]
        weights = (
            jax.tree.map(lambda m: upload.weight * m.astype(jnp.float32), covered.params),
            jax.tree.map(lambda _: upload.weight, upload.stats),
        )
        move = where_covered(covered.params, movement(upload.gain, server.variate, upload.length))
        gain = scaled(upload.weight, upload.gain)
        return SpatlSums(Mean((scaled(upload.weight, move), upload.stats), weights), gain)

    def travels(upload: SpatlUpload) -> SpatlUpload:
        covered = split_variables(coverage(network, upload.masks), is_personal)[0]
        gain = jax.tree.map(lambda m: m.mean(dtype=jnp.float32), covered.params)
        whole = jax.tree.map(lambda _: 1.0, upload)
        return whole._replace(gain=gain, masks=(1 / 8,) * len(upload.masks))

    def personal(server: SpatlState, memory: SpatlMemory) -> Variables:
        return join_variables(split_variables(server.variables, is_personal)[0], memory.predictor)

    return Bucket(model, send, client, init_client, receive, personal=personal, travels=travels)


def _choose(
    select: Select, select_times: int | None, memory: SpatlMemory, variables: Variables,
    data: ClientData, key: Key,
) -> tuple[tuple[Array, ...], PyTree]:  # fmt: skip
    """(masks, selector's state): chosen again, or those of the last time."""
    again = lambda: select.choose(memory.selector, variables, data, key)
    if select_times is None:
        return again()
    stay = lambda: (memory.masks, memory.selector)
    return lax.cond(memory.choices < select_times, again, stay)


def _everywhere(tree: PyTree, params: PyTree, is_personal: IsPersonal) -> PyTree:
    """An encoder's tree with zeros where the predictor is."""
    return join_tree(tree, no_variates(split_tree(params, is_personal)[1]))


def train_predictor(
    model: Model, task: Task, local: Local, *, is_personal: IsPersonal = head
) -> Any:
    """Returns `train(variables, data, key) -> Variables`: a predictor for an encoder held fixed.

    For clients that come late, or that no round ever selected: they download the encoder and train
    what is personal on their own data; statistics of the encoder stay.
    """
    base = objective(model, task)

    def train(variables: Variables, data: ClientData, key: Key) -> Variables:
        encoder, predictor = split_variables(variables, is_personal)

        def loss(params, own: Variables, batch, real: Array, key: Key):
            whole = join_variables(encoder, own)
            joined = join_tree(encoder.params, params)
            value, (stats, total, count) = base(joined, whole, batch, real, key)
            return value, (split_tree(stats, is_personal)[1], total, count)

        fixed: Objective = loss
        own, _ = local_fit(fixed, local)(predictor, data, jnp.int32(UNLIMITED_STEPS), key)
        return join_variables(encoder, own)

    return train


def client_model(
    select: Select,
    variables: Variables,
    memory: SpatlMemory,
    inputs: PyTree = None,
    *,
    repaired: bool = False,
) -> Pruned:
    """A client's network with only its salient channels: `model.apply(model.params, inputs)`.

    Without inputs, statistics of batch norm are those of the whole network, with which a slice
    predicts poorly. If inputs are given, statistics are re-estimated; with `repaired`, what is left
    is also fitted by least squares to make up for what is cut.

    Args:
      variables: what `Bucket.personal` gives for it.
      memory: of one client, as arrays.
      inputs: of the client's own training rows, in batches: [n, B, ...].
      repaired: by these inputs (`jaxfm.search.least_squares`).
    Raises:
      ValueError: `repaired` without inputs.
    """
    kept = tuple(np.asarray(m) for m in memory.masks)
    network = select.network
    if inputs is None:
        if repaired:
            raise ValueError("repaired=True needs inputs of the client's own: give some.")
        return pruned(network, variables, kept)
    if repaired:
        rows = jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), inputs)
        masks = tuple(map(jnp.asarray, kept))
        variables = jax.jit(lambda v, x: repair(network, v, masks, x))(variables, rows)
    small, train = pruned(network, variables, kept), sliced(network, kept, 1)
    measured = jax.jit(lambda v, x: recalibrate(lambda v, b: train(v, b)[1], v, x))
    return small._replace(params=measured(small.params, inputs))
