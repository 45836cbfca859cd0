"""Which channels of a client's model are salient: selectors, all of them within a budget.

`Select.choose` looks at what a client has trained and returns a mask a channel group of the model's
graph (`jaxfm.search.trace.groups`); what is masked out costs what the budget says, by construction.

    everything   all channels
    saliency     one threshold over all groups, s > t, the lowest within the budget; milliseconds
    agent        a search strategy, such as a GNN-RL policy trained before on another network,
                 tuned a little on each client: it proposes, rows held back from training judge

Source of the agent: Yu et al. 2022 (SPATL, arXiv 2111.14345), section 4.3. There test images are
the judge; here a client judges by rows that it holds back, and without any it keeps to saliency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.federated.algorithm import ClientData
from jaxfm.federated.registry import Setting
from jaxfm.model import Array, Key, PyTree, Variables
from jaxfm.search.ranking import Scores, has_scales, importance, masks, ranks
from jaxfm.search.strategies.gnn_rl import gnn_rl, load_policy
from jaxfm.search.strategies.policy_graph import policy_graph
from jaxfm.search.strategies.project import Budget, projection, within
from jaxfm.search.strategies.project import budgets as make_budgets
from jaxfm.search.strategies.strategy import Strategy, ratios, to_logits
from jaxfm.search.trace.groups import Network
from jaxfm.search.trace.interpret import masked
from jaxfm.search.trace.models import model_network
from jaxfm.tasks import Task

_HALVINGS = 40


class Select(NamedTuple):
    """A way to choose channels, as pure functions.

    Attributes:
      network: of `jaxfm.search.model_network`: its groups are what is chosen from.
      init: `(key) -> state`, what a client's selector remembers.
      choose: `(state, variables, data: ClientData, key) -> (masks, state)`, a group's bool[size].
    """

    network: Network
    init: Callable[[Key], PyTree]
    choose: Callable[[PyTree, Variables, ClientData, Key], tuple[tuple[Array, ...], PyTree]]


def everything(network: Network) -> Select:
    """Selects all channels."""

    def choose(state, variables: Variables, data: ClientData, key: Key):
        return tuple(jnp.ones(_shape(g), bool) for g in network.groups), state

    return Select(network, lambda key: (), choose)


def saliency(network: Network, budget: Mapping[str, float], *, kind: str = "auto") -> Select:
    """Selects the channels with the highest importance that a budget has room for.

    Args:
      budget: shares up to 1 or absolute limits by name, as `jaxfm.search.budgets` takes them:
        {"macs": 0.6}.
      kind: of importance, "l1", "l2", "scale", "l2_scale"; "auto": by the scales of norms, where
        there are any (a norm divides by the size of the weights before it), else "l2".
    Raises:
      ValueError: a budget that cannot be met, another kind.
    """
    kind = _kind(network, kind)
    limits = _limits(network, budget)

    def choose(state, variables: Variables, data: ClientData, key: Key):
        scores = _scores(network, variables, kind)
        counts = threshold_counts(scores, network.sizes, limits)
        return masks(ranks(scores), counts), state

    return Select(network, lambda key: (), choose)


def threshold_counts(scores: tuple[Array, ...], sizes: np.ndarray, limits: tuple[Budget, ...]):
    """i32[G]: channels a group above the lowest common threshold that meets the budgets.

    Groups whose layers choose by themselves are counted by their mean over layers.
    """
    values = [s / jnp.maximum(s.mean(-1, keepdims=True), 1e-30) for s in scores]

    def above(t: Array) -> Array:
        each = [(v > t).sum(-1).astype(jnp.float32).mean() for v in values]
        return jnp.clip(jnp.floor(jnp.stack(each)), 1, np.asarray(sizes, np.float32))

    # The counts that were found to fit are what is returned: counting again at the threshold, which
    # ends up equal to the score of a channel, may fall on its other side by a rounding.
    def halve(_, ends: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, counts = ends
        middle = 0.5 * (low + high)
        some = above(middle)
        good = within(limits, some)
        return (
            jnp.where(good, low, middle),
            jnp.where(good, middle, high),
            jnp.where(good, some, counts),
        )

    top = jnp.stack([v.max() for v in values]).max()
    least = jnp.ones(len(values), jnp.float32)
    *_, counts = lax.fori_loop(0, _HALVINGS, halve, (jnp.float32(-1.0), top, least))
    everything = above(jnp.float32(-1.0))
    return jnp.where(within(limits, everything), everything, counts).astype(jnp.int32)


class AgentState(NamedTuple):
    """What an agent remembers: its strategy's state, and the best counts so far."""

    strategy: Any
    counts: Array


