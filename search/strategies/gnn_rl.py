"""GNN-RL: a graph network reads the model, PPO learns how much of each group to keep.

Stage 1 embeds the motif of every contraction, e_k = tanh(B mean tanh(GCN(motif_k))); stage 2 is a
graph convolution over the data flow whose messages are conditioned by them,

    h_i' = tanh(Σ_{j ∈ N(i) ∪ i} (d_i d_j)^-1/2 (W (h_j * e_j) + b)),

and a head shared by all groups reads the mean of one Gaussian logit a group. PPO raises what scored
above its batch: L = E[min(ρ A, clip(ρ, 1 ± ε) A)] + entropy.

Feasibility is by construction here, so an episode is one step and nothing bootstraps: no value
network is needed, the batch mean is the baseline. Since the mean of a group is a function of its
place in the graph, one policy serves any network: what `transfer_policy` returns is the `policy` of
the next search. One bias per group, which belongs to this network, gives the search the freedom of
a direct one.

Source: Yu et al. 2022, GNN-RL (arXiv 2102.03214), sections 3.1 to 3.3; Schulman et al. 2017 (PPO),
equation 7. `gnn_rl_published` keeps the published form.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from safetensors.numpy import load_file, save_file

from jaxfm.model import Array, Key, PyTree
from jaxfm.optimizer import apply_gradients
from jaxfm.search.strategies.policy_graph import (
    GROUP_FEATURES,
    OP_FEATURES,
    PolicyGraph,
    at_groups,
    kept_channels,
    motif,
    spread,
)
from jaxfm.search.strategies.strategy import Strategy, to_logits

_EDGE, _HIDDEN = 20, 50  # the paper's widths


def init_policy(key: Key) -> dict[str, Array]:
    """Parameters of the graph network; they fit any graph."""
    shapes = {
        "split": (OP_FEATURES, _HIDDEN), "inner": (OP_FEATURES, _HIDDEN),
        "outer": (OP_FEATURES, _HIDDEN), "total": (OP_FEATURES, _HIDDEN),
        "edge": (_HIDDEN, _EDGE), "enter": (OP_FEATURES, _EDGE), "flow1": (_EDGE, _EDGE),
        "flow2": (_EDGE, _HIDDEN), "read": (2 * _HIDDEN + GROUP_FEATURES, _HIDDEN),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    draw = lambda k, shape: jax.random.normal(k, shape) / shape[0] ** 0.5
    weights = {name: draw(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    # The first policy is uniform pruning: the head starts at zero.
    return weights | {"head": jnp.zeros((_HIDDEN, 1)), "log_std": jnp.zeros(())}


def embed_graph(policy: PyTree, graph: PolicyGraph, counts: Array) -> Array:
    """f32[G, D]: each group as the graph network sees it when groups keep counts f32[G]."""
    project = lambda name: graph.ops @ policy[name]
    stars = jax.vmap(motif)(
        project("split"), project("inner"), project("outer"), project("total"),
        kept_channels(graph, counts),
    )  # fmt: skip
    edges = jnp.tanh(stars @ policy["edge"])
    h = jnp.tanh(project("enter"))
    h = jnp.tanh(spread(graph, (h * edges) @ policy["flow1"]))
    h = jnp.tanh(spread(graph, (h * edges) @ policy["flow2"]))
    ratio = graph.groups * (counts / graph.sizes)[:, None]
    return jnp.tanh(jnp.concatenate([at_groups(graph, h), ratio], axis=1) @ policy["read"])


class GnnRlState(NamedTuple):
    """The policy and its optimiser."""

    policy: PyTree
    bias: Array  # f32[G], of this network alone
    opt_state: PyTree
    updates: Array  # i32[]


def gnn_rl(
    graph: PolicyGraph,
    *,
    batch: int = 16,
    policy: PyTree = None,
    learning_rate: float = 0.03,
    std: float = 0.7,
    epochs: int = 8,
    clip: float = 0.2,
    entropy: float = 0.0,
    std_range: tuple[float, float] = (0.15, 1.0),
) -> Strategy:
    """PPO on a graph policy, one step an episode.

    Args:
      graph: of `policy_graph`.
      batch: candidates an update.
      policy: parameters to start from, as `transfer_policy` returns them for any network; None
        starts at random.
      learning_rate: of Adam for biases and standard deviation; the graph network has a tenth of it.
      std: of the logits at the start.
      epochs: full-batch gradient steps an update.
      clip: ε of PPO.
      entropy: weight of the entropy bonus.
      std_range: bounds of the learned standard deviation.
    Raises:
      ValueError: fewer than 4 candidates, which cannot be ranked.
    """
    if batch < 4:
        raise ValueError(f"batch={batch}: advantages are relative to the batch, give at least 4.")
    # At the biases' rate the tanh units saturate within some updates; all groups then look alike,
    # the biases alone learn and nothing is left to transfer.
    rates = {True: optax.adam(learning_rate), False: optax.adam(learning_rate / 10)}
    fast = lambda weights: ({name: name == "log_std" for name in weights[0]}, True)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(rates, fast))
    num_groups = len(graph.sizes)

    def init(key: Key) -> GnnRlState:
        own = init_policy(key) if policy is None else jax.tree.map(jnp.asarray, policy)
        own = own | {"log_std": jnp.log(jnp.float32(std))}
        bias = jnp.zeros(num_groups)
        return GnnRlState(own, bias, optimizer.init((own, bias)), jnp.int32(0))

    def gaussian(policy: PyTree, bias: Array) -> tuple[Array, Array]:
        mean = (embed_graph(policy, graph, graph.sizes) @ policy["head"])[:, 0] + bias
        scale = jnp.exp(jnp.clip(policy["log_std"], *jnp.log(jnp.array(std_range))))
        return mean - mean.mean(), scale  # a common shift is the budget's business

    def ask(state: GnnRlState, key: Key) -> tuple[Array, GnnRlState]:
        mean, scale = gaussian(state.policy, state.bias)
        return mean[None] + scale * jax.random.normal(key, (batch, num_groups)), state

    def tell(state: GnnRlState, actions: Array, counts: Array, scores: Array) -> GnnRlState:
        advantage = standardised(scores)
        log_prob = lambda weights: log_normal(actions, *gaussian(*weights))
        before = lax.stop_gradient(log_prob((state.policy, state.bias)))

        def loss(weights: Any) -> Array:
            ratio = jnp.exp(log_prob(weights) - before)
            _, scale = gaussian(*weights)
            return surrogate(ratio, advantage, clip) - entropy * num_groups * jnp.log(scale)

        def epoch(carry: Any, _: None):
            weights, opt_state = carry
            grads = jax.grad(loss)(weights)
            return apply_gradients(optimizer, grads, opt_state, weights), None

        start = ((state.policy, state.bias), state.opt_state)
        ((own, bias), opt_state), _ = lax.scan(epoch, start, length=epochs)
        return GnnRlState(own, bias, opt_state, state.updates + 1)

    return Strategy(init, ask, tell, batch)


def transfer_policy(state: GnnRlState) -> PyTree:
    """What a search learned that holds for other networks: the graph network's parameters."""
    return state.policy


