"""GNN-RL: a graph network reads the model, PPO learns how much of each group to keep.

Stage 1 embeds the motif of every contraction, e_k = tanh(B mean tanh(GCN(motif_k))); stage 2 is a
graph convolution over the data flow whose messages are conditioned by them,

    h_i' = tanh(Σ_{j ∈ N(i) ∪ i} (d_i d_j)^-1/2 (W (h_j * e_j) + b)),

and a head shared by all groups reads the mean of one Gaussian logit per group. PPO makes what
scored above the mean of its batch more likely: L = E[min(ρ A, clip(ρ, 1 ± ε) A)] + entropy.

Here every candidate is feasible by construction, so an episode is one step and nothing bootstraps:
no value network is needed, and the batch mean is the baseline. Since the mean of a group is a
function of its place in the graph, one policy serves any network: what `transfer_policy` returns is
the `policy` of the next search. One bias per group, which belongs to this network, gives the search
the freedom of a direct one.

Source: Yu et al. 2022, GNN-RL (arXiv 2102.03214), sections 3.1 to 3.3; Schulman et al. 2017 (PPO),
equation 7. `jaxfm.search.strategies.gnn_rl_published` keeps the published form.
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
from safetensors import SafetensorError
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
from jaxfm.search.strategies.strategy import Strategy

_EDGE, HIDDEN = 20, 50  # the paper's widths


def init_policy(key: Key) -> dict[str, Array]:
    """Returns parameters of the graph network, which fit any graph."""
    shapes = {
        "split": (OP_FEATURES, HIDDEN), "inner": (OP_FEATURES, HIDDEN),
        "outer": (OP_FEATURES, HIDDEN), "total": (OP_FEATURES, HIDDEN),
        "edge": (HIDDEN, _EDGE), "enter": (OP_FEATURES, _EDGE), "flow1": (_EDGE, _EDGE),
        "flow2": (_EDGE, HIDDEN), "read": (2 * HIDDEN + GROUP_FEATURES, HIDDEN),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    draw = lambda k, shape: jax.random.normal(k, shape) / shape[0] ** 0.5
    weights = {name: draw(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    # The first policy is uniform pruning: the head starts at zero.
    return weights | {"head": jnp.zeros((HIDDEN, 1)), "log_std": jnp.zeros(())}


def embed_graph(policy: PyTree, graph: PolicyGraph, counts: Array) -> Array:
    """Returns f32[G, D], each group as the graph network sees it when groups keep counts f32[G]."""
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
    """The policy and its optimizer."""

    policy: PyTree
    bias: Array  # f32[G], belongs to this network
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
    """Returns PPO on a graph policy, with one step per episode.

    Args:
      graph: what `policy_graph` returned.
      batch: candidates per update.
      policy: parameters to start from, which `transfer_policy` returned after a search on any
        network; None starts with random ones.
      learning_rate: Adam's, of biases and standard deviation; the graph network has a tenth of it.
      std: standard deviation of the logits at the start.
      epochs: full-batch gradient steps per update.
      clip: ε of PPO.
      entropy: weight of the entropy bonus.
      std_range: bounds of the learned standard deviation.
    Raises:
      ValueError: fewer than 4 candidates, which cannot be ranked.
    """
    if batch < 4:
        raise ValueError(f"batch={batch} is too small to compare candidates; give at least 4.")
    optimizer = _optimizer(learning_rate)
    num_groups = len(graph.sizes)

    def init(key: Key) -> GnnRlState:
        own = init_policy(key) if policy is None else jax.tree.map(jnp.asarray, policy)
        own = own | {"log_std": jnp.log(jnp.float32(std))}
        bias = jnp.zeros(num_groups)
        return GnnRlState(own, bias, optimizer.init((own, bias)), jnp.int32(0))

    def gaussian(policy: PyTree, bias: Array) -> tuple[Array, Array]:
        mean = (embed_graph(policy, graph, graph.sizes) @ policy["head"])[:, 0] + bias
        scale = jnp.exp(jnp.clip(policy["log_std"], *jnp.log(jnp.array(std_range))))
        return mean - mean.mean(), scale  # the budget sets the common level

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

        start = (state.policy, state.bias)
        (own, bias), opt_state = descend(loss, optimizer, start, state.opt_state, epochs)
        return GnnRlState(own, bias, opt_state, state.updates + 1)

    return Strategy(init, ask, tell, batch)


def _optimizer(learning_rate: float) -> optax.GradientTransformation:
    # At the biases' rate the tanh units saturate within a few updates; then all groups look alike,
    # only the biases learn, and nothing is left to transfer.
    rates = {True: optax.adam(learning_rate), False: optax.adam(learning_rate / 10)}
    fast = lambda weights: ({name: name == "log_std" for name in weights[0]}, True)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(rates, fast))


def descend(
    loss: Callable[[PyTree], Array], optimizer: optax.GradientTransformation, weights: PyTree,
    opt_state: PyTree, steps: int,
) -> tuple[PyTree, PyTree]:  # fmt: skip
    """Returns (weights, opt_state) after gradient steps on one loss."""

    def step(carry: Any, _: None):
        weights, opt_state = carry
        return apply_gradients(optimizer, jax.grad(loss)(weights), opt_state, weights), None

    return lax.scan(step, (weights, opt_state), length=steps)[0]


def transfer_policy(state: GnnRlState) -> PyTree:
    """Returns the part of what a search learned that fits any network: the graph policy."""
    return state.policy


def save_policy(path: str | os.PathLike, policy: PyTree) -> None:
    """Writes a policy that `transfer_policy` returned to a .safetensors file."""
    save_file({name: np.asarray(x) for name, x in policy.items()}, path)


def load_policy(path: str | os.PathLike) -> PyTree:
    """Returns the policy that `save_policy` wrote, for a search on any network.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file holds something else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"There is no policy at {path}; a search with --strategy=gnn_rl writes one."
        )
    try:
        policy = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}).") from None
    shapes = jax.eval_shape(init_policy, jax.random.key(0))
    if {k: v.shape for k, v in policy.items()} != {k: v.shape for k, v in shapes.items()}:
        raise ValueError(
            f"{path} does not hold a policy: its entries are {sorted(policy)}; give a file that "
            "`save_policy` wrote."
        )
    return policy


def standardised(scores: Array, counted: Array | None = None) -> Array:
    """Returns scores shifted and scaled to mean 0 and deviation 1, as taken over those `counted`.

    Where all scores are equal the result is 0.
    """
    weight = jnp.ones_like(scores) if counted is None else counted.astype(scores.dtype)
    mean = lambda x: (x * weight).sum() / jnp.maximum(weight.sum(), 1)
    centred = scores - mean(scores)
    return centred / (jnp.sqrt(mean(jnp.square(centred))) + 1e-8)


def log_normal(x: Array, mean: Array, scale: Array) -> Array:
    """Returns log densities f32[n] of rows f32[n, G] under N(mean, scale²), up to a constant."""
    z = (x - mean[None]) / scale
    return (-0.5 * jnp.square(z)).sum(-1) - x.shape[-1] * jnp.log(scale)


def surrogate(ratio: Array, advantage: Array, clip: float) -> Array:
    """Returns the clipped objective of PPO, negated to be minimised."""
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    return -jnp.minimum(ratio * advantage, clipped * advantage).mean()