def agent(
    network: Network,
    budget: Mapping[str, float],
    strategy: Strategy,
    task: Task,
    *,
    rows: int = 64,
    kind: str = "auto",
) -> Select:
    """Selects what a search strategy finds, one `ask` and `tell` a call.

    A call judges the strategy's batch and the best of the calls before by the loss on `rows`
    examples that the client holds back; the strategy learns from that, so a policy trained before
    (`jaxfm.search.gnn_rl(graph, policy=...)`) is tuned to the client. The order of channels within
    a group is that of their importance.

    Args:
      budget, kind: as in `saliency`.
      strategy: over the network's groups.
      task: whose loss counts.
      rows: held-back examples a judgement, drawn anew in every call.
    Raises:
      ValueError: as `saliency`; rows below 1.
    """
    if rows < 1:
        raise ValueError(f"rows={rows}: an agent judges by at least one example.")
    kind = _kind(network, kind)
    limits = _limits(network, budget)
    project = projection(network.sizes, limits)
    run = masked(network)

    def init(key: Key) -> AgentState:
        return AgentState(strategy.init(key), jnp.zeros(len(network.groups), jnp.int32))

    def choose(state: AgentState, variables: Variables, data: ClientData, key: Key):
        ask_key, row_key, task_key = jax.random.split(key, 3)
        scores = _scores(network, variables, kind)
        order = ranks(scores)
        first = project(to_logits(ratios(threshold_counts(scores, network.sizes, limits),
                                         network.sizes)))  # fmt: skip
        inputs, targets, weight = task.prepare(_validation_batch(data, rows, row_key), task_key)

        def judge(counts: Array) -> Array:
            total, count = task.loss(run(variables, masks(order, counts), inputs), targets, weight)
            return -total / jnp.maximum(count, 1)

        actions, own = strategy.ask(state.strategy, ask_key)
        proposed = jax.vmap(project)(actions)
        known = jnp.where(state.counts[0] > 0, state.counts, first)
        candidates = jnp.concatenate([proposed, known[None], first[None]])
        worth = lax.map(judge, candidates)
        worth = jnp.where(jnp.isfinite(worth), worth, -jnp.float32(1e9))
        # A client that holds nothing back has nothing to learn its policy by.
        assert data.validation_count is not None
        some = data.validation_count > 0
        own = jax.tree.map(
            lambda new, old: jnp.where(some, new, old),
            strategy.tell(own, actions, proposed, worth[:-2]),
            state.strategy,
        )
        best = jnp.where(some, candidates[jnp.argmax(worth)], first)
        return masks(order, best), AgentState(own, best)

    return Select(network, init, choose)


def _validation_batch(data: ClientData, rows: int, key: Key) -> dict[str, Array]:
    """Some validation rows of a client, drawn with replacement."""
    if data.validation_index is None or data.validation_count is None:
        raise ValueError(
            "An agent judges by rows that clients hold back from training: give "
            "Population(local_validation=...)."
        )
    size = jnp.maximum(data.validation_count, 1)
    chosen = data.validation_index[jax.random.randint(key, (rows,), 0, size)]
    return jax.tree.map(lambda x: jnp.take(x, chosen, axis=0), dict(data.examples))


def _shape(group) -> tuple[int, ...]:
    return (group.layers, group.size) if group.layers else (group.size,)


def _kind(network: Network, kind: str) -> str:
    if kind == "auto":
        return "scale" if has_scales(network) else "l2"
    if kind not in ("l1", "l2", "scale", "l2_scale"):
        raise ValueError(
            f"kind={kind!r}: weights alone tell 'l1', 'l2', 'scale' and 'l2_scale'; or 'auto'."
        )
    return kind


def _scores(network: Network, variables: Variables, kind: str) -> Scores:
    scores = importance(network, variables, kind)
    if kind != "scale":
        return scores
    # Scales that are equal, as all are at the start, go by the weights.
    plain = importance(network, variables, "l2")
    return tuple(s + 1e-3 * x for s, x in zip(scores, plain, strict=True))


def _limits(network: Network, budget: Mapping[str, float]) -> tuple[Budget, ...]:
    limits = make_budgets(network, **budget)
    projection(network.sizes, limits)  # raises where the budget is out of reach
    return limits


def select_for(
    setting: Setting,
    *,
    keep: float = 0.5,
    select: Literal["saliency", "agent"] = "saliency",
    policy: str = "",
) -> Select:
    """How the clients of a run select channels.

    Args:
      keep: share of the multiply-adds that the selected channels take.
      select: by a threshold on weights (saliency), or by an agent that learns on each client's own
        validation rows, which --data.local_validation holds back.
      policy: policy.safetensors of a search, from which all agents start; empty: from nothing.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} must be a share above 0 and up to 1.")
    if policy and select != "agent":
        raise ValueError(f"policy={policy!r} requires select=agent.")
    network = model_network(setting.model, setting.variables, setting.inputs)
    budget = {"macs": keep}
    if select == "saliency":
        return saliency(network, budget)
    start = load_policy(policy) if policy else None
    strategy = gnn_rl(policy_graph(network, setting.variables), batch=8, policy=start)
    return agent(network, budget, strategy, setting.task)
