"""Channel gates: which channels of a network a client's own data use, within a budget.

    s_u = mean over the client's examples of |activation of u| / mean of its layer        (gates)
    k_g = |g| · sigmoid((Σ s)² / (|g| Σ s²) + τ),  the largest τ with MACs(k) <= target   (widths)
    k_g(t) = |g| - (|g| - k_g) (1 - (1 - t/T)³)                                           (schedule)

The k_g(t) units of each group g that score highest are kept. Groups whose activity is spread over
many units get more of the budget than those that rest on a few.
Sources: Gao et al. 2019 (Feature boosting and suppression) for gates by mean |x|; Zhu and Gupta
2017, equation 1, for the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.federated.algorithm import ClientData
from jaxfm.model import Array, Model, PyTree, Variables
from jaxfm.search.activations import unit_activity
from jaxfm.search.ranking import Scores, masks, ranks
from jaxfm.search.strategies.project import budgets, projection
from jaxfm.search.trace.cost import costs
from jaxfm.search.trace.groups import Network
from jaxfm.search.trace.interpret import coverage, masked
from jaxfm.search.trace.unit_weights import zero_scores
from jaxfm.tasks import Task


class Gates(NamedTuple):
    """How channels are gated, as pure functions.

    Attributes:
      network: whose groups of channels are gated.
      silent: scores of a client without examples: zeros f32[size] a group.
      measure: `(variables, data: ClientData) -> scores`: the mean activity of each unit over the
        client's examples.
      widths: `(scores, round i32[]) -> counts i32[G]`, dense in round 0.
      macs: `(counts) -> f32[]`, multiply-adds of the kept network.
    """

    network: Network
    silent: Scores
    measure: Callable[[Variables, ClientData], Scores]
    widths: Callable[[Scores, Array], Array]
    macs: Callable[[Any], Array]

    def masks(self, scores: Scores, counts: Array) -> tuple[Array, ...]:
        """A group's bool[size]: the units that score highest."""
        return masks(ranks(scores), counts)

    def coverage(self, kept: tuple[Array, ...]) -> Variables:
        """bool, like the variables: the coordinates of the kept units."""
        return coverage(self.network, kept)


def channel_gates(
    network: Network, task: Task, *, batch_size: int, target: float = 0.5, rounds: int = 20,
    channel_multiple: int = 1,
) -> Gates:  # fmt: skip
    """Gates that narrow a network to a share of its multiply-adds over some rounds.

    Args:
      network: of `model_network(model, variables, inputs)`; what it ignores stays whole.
      task: prepares the inputs.
      batch_size: examples that are measured at a time.
      target: share of the dense network's multiply-adds that may be kept, in (0, 1].
      rounds: until the target is reached; the first round is dense.
      channel_multiple: a group keeps a multiple of it at the target, or all channels.
    Raises:
      ValueError: a value outside of these, a target too low, a network of one function.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target={target} must be in (0, 1], a share of the multiply-adds.")
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1: the first round is dense.")
    if len(network.functions) < 2:
        raise ValueError("The network has no training function; make it with `model_network`.")
    return Gates(
        network=network,
        silent=zero_scores(network),
        # Both are called outside of rounds as well, for one client after another.
        measure=jax.jit(activity(network, task, batch_size)),
        widths=jax.jit(schedule(network, target, rounds, channel_multiple)),
        macs=costs(network).macs,
    )


def gated_model(network: Network, model: Model) -> Model:
    """The model of the kept units, at dense shapes; `Variables.masks` says which they are."""

    def apply(variables: Variables, inputs: PyTree, *, train: bool = False, key: Any = None):
        plain = Variables(variables.params, variables.stats, variables.live, variables.frozen)
        out = masked(network, int(train))(plain, variables.masks, inputs)
        return out if train else (out, variables.stats)

    return model._replace(apply=apply)


def schedule(network: Network, target: float, rounds: int, channel_multiple: int = 1) -> Callable:
    """Returns `widths(scores, round i32[]) -> counts i32[G]`, dense at 0, on target from `rounds`.

    A group's logit is the share of its units in use, (Σ s)² / (size Σ s²): none is starved.
    """
    limits = budgets(network, macs=float(target))
    project = projection(network.sizes, limits, channel_multiple=channel_multiple)

    def wish(scores: Array) -> Array:
        s = scores + 1e-6  # a group that is silent everywhere asks for all of itself
        return (jnp.square(s.sum(-1)) / (s.shape[-1] * jnp.square(s).sum(-1))).mean()

    def widths(scores: Scores, round: Array) -> Array:
        final = project(jnp.stack([wish(s) for s in scores]))
        left = jnp.clip(1 - round.astype(jnp.float32) / rounds, 0, 1) ** 3
        more = jnp.round(left * (network.sizes - final).astype(jnp.float32))
        return final + more.astype(jnp.int32)

    return widths


def activity(network: Network, task: Task, batch_size: int) -> Callable:
    """Returns `measure(variables, data: ClientData) -> Scores`: the mean over a client's examples.

    In evaluation mode, of the dense network, where activations are added up; 0 without examples.
    """

    def measure(variables: Variables, data: ClientData) -> Scores:
        def alone(row: PyTree) -> Scores:
            return unit_activity(network, variables, jax.tree.map(lambda x: x[None], row))

        def add(i: Array, total: Scores) -> Scores:
            place = i * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
            rows = jnp.take(data.index, place, mode="clip")
            batch = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), dict(data.examples))
            inputs = task.prepare(batch, None)[0]
            found = jax.vmap(alone)(inputs)
            real = (place < data.count).astype(jnp.float32)
            return jax.tree.map(lambda t, s: t + jnp.tensordot(real, s, 1), total, found)

        total = lax.fori_loop(0, -(-data.count // batch_size), add, zero_scores(network))
        return jax.tree.map(lambda t: t / jnp.maximum(data.count, 1).astype(jnp.float32), total)

    return measure
