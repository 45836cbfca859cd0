"""ADP: every client trains the part of the network that its own data use, within a budget.

    s_u = mean over the client's examples of |activation of u| / mean of its layer        (gates)
    k_g = |g| · sigmoid((Σ s)² / (|g| Σ s²) + τ),  the largest τ with MACs(k) <= target   (widths)
    k_g(t) = |g| - (|g| - k_g) (1 - (1 - t/T)³)                                           (schedule)
    x <- x + Σ_i n_i m_i (y_i - x) / Σ_i n_i m_i                                          (server)

A client keeps the k_g(t) units u of each group g that score highest, and m_i covers exactly the
coordinates of those units; where nobody keeps a coordinate it does not move. Groups whose activity
is spread over many units get more of the budget than those that rest on a few.
Sources: Yu et al. 2021 (Adaptive dynamic pruning for non-IID federated learning) for pruning by
the client's data; Gao et al. 2019 (Feature boosting and suppression) for gates by mean |x|; Zhu and
Gupta 2017, equation 1, for the schedule.

In the papers gates are ReLU(W s + b) of each example, the largest r |g| multiply the output, and r
leaves about r² of the operations; here they hold for a client, so that a really smaller network
runs. The successor zeroes single weights (`fed_dp`), by which nothing runs faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Mean,
    Profile,
    mean,
    scaled,
    wire_bytes,
)
from jaxfm.federated.algorithms.fed_avg import Movement, difference, moved
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.search.pruning import Pruned, pruned
from jaxfm.search.ranking import Scores, masks, ranks
from jaxfm.search.strategies.project import projection
from jaxfm.search.trace.cost import budgets, costs
from jaxfm.search.trace.graph import Op
from jaxfm.search.trace.groups import Group, Network
from jaxfm.search.trace.interpret import coverage, full, masked, record, summed_axes
from jaxfm.search.trace.labels import Axis
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
    """What one client sends; coordinates that are not covered travel nowhere.

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


class Adp(NamedTuple):
    """Adaptive dynamic pruning.

    Attributes:
      algorithm: for `rounds`; a client's memory is its scores, or () where gates are federated.
      calibrated: `(server, examples) -> scores`: the memory of a client that the run never saw,
        from its examples alone (leaves [n, ...]; labels as the task wants them, but unused).
      kept: `(server, scores=()) -> masks`: the units that such a client keeps in this round; the
        server's own scores stand in for ().
      extracted: `(server, scores=()) -> Pruned`: the client's model as a really smaller function.
    """

    algorithm: Algorithm
    calibrated: Callable[[AdpState, Mapping[str, Any]], Scores]
    kept: Callable[..., tuple[Array, ...]]
    extracted: Callable[..., Pruned]