def save_policy(path: str | os.PathLike, policy: PyTree) -> None:
    """Writes what `transfer_policy` returns to a .safetensors file."""
    save_file({name: np.asarray(x) for name, x in policy.items()}, path)


def load_policy(path: str | os.PathLike) -> PyTree:
    """The `policy` that `save_policy` wrote, for a search on any network.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file of something else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no policy {path}; a search by gnn_rl writes one.")
    policy = load_file(path)
    shapes = jax.eval_shape(init_policy, jax.random.key(0))
    if {k: v.shape for k, v in policy.items()} != {k: v.shape for k, v in shapes.items()}:
        raise ValueError(f"{path} holds no policy of this library: it has {sorted(policy)}.")
    return policy


def standardised(scores: Array, counted: Array | None = None) -> Array:
    """Scores with mean 0 and standard deviation 1 (0 where all are equal), of those `counted`."""
    weight = jnp.ones_like(scores) if counted is None else counted.astype(scores.dtype)
    mean = lambda x: (x * weight).sum() / jnp.maximum(weight.sum(), 1)
    centred = scores - mean(scores)
    return centred / (jnp.sqrt(mean(jnp.square(centred))) + 1e-8)


def log_normal(x: Array, mean: Array, scale: Array) -> Array:
    """Log density f32[n] of rows x f32[n, G] under N(mean f32[G], scale²), but for a constant."""
    z = (x - mean[None]) / scale
    return (-0.5 * jnp.square(z)).sum(-1) - x.shape[-1] * jnp.log(scale)


def surrogate(ratio: Array, advantage: Array, clip: float) -> Array:
    """The clipped objective of PPO, negated to be minimised."""
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    return -jnp.minimum(ratio * advantage, clipped * advantage).mean()


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
    """The published agent: up to five steps an episode, keep <- clip(keep (1 - a), lowest, 1).

    Actor mean tanh(W2 relu(W1 z)), fixed standard deviation, a critic of its own, -100 for an
    episode that never meets the target. The defects of the released code are mended (embeddings of
    every state and not of the first, features that are structure and not fresh noise, no dropout
    while acting, an unbounded critic); what the strategy's caller projects is the final keep.

    Args:
      share: `(counts f32[G]) -> f32[]`, of the dense cost.
      target: that the share must fall to.
      batch: episodes an update (100 environment steps).
    """
    num_groups = len(graph.sizes)
    optimizer = optax.adam(learning_rate)

    def init(key: Key) -> PublishedState:
        actor, critic, head, read = jax.random.split(key, 4)
        draw = lambda k, a, b: jax.random.normal(k, (a, b)) / a**0.5
        weights = {
            "actor": init_policy(actor),
            "critic": init_policy(critic),
            "w1": draw(head, _HIDDEN, 200),
            "w2": draw(read, 200, 1) * 0.1,
            "value": jnp.zeros((_HIDDEN, 1)),
        }
        zero = jnp.zeros((batch, steps, num_groups))
        live = jnp.zeros((batch, steps))
        return PublishedState(
            weights, optimizer.init(weights), zero, zero, live, jnp.zeros(batch, bool)
        )

    def mean(weights: PyTree, counts: Array) -> Array:
        z = embed_graph(weights["actor"], graph, counts)
        return jnp.tanh(jax.nn.relu(z @ weights["w1"]) @ weights["w2"])[:, 0]

    def value(weights: PyTree, counts: Array) -> Array:
        return (embed_graph(weights["critic"], graph, counts).mean(0) @ weights["value"])[0]

    def episode(weights: PyTree, key: Key):
        def step(keep: Array, key: Key):
            counts = keep * graph.sizes
            live = share(counts) > target
            action = mean(weights, counts) + std * jax.random.normal(key, (num_groups,))
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
        points = 100 * (scores - 1)  # accuracy - 100, where scores are accuracies
        worst = jnp.minimum(-100.0, jnp.where(state.reached, points, 0).min())
        reward = jnp.where(state.reached, points, worst)  # never better than who met the target
        left = jnp.cumsum(state.live[:, ::-1], axis=1)[:, ::-1] - state.live  # steps still to come
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        before, taken, live = flat(state.before), flat(state.actions), state.live.reshape(-1)
        returns = standardised((reward[:, None] * discount**left).reshape(-1), live)

        def log_prob(weights: PyTree) -> Array:
            means = jax.vmap(lambda c: mean(weights, c))(before)
            return (-0.5 * jnp.square((taken - means) / std)).sum(-1)

        old = lax.stop_gradient(log_prob(state.weights))

        def loss(weights: PyTree) -> Array:
            values = jax.vmap(lambda c: value(weights, c))(before)
            advantage = lax.stop_gradient(returns - values)
            ratio = jnp.exp(log_prob(weights) - old)
            clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
            gain = jnp.minimum(ratio * advantage, clipped * advantage)
            each = -gain + 0.5 * jnp.square(values - returns)
            return (each * live).sum() / jnp.maximum(live.sum(), 1)

        def epoch(carry: Any, _: None):
            weights, opt_state = carry
            grads = jax.grad(loss)(weights)
            return apply_gradients(optimizer, grads, opt_state, weights), None

        start = (state.weights, state.opt_state)
        (weights, opt_state), _ = lax.scan(epoch, start, length=epochs)
        return state._replace(weights=weights, opt_state=opt_state)

    return Strategy(init, ask, tell, batch)
