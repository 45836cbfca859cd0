"""AGMC: a graph encoder-decoder makes the states of a DDPG agent, one step a group.

    g = relu(U mean_i h_i),  h = GCN(graph)                  encoder
    s_0 = g,  s_{t+1} = relu(V [LSTM(s_t); a_t])             decoder: the environment's transition
    a_t = sigmoid(μ(s_t) + b_t),   Σ_t Q_t(s_t, a_t) = r     actor, and what the critic learns

States are functions of the actions and of the encoder-decoder, so the replay keeps actions and
rewards, states are made again at every update, and gradients reach encoder and decoder (in the
released code they never did). The decoder also reads what a group is; the published one knew only
its number.

The paper writes the final reward to every transition: each Q_t then takes what all other groups did
for noise, and at a few hundred episodes nothing is learned. Here the values of an episode add up to
its reward (as in Sunehag et al. 2018, arXiv 1706.05296, over agents); every step has its own share,
so nothing bootstraps and there are no target networks. Both networks have a few terms a group.
`agmc_published` keeps the published form,  Q_t -> r - b + γ Q'_{t+1}(s_{t+1}, μ'(s_{t+1})).

Source: Yu et al. 2021, AGMC (arXiv 2011.12641), section 3; Lillicrap et al. 2016 (DDPG).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxfm.model import Array, Key, PyTree
from jaxfm.optimizer import apply_gradients
from jaxfm.search.strategies.policy_graph import GROUP_FEATURES, OP_FEATURES, PolicyGraph, spread
from jaxfm.search.strategies.strategy import Strategy, to_logits

_HIDDEN, _STATE, _WIDE = 50, 30, 300  # the paper's widths


class AgmcState(NamedTuple):
    """The agent and what it remembers."""

    actor: PyTree  # encoder, decoder and policy
    critic: PyTree
    targets: PyTree  # (actor, critic), slowly following, in the published form
    opt_states: PyTree
    memory_actions: Array  # f32[R, G], kept ratios as the projection made them
    memory_rewards: Array  # f32[R]
    stored: Array  # i32[], episodes so far
    baseline: Array  # f32[], moving mean of the rewards
    seed: Array  # u32[], of the samples that are drawn from the memory


def agmc(
    graph: PolicyGraph,
    *,
    batch: int = 16,
    warm_up: int = 48,
    memory: int = 256,
    updates: int = 24,
    sample: int = 32,
    noise: float = 0.3,
    decay: float = 0.97,
    learning_rates: tuple[float, float] = (1e-3, 3e-3),
) -> Strategy:
    """DDPG over the groups of a network.

    Args:
      graph: of `policy_graph`.
      batch: episodes an `ask`.
      warm_up: episodes of random logits first (25 of uniform ratios in the paper); the fewer there
        are in all, the fewer of these (`warm_up_of`).
      memory: episodes remembered.
      updates, sample: gradient steps a `tell`, and episodes in each.
      noise, decay: sd of the truncated normal around the actor, and its factor an episode (0.5 and
        0.95 in the paper).
      learning_rates: of actor and critic (1e-4 and 1e-3 in the paper, for 800 episodes); the terms
        of single groups have ten times as much.
    Raises:
      ValueError: a memory smaller than a sample.
    """
    return _ddpg(
        graph, batch, warm_up, memory, updates, sample, noise, decay, learning_rates, published=None
    )


def warm_up_of(evaluations: int) -> int:
    """How many of all episodes to begin with at random: a sixth, but 16 to learn from at least."""
    return max(16, evaluations // 6)


class Published(NamedTuple):
    """What the published form has and ours does not: γ, and how fast the targets follow."""

    discount: float
    mix: float


def agmc_published(
    graph: PolicyGraph,
    *,
    batch: int = 16,
    warm_up: int = 25,
    memory: int = 256,
    updates: int = 24,
    sample: int = 32,
    noise: float = 0.5,
    decay: float = 0.95,
    learning_rates: tuple[float, float] = (1e-4, 1e-3),
    discount: float = 1.0,
    mix: float = 0.01,
) -> Strategy:
    """AGMC with the paper's targets and constants: the final reward at every step, and γ = 1.

    Budgets are met by the projection, not by the paper's correction; states know what a group is.
    The arguments are those of `agmc`; `discount` is γ and `mix` the share of the new weights that
    the target networks take over after an update.
    """
    how = Published(discount, mix)
    return _ddpg(graph, batch, warm_up, memory, updates, sample, noise, decay, learning_rates, how)


def _ddpg(
    graph: PolicyGraph, batch: int, warm_up: int, memory: int, updates: int, sample: int,
    noise: float, decay: float, learning_rates: tuple[float, float], published: Published | None,
) -> Strategy:  # fmt: skip
    if memory < sample:
        raise ValueError(f"memory={memory} must hold a sample of {sample} episodes.")
    num_groups = len(graph.sizes)
    own_rate = 0.0 if published else 10.0  # the published networks have no terms of single groups
    own = lambda weights: {name: name == "own" for name in weights}
    optimizers = tuple(
        optax.multi_transform({True: optax.adam(own_rate * rate), False: optax.adam(rate)}, own)
        for rate in learning_rates
    )

    def init(key: Key) -> AgmcState:
        actor_key, critic_key = jax.random.split(key)
        sample_key = jax.random.fold_in(key, 2)
        actor, critic = _init_actor(actor_key, num_groups), _init_critic(critic_key, num_groups)
        opt_states = (optimizers[0].init(actor), optimizers[1].init(critic))
        return AgmcState(
            actor, critic, (actor, critic) if published else (), opt_states,
            jnp.zeros((memory, num_groups)), jnp.zeros(memory), jnp.int32(0), jnp.zeros(()),
            jax.random.bits(sample_key),
        )  # fmt: skip

    def ask(state: AgmcState, key: Key) -> tuple[Array, AgmcState]:
        warm_key, noise_key = jax.random.split(key)
        numbers = state.stored + jnp.arange(batch)
        shape = (batch, num_groups)
        random = (
            jax.random.uniform(warm_key, shape, minval=0.02, maxval=0.98)
            if published
            else jax.nn.sigmoid(jax.random.normal(warm_key, shape))
        )
        after = jnp.maximum(numbers - warm_up, 0).astype(jnp.float32)
        sds = noise * decay**after
        keys = jax.random.split(noise_key, batch)
        chosen = jax.vmap(lambda k, sd: act(state.actor, graph, k, sd))(keys, sds)
        ratios = jnp.where((numbers < warm_up)[:, None], random, chosen)
        return to_logits(ratios), state

    def tell(state: AgmcState, actions: Array, counts: Array, scores: Array) -> AgmcState:
        place = (state.stored + jnp.arange(batch)) % memory
        first = state.stored == 0
        baseline = jnp.where(first, scores.mean(), 0.5 * state.baseline + 0.5 * scores.mean())
        state = state._replace(
            memory_actions=state.memory_actions.at[place].set(
                counts.astype(jnp.float32) / graph.sizes[None]
            ),
            memory_rewards=state.memory_rewards.at[place].set(scores),
            stored=state.stored + batch,
            baseline=baseline,
        )
        size = jnp.minimum(state.stored, memory)
        held = (jnp.arange(memory) < size).astype(jnp.float32)
        centred = state.memory_rewards - baseline
        scale = jnp.sqrt((jnp.square(centred) * held).sum() / size.astype(jnp.float32)) + 1e-8
        rewards = centred / scale
        step = lambda s, i: (_update(s, rewards, size, i), None)
        learned, _ = lax.scan(step, state, jnp.arange(updates))
        ready = state.stored >= warm_up
        return jax.tree.map(lambda new, old: jnp.where(ready, new, old), learned, state)

    def _update(state: AgmcState, rewards: Array, size: Array, i: Array) -> AgmcState:
        key = jax.random.fold_in(jax.random.key(state.seed), state.stored * updates + i)
        rows = jax.random.randint(key, (sample,), 0, size)
        taken, reward = state.memory_actions[rows], rewards[rows]

        def critic_loss(critic: PyTree) -> Array:
            states = jax.vmap(lambda a: states_of(state.actor, graph, a))(taken)
            each = value(critic, states, taken)
            if published is None:
                return jnp.square(each.sum(1) - reward).mean()
            actor, slow_critic = state.targets
            slow = jax.vmap(lambda a: states_of(actor, graph, a))(taken)
            next_value = value(slow_critic, slow, policy(actor, slow, actor["own"][None]))[:, 1:]
            after = jnp.pad(next_value, ((0, 0), (0, 1)))
            target = lax.stop_gradient(reward[:, None] + published.discount * after)
            return jnp.square(each - target).mean()

        def actor_loss(actor: PyTree) -> Array:
            states = jax.vmap(lambda a: states_of(actor, graph, a))(taken)
            chosen = policy(actor, states, actor["own"][None])
            return -value(state.critic, states, chosen).sum(1).mean()

        grads = (jax.grad(actor_loss)(state.actor), jax.grad(critic_loss)(state.critic))
        weights, opt_states = [], []
        for rule, grad, opt_state, own in zip(
            optimizers, grads, state.opt_states, (state.actor, state.critic), strict=True
        ):
            own, opt_state = apply_gradients(rule, grad, opt_state, own)
            weights.append(own)
            opt_states.append(opt_state)
        targets = state.targets
        if published:
            follow = lambda slow, new: (1 - published.mix) * slow + published.mix * new
            targets = jax.tree.map(follow, targets, tuple(weights))
        return state._replace(
            actor=weights[0], critic=weights[1], targets=targets, opt_states=tuple(opt_states)
        )

    return Strategy(init, ask, tell, batch)


def _dense(key: Key, a: int, b: int) -> Array:
    return jax.random.normal(key, (a, b)) / a**0.5


def _init_actor(key: Key, num_groups: int) -> PyTree:
    shapes: dict[str, tuple[int, int]] = {
        "gcn1": (OP_FEATURES, _HIDDEN), "gcn2": (_HIDDEN, _STATE), "pool": (_STATE, _STATE),
        "gates": (_STATE + GROUP_FEATURES, 4 * _STATE), "next": (_STATE + 1, _STATE),
        "mu1": (_STATE, _WIDE), "mu2": (_WIDE, _WIDE),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    weights = {name: _dense(k, *s) for k, (name, s) in zip(keys, shapes.items(), strict=True)}
    return weights | {"mu3": jnp.zeros((_WIDE, 1)), "own": jnp.zeros(num_groups)}


def _init_critic(key: Key, num_groups: int) -> PyTree:
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
    """One LSTM cell on (s_t, what group t is): the hidden state is what the policy reads."""
    state, hidden, cell = carry
    gates = jnp.concatenate([state, features]) @ actor["gates"]
    forget, enter, out, new = jnp.split(gates, 4)
    cell = jax.nn.sigmoid(forget + 1) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
    return cell, jax.nn.sigmoid(out) * jnp.tanh(cell) + hidden


def _decode(actor: PyTree, graph: PolicyGraph, choose: Any) -> tuple[Array, Array]:
    """States f32[G, S] and actions f32[G], where `choose(t, s_t) -> a_t`."""

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
    """f32[G, S]: the states that actions f32[G] lead through."""
    return _decode(actor, graph, lambda t, state: actions[t])[0]


def act(actor: PyTree, graph: PolicyGraph, key: Key, sd: Array) -> Array:
    """f32[G] in (0, 1): the actor with truncated normal noise."""
    noise = jax.random.uniform(key, (len(graph.sizes),), minval=1e-4, maxval=1 - 1e-4)

    def choose(t: Array, state: Array) -> Array:
        mean = policy(actor, state, actor["own"][t])
        low, high = (jax.scipy.stats.norm.cdf((edge - mean) / sd) for edge in (0.02, 0.98))
        inverse = jax.scipy.stats.norm.ppf(jnp.clip(low + noise[t] * (high - low), 1e-6, 1 - 1e-6))
        return jnp.clip(mean + sd * inverse, 0.02, 0.98)

    return _decode(actor, graph, choose)[1]


def policy(actor: PyTree, states: Array, own: Array) -> Array:
    """Kept ratios f32[...] of states f32[..., S] and the groups' own logits `own`."""
    h = jax.nn.relu(states @ actor["mu1"])
    return jax.nn.sigmoid((jax.nn.relu(h @ actor["mu2"]) @ actor["mu3"])[..., 0] + own)


def value(critic: PyTree, states: Array, actions: Array) -> Array:
    """Q_t(s_t, a_t), f32[n, G] of states f32[n, G, S] and actions f32[n, G].

    A network that all groups share, and a parabola of each group's own.
    """
    a = 2 * actions[..., None] - 1
    h = jax.nn.relu(states @ critic["state"] + a @ critic["action"])
    own = (jnp.concatenate([a, a * a], axis=-1) * critic["own"][None]).sum(-1)
    return own + (jax.nn.relu(h @ critic["hidden"]) @ critic["out"])[..., 0]