def adp(
    network: Network, model: Model, task: Task, local: Local, *,
    target: float = 0.5, rounds: int = 20, gates: str = "personal", multiple: int = 1,
) -> Adp:  # fmt: skip
    """Structured pruning by each client's data, down to a share of the multiply-adds.

    A target of 1 is federated averaging. Partition: parameters and statistics are shared, as far as
    a client keeps them; personal gates stay with it. The global model is dense; the personal
    metrics are those of the pruned ones, by the gates of a client's last round; one that no round
    drew has those of the first network until it is `calibrated`.

    Args:
      network: of `model_network(model, variables, inputs)`; what it ignores stays whole.
      model: what it was made of.
      task, local: as in `fed_avg`.
      target: share of the dense network's multiply-adds that every client may keep, in (0, 1].
      rounds: until the target is reached; the first round is dense.
      gates: "personal" ones follow from the client's data alone; "federated" ones are averaged by
        the server, so that all clients keep the same units.
      multiple: of channels that a group keeps at the target, or the whole group.
    Raises:
      ValueError: a value outside of these, a target too low, a network of one function.
    """
    _check(network, target, rounds, gates)
    federated = gates == "federated"
    widths = schedule(network, target, rounds, multiple)
    measure = activity(network, task, local.batch_size)
    own = gated(network, model)
    fit = local_fit(objective(own, task), local)
    macs = costs(network).macs
    dense = float(macs(network.sizes.astype(np.int64)))

    def init(variables: Variables) -> AdpState:
        return AdpState(variables, _silence(network) if federated else (), jnp.zeros((), jnp.int32))

    def init_client(download: AdpState, data: ClientData, profile: Profile, key: Key) -> Scores:
        return () if federated else measure(download.variables, data)

    def client(download: AdpState, memory: Scores, data: ClientData, profile: Profile, key: Key):
        scores = measure(download.variables, data)
        chosen = download.scores if federated else scores
        counts = widths(chosen, download.round)
        kept = masks(ranks(chosen), counts)
        trained, info = fit(_gate(download.variables, kept), data, profile.max_steps, key)
        examples = info["examples"]
        step = scaled(examples, difference(trained, download.variables))
        step = jax.tree.map(
            lambda m, d: jnp.where(m, d, jnp.zeros((), d.dtype)), covered(kept), step
        )
        gained = scaled(examples, scores) if federated else ()
        upload = AdpUpload(step, examples, kept, gained)
        # What a machine that runs the slice computes and sends.
        info["flops"] = 6 * macs(counts) * info["steps"] * local.batch_size + 2 * dense * examples
        info["bytes_up"] = wire_bytes(upload, travels(upload))
        return upload, () if federated else scores, info

    def covered(kept: tuple[Array, ...]) -> Movement:
        return Movement(*coverage(network, kept)[:2])

    def receive(server: AdpState, public, upload: AdpUpload) -> Mean:
        den = jax.tree.map(lambda m: jnp.where(m, upload.examples, 0), covered(upload.masks))
        units = (upload.examples,) * len(upload.scores)
        return Mean((upload.step, upload.scores), (den, units))

    def travels(upload: AdpUpload) -> AdpUpload:
        # Federated masks follow from the download, personal ones are a bit a unit.
        bits = 0.0 if federated else 1 / 8
        shares = jax.tree.map(lambda m: m.mean(dtype=jnp.float32), covered(upload.masks))
        whole = jax.tree.map(lambda _: 1.0, upload)
        return whole._replace(step=shares, masks=(bits,) * len(upload.masks))

    def server(state: AdpState, totals: Mean, public, key: Key):
        anybody = jnp.array([(den > 0).any() for den in jax.tree.leaves(totals.den)]).any()
        step, new = mean(totals)
        scores = jax.tree.map(lambda x, old: jnp.where(anybody, x, old), new, state.scores)
        round = state.round + anybody.astype(jnp.int32)
        return AdpState(moved(state.variables, step), scores, round), {}

    @jax.jit
    def kept(server: AdpState, scores: Scores = ()) -> tuple[Array, ...]:
        chosen = scores or server.scores
        return masks(ranks(chosen), widths(chosen, server.round))

    @jax.jit
    def calibrated(server: AdpState, examples: Mapping[str, Any]) -> Scores:
        num = jax.tree.leaves(examples)[0].shape[0]
        rows = jnp.arange(num, dtype=jnp.int32)
        return measure(server.variables, ClientData(examples, rows, jnp.int32(num)))

    def extracted(server: AdpState, scores: Scores = ()) -> Pruned:
        return pruned(network, server.variables, jax.device_get(kept(server, scores)))

    send = lambda server, public: server
    personal = lambda server, memory: _gate(server.variables, kept(server, memory))
    bucket = Bucket(own, send, client, init_client, receive, personal=personal, travels=travels)
    return Adp(Algorithm(init, (bucket,), server, model), calibrated, kept, extracted)


def gated(network: Network, model: Model) -> Model:
    """The model of the kept units, at dense shapes; its `Variables.live` is (live, masks)."""

    def apply(variables: Variables, inputs: PyTree, *, train: bool = False, key: Any = None):
        live, kept = variables.live
        out = masked(network, int(train))(variables._replace(live=live), kept, inputs)
        return out if train else (out, variables.stats)

    return model._replace(apply=apply)


