"""GNN-RL as published: PPO with an actor, a critic and several steps per episode.

An episode starts from the dense network and multiplies each group's kept share by 1 - a until the
target is met:  keep <- clip(keep (1 - a), lowest, 1),  a ~ N(tanh(W2 relu(W1 z)), std²).

Defects of the released code are mended: embeddings are computed for every state and not only for
the first, features describe structure instead of fresh noise, there is no dropout while acting, and
the critic is unbounded. What the caller projects is the final keep.

Source: Yu et al. 2022, GNN-RL (arXiv 2102.03214), sections 3.1 to 3.3 and its released code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxfm.model import Array, Key, PyTree
from jaxfm.search.strategies.gnn_rl import HIDDEN, descend, embed_graph, init_policy, standardised
from jaxfm.search.strategies.policy_graph import PolicyGraph
from jaxfm.search.strategies.strategy import Strategy, to_logits


class PublishedState(NamedTuple):
    """Actor, critic and the transitions between `ask` and `tell`."""

    weights: PyTree
    opt_state: PyTree
    before: Array  # f32[n, T, G], counts at each step
    actions: Array  # f32[n, T, G]
    live: Array  # f32[n, T], 1 until the target is met
    reached: Array  # bool[n]


def gnn_rl_published(
    graph: PolicyGraph,
    share: Callable[[Array], Array],
    target: float,
    *,
    batch: int = 20,
    steps: int = 5,
    lowest: float = 0.1,
    std: float = 0.5,
    learning_rate: float = 3e-4,
    epochs: int = 10,
    clip: float = 0.2,
    discount: float = 0.99,
) -> Strategy:
    """Returns the published agent; an episode that never meets the target is rewarded with -100.

    Args:
      graph: what `policy_graph` returned.
      share: `(counts f32[G]) -> f32[]`, a share of the dense cost.
      target: the share that an episode must fall to.
      batch: episodes per update (100 environment steps).
      steps: the most steps of an episode.
      lowest: the smallest share of a group that is kept.
      std: fixed standard deviation of the actions.
      learning_rate: Adam's.
      epochs: full-batch gradient steps per update.
      clip: ε of PPO.
      discount: γ.
    """
    num_groups = len(graph.sizes)
    optimizer = optax.adam(learning_rate)

    def init(key: Key) -> PublishedState:
        weights = _init_weights(key)
        zero = jnp.zeros((batch, steps, num_groups))
        return PublishedState(
            weights=weights,
            opt_state=optimizer.init(weights),
            before=zero,
            actions=zero,
            live=jnp.zeros((batch, steps)),
            reached=jnp.zeros(batch, bool),
        )

    def episode(weights: PyTree, key: Key):
        def step(keep: Array, key: Key):
            counts = keep * graph.sizes
            live = share(counts) > target
            action = _mean(weights, graph, counts) + std * jax.random.normal(key, (num_groups,))
            after = jnp.where(live, jnp.clip(keep * (1 - action), lowest, 1.0), keep)
            return after, (counts, action, live.astype(jnp.float32))

        keep, seen = lax.scan(step, jnp.ones(num_groups), jax.random.split(key, steps))
        return keep, seen, share(keep * graph.sizes) <= target

    def ask(state: PublishedState, key: Key) -> tuple[Array, PublishedState]:
        keys = jax.random.split(key, batch)
        keep, (before, actions, live), reached = jax.vmap(lambda k: episode(state.weights, k))(keys)
        return to_logits(keep), state._replace(
            before=before, actions=actions, live=live, reached=reached
        )

    def tell(state: PublishedState, actions: Array, counts: Array, scores: Array) -> PublishedState:
        returns = _returns(state, scores, discount)
        loss = _loss(state, graph, returns, std, clip)
        weights, opt_state = descend(loss, optimizer, state.weights, state.opt_state, epochs)
        return state._replace(weights=weights, opt_state=opt_state)

    return Strategy(init, ask, tell, batch)


def _init_weights(key: Key) -> PyTree:
    actor, critic, head, read = jax.random.split(key, 4)
    draw = lambda k, a, b: jax.random.normal(k, (a, b)) / a**0.5
    return {
        "actor": init_policy(actor),
        "critic": init_policy(critic),
        "w1": draw(head, HIDDEN, 200),
        "w2": draw(read, 200, 1) * 0.1,
        "value": jnp.zeros((HIDDEN, 1)),
    }


def _mean(weights: PyTree, graph: PolicyGraph, counts: Array) -> Array:
    """Returns the actor's mean actions f32[G]."""
    z = embed_graph(weights["actor"], graph, counts)
    return jnp.tanh(jax.nn.relu(z @ weights["w1"]) @ weights["w2"])[:, 0]


def _value(weights: PyTree, graph: PolicyGraph, counts: Array) -> Array:
    return (embed_graph(weights["critic"], graph, counts).mean(0) @ weights["value"])[0]


def _flat(x: Array) -> Array:
    """Steps of all episodes, [n, T, ...] -> [n T, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _returns(state: PublishedState, scores: Array, discount: float) -> Array:
    """Returns standardised discounted returns f32[n T] of all steps."""
    points = 100 * (scores - 1)  # accuracy - 100, where scores are accuracies
    # An episode that misses the target is never better than one that meets it.
    worst = jnp.minimum(-100.0, jnp.where(state.reached, points, 0).min())
    reward = jnp.where(state.reached, points, worst)
    still_to_come = jnp.cumsum(state.live[:, ::-1], axis=1)[:, ::-1] - state.live
    returns = (reward[:, None] * discount**still_to_come).reshape(-1)
    return standardised(returns, state.live.reshape(-1))


def _loss(
    state: PublishedState, graph: PolicyGraph, returns: Array, std: float, clip: float
) -> Callable[[PyTree], Array]:
    """Returns PPO's loss of the weights, over the steps before the target was met."""
    before, taken, live = _flat(state.before), _flat(state.actions), state.live.reshape(-1)

    def log_prob(weights: PyTree) -> Array:
        means = jax.vmap(lambda c: _mean(weights, graph, c))(before)
        return (-0.5 * jnp.square((taken - means) / std)).sum(-1)

    old = lax.stop_gradient(log_prob(state.weights))

    def loss(weights: PyTree) -> Array:
        values = jax.vmap(lambda c: _value(weights, graph, c))(before)
        advantage = lax.stop_gradient(returns - values)
        ratio = jnp.exp(log_prob(weights) - old)
        clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
        gain = jnp.minimum(ratio * advantage, clipped * advantage)
        each = -gain + 0.5 * jnp.square(values - returns)
        return (each * live).sum() / jnp.maximum(live.sum(), 1)

    return loss
