"""The networks of AGMC: a graph encoder, a recurrent decoder with a policy, and a critic."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.model import Array, Key, PyTree
from jaxfm.search.strategies.policy_graph import GROUP_FEATURES, OP_FEATURES, PolicyGraph, spread

_HIDDEN, _STATE, _WIDE = 50, 30, 300  # the paper's widths


def _dense(key: Key, a: int, b: int) -> Array:
    return jax.random.normal(key, (a, b)) / a**0.5


def init_actor(key: Key, num_groups: int) -> PyTree:
    """Returns parameters of encoder, decoder and policy; "own" is one logit per group."""
    shapes: dict[str, tuple[int, int]] = {
        "gcn1": (OP_FEATURES, _HIDDEN), "gcn2": (_HIDDEN, _STATE), "pool": (_STATE, _STATE),
        "gates": (_STATE + GROUP_FEATURES, 4 * _STATE), "next": (_STATE + 1, _STATE),
        "mu1": (_STATE, _WIDE), "mu2": (_WIDE, _WIDE),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    weights = {name: _dense(k, *s) for k, (name, s) in zip(keys, shapes.items(), strict=True)}
    return weights | {"mu3": jnp.zeros((_WIDE, 1)), "own": jnp.zeros(num_groups)}


def init_critic(key: Key, num_groups: int) -> PyTree:
    """Returns parameters of the critic; "own" is a parabola per group."""
    keys = jax.random.split(key, 3)
    return {
        "state": _dense(keys[0], _STATE, _WIDE),
        "action": _dense(keys[1], 1, _WIDE),
        "hidden": _dense(keys[2], _WIDE, _WIDE),
        "out": jnp.zeros((_WIDE, 1)),
        "own": jnp.zeros((num_groups, 2)),
    }


def _encode(actor: PyTree, graph: PolicyGraph) -> Array:
    h = jax.nn.relu(spread(graph, graph.ops @ actor["gcn1"]))
    h = jax.nn.relu(spread(graph, h @ actor["gcn2"]))
    return jax.nn.relu(h.mean(0) @ actor["pool"])


def _transition(actor: PyTree, carry: Any, features: Array):
    """Runs one LSTM cell on (s_t, features of group t); the policy reads the hidden state."""
    state, hidden, cell = carry
    gates = jnp.concatenate([state, features]) @ actor["gates"]
    forget, enter, out, new = jnp.split(gates, 4)
    cell = jax.nn.sigmoid(forget + 1) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
    return cell, jax.nn.sigmoid(out) * jnp.tanh(cell) + hidden


def _decode(actor: PyTree, graph: PolicyGraph, choose: Any) -> tuple[Array, Array]:
    """Returns states f32[G, S] and actions f32[G], where `choose(t, s_t) -> a_t`."""

    def step(carry: Any, x: Any):
        t, features = x
        cell, read = _transition(actor, carry, features)
        action = choose(t, read)
        after = jax.nn.relu(jnp.append(read, action) @ actor["next"])
        return (after, 0.5 * read, cell), (read, action)

    start = (_encode(actor, graph), jnp.zeros(_STATE), jnp.zeros(_STATE))
    steps = (jnp.arange(len(graph.sizes)), graph.groups)
    return lax.scan(step, start, steps)[1]


def states_of(actor: PyTree, graph: PolicyGraph, actions: Array) -> Array:
    """Returns the states f32[G, S] that actions f32[G] lead through."""
    return _decode(actor, graph, lambda t, state: actions[t])[0]


def act(actor: PyTree, graph: PolicyGraph, key: Key, sd: Array) -> Array:
    """Returns actions f32[G] in (0, 1): those of the actor with truncated normal noise."""
    noise = jax.random.uniform(key, (len(graph.sizes),), minval=1e-4, maxval=1 - 1e-4)

    def choose(t: Array, state: Array) -> Array:
        mean = policy(actor, state, actor["own"][t])
        low, high = (jax.scipy.stats.norm.cdf((edge - mean) / sd) for edge in (0.02, 0.98))
        inverse = jax.scipy.stats.norm.ppf(jnp.clip(low + noise[t] * (high - low), 1e-6, 1 - 1e-6))
        return jnp.clip(mean + sd * inverse, 0.02, 0.98)

    return _decode(actor, graph, choose)[1]


def policy(actor: PyTree, states: Array, own: Array) -> Array:
    """Returns kept ratios f32[...] from states f32[..., S] and the logits `own` of each group."""
    h = jax.nn.relu(states @ actor["mu1"])
    return jax.nn.sigmoid((jax.nn.relu(h @ actor["mu2"]) @ actor["mu3"])[..., 0] + own)


def value(critic: PyTree, states: Array, actions: Array) -> Array:
    """Returns Q_t(s_t, a_t), f32[n, G], from states f32[n, G, S] and actions f32[n, G].

    It is the sum of a network that all groups share and of a parabola for each group.
    """
    a = 2 * actions[..., None] - 1
    h = jax.nn.relu(states @ critic["state"] + a @ critic["action"])
    own = (jnp.concatenate([a, a * a], axis=-1) * critic["own"][None]).sum(-1)
    return own + (jax.nn.relu(h @ critic["hidden"]) @ critic["out"])[..., 0]