def schedule(network: Network, target: float, rounds: int, multiple: int = 1) -> Callable:
    """Returns `widths(scores, round i32[]) -> counts i32[G]`, dense at 0, on target from `rounds`.

    A group's logit is the share of its units in use, (Σ s)² / (size Σ s²): none is starved.
    """
    project = projection(network.sizes, budgets(network, macs=float(target)), multiple=multiple)

    def wish(scores: Array) -> Array:
        s = scores + 1e-6  # a group that is silent everywhere wishes all of itself
        return (jnp.square(s.sum(-1)) / (s.shape[-1] * jnp.square(s).sum(-1))).mean()

    def widths(scores: Scores, round: Array) -> Array:
        final = project(jnp.stack([wish(s) for s in scores]))
        left = jnp.clip(1 - round.astype(jnp.float32) / rounds, 0, 1) ** 3
        return final + jnp.round(left * (network.sizes - final).astype(jnp.float32)).astype(
            jnp.int32
        )

    return widths


def activity(network: Network, task: Task, batch_size: int) -> Callable:
    """Returns `measure(variables, data: ClientData) -> Scores`: the mean over a client's examples.

    In evaluation mode, of the dense network, where activations are added up; 0 without examples.
    """

    def measure(variables: Variables, data: ClientData) -> Scores:
        def add(i: Array, total: Scores) -> Scores:
            place = i * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
            rows = jnp.take(data.index, place, mode="clip")
            batch = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), dict(data.examples))
            inputs = task.prepare(batch, None)[0]
            found = jax.vmap(lambda row: _activity(network, variables, row))(inputs)
            real = (place < data.count).astype(jnp.float32)
            return jax.tree.map(lambda t, s: t + jnp.tensordot(real, s, 1), total, found)

        total = lax.fori_loop(0, -(-data.count // batch_size), add, _silence(network))
        return jax.tree.map(lambda t: t / jnp.maximum(data.count, 1).astype(jnp.float32), total)

    return measure


def _activity(network: Network, variables: Variables, row: PyTree) -> Scores:
    """|Activation| of each unit in one example, as a share of the mean of each layer it enters."""
    inputs = jax.tree.map(lambda x: x[None], row)
    plan = network.plan(0, inputs)

    def tap(op: Op, operands: list[Array]) -> dict[int, Array]:
        side, dims = summed_axes(op, plan)
        if op.name == "reduce_sum" or not dims or not isinstance(op.inputs[side], int):
            return {}
        axes = plan.axes[op.inputs[side]]  # type: ignore[index]
        value = jnp.abs(operands[side].astype(jnp.float32))
        others = lambda d: [i for i in range(len(axes)) if i != d]
        return {d: value.mean(others(d)) for d in dims if axes[d].shape[1]}

    scores = list(_silence(network))
    for op, rates in record(network, variables, tap, inputs):
        for d, rate in rates.items():
            axis = plan.axes[op.inputs[summed_axes(op, plan)[0]]][d]  # type: ignore[index]
            for g, group in enumerate(network.groups):
                index, column = np.nonzero(_of(group, axis))
                if not len(index):
                    continue
                # Inside a loop a rate has an axis of layers in front.
                sums = jnp.zeros((*rate.shape[:-1], group.size))
                sums = sums.at[..., axis[index, column] - group.first].add(rate[..., index])
                sums = sums.sum(0) if sums.ndim > scores[g].ndim else sums
                scores[g] += sums / jnp.maximum(sums.mean(-1, keepdims=True), 1e-12)
    return tuple(scores)


def _silence(network: Network) -> Scores:
    return tuple(jnp.zeros(m.shape, jnp.float32) for m in full(network))


def _gate(variables: Variables, kept: tuple[Array, ...]) -> Variables:
    return variables._replace(live=(variables.live, kept))


def _of(group: Group, axis: Axis) -> np.ndarray:
    """bool, like the axis: where units of the group stand."""
    return (axis >= group.first) & (axis < group.first + group.size)


def _check(network: Network, target: float, rounds: int, gates: str) -> None:
    if not 0 < target <= 1:
        raise ValueError(f"target={target} must be in (0, 1], a share of the multiply-adds.")
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1: the first round is dense.")
    if gates not in ("personal", "federated"):
        raise ValueError(f"gates={gates!r} is unknown; choose 'personal' or 'federated'.")
    if len(network.functions) < 2:
        raise ValueError("The network has no training function; make it with `model_network`.")
