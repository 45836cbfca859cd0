"""AGMC: a graph encoder-decoder makes the states of a DDPG agent, which takes one step per group.

    g = relu(U mean_i h_i),  h = GCN(graph)                  encoder
    s_0 = g,  s_{t+1} = relu(V [LSTM(s_t); a_t])             decoder: the environment's transition
    a_t = sigmoid(μ(s_t) + b_t),   Σ_t Q_t(s_t, a_t) = r     actor, and what the critic learns

States are functions of the actions and of the encoder-decoder. So the replay memory keeps actions
and rewards, states are computed again at every update, and gradients reach encoder and decoder (in
the released code they do not). The decoder also reads the features of a group; the published one
knew only its number.

The paper gives the final reward to every transition: each Q_t then sees the effect of all other
groups as noise, and at a few hundred episodes nothing is learned. Here the values of an episode add
up to its reward (as in Sunehag et al. 2018, arXiv 1706.05296, over agents); every step has its own
share, so nothing bootstraps and there are no target networks. Both networks have a few terms for
each group. `agmc_published` keeps the published form,

    Q_t -> r - b + γ Q'_{t+1}(s_{t+1}, μ'(s_{t+1})).

Source: Yu et al. 2021, AGMC (arXiv 2011.12641), section 3; Lillicrap et al. 2016 (DDPG).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxfm.model import Array, Key, PyTree
from jaxfm.optimizer import apply_gradients
from jaxfm.search.strategies.agmc_networks import (
    act,
    init_actor,
    init_critic,
    policy,
    states_of,
    value,
)
from jaxfm.search.strategies.policy_graph import PolicyGraph
from jaxfm.search.strategies.strategy import Strategy, to_logits


class AgmcState(NamedTuple):
    """The agent and its replay memory."""

    actor: PyTree  # encoder, decoder and policy
    critic: PyTree
    targets: PyTree  # (actor, critic), slowly following, in the published form; else ()
    opt_states: PyTree
    memory_actions: Array  # f32[R, G], kept ratios as the projection returned them
    memory_rewards: Array  # f32[R]
    stored: Array  # i32[], episodes so far
    baseline: Array  # f32[], moving mean of the rewards
    seed: Array  # u32[], of the samples that are drawn from the memory


class _Settings(NamedTuple):
    """The arguments of `agmc` by name."""

    batch: int
    warm_up: int
    memory: int
    updates: int
    sample: int
    noise: float
    decay: float
    learning_rates: tuple[float, float]


class _Form(NamedTuple):
    """What the published agent does differently.

    Attributes:
      explore: `(key, shape) -> ratios` of random episodes.
      own_rate: learning rate of the terms of single groups, times that of the others.
      init_targets: `(actor, critic) -> targets`.
      critic_error: `(values f32[n, G], state, graph, actions f32[n, G], rewards f32[n]) -> f32[]`.
      follow: `(targets, (actor, critic)) -> targets` after an update.
    """

    explore: Callable[[Key, tuple[int, ...]], Array]
    own_rate: float
    init_targets: Callable[[PyTree, PyTree], PyTree]
    critic_error: Callable[[Array, AgmcState, PolicyGraph, Array, Array], Array]
    follow: Callable[[PyTree, PyTree], PyTree]


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
    """Returns DDPG over the groups of a network.

    Args:
      graph: what `policy_graph` returned.
      batch: episodes per `ask`.
      warm_up: number of first episodes with random logits (in the paper 25 with uniform ratios);
        a short search should have fewer (`warm_up_of`).
      memory: number of episodes that are remembered.
      updates: gradient steps per `tell`.
      sample: number of episodes in each gradient step.
      noise: standard deviation of the truncated normal noise around the actor (0.5 in the paper).
      decay: factor of that noise after each episode (0.95 in the paper).
      learning_rates: those of actor and critic (in the paper 1e-4 and 1e-3, for 800 episodes);
        terms of single groups have ten times as much.
    Raises:
      ValueError: a memory smaller than a sample.
    """
    ours = _Form(
        explore=lambda key, shape: jax.nn.sigmoid(jax.random.normal(key, shape)),
        own_rate=10.0,
        init_targets=lambda actor, critic: (),
        critic_error=lambda each, state, graph, actions, rewards: jnp.square(
            each.sum(1) - rewards
        ).mean(),
        follow=lambda targets, weights: targets,
    )
    settings = _Settings(batch, warm_up, memory, updates, sample, noise, decay, learning_rates)
    return _ddpg(graph, settings, ours)


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
    """Returns AGMC with the paper's targets and constants: the final reward at every step, γ = 1.

    Budgets are met by the projection, not by the paper's correction, and states know the features
    of a group.

    Args:
      graph, batch, warm_up, memory, updates, sample, noise, decay, learning_rates: as in `agmc`.
      discount: γ.
      mix: share of the new weights that the target networks take over after an update.
    Raises:
      ValueError: a memory smaller than a sample.
    """
    published = _Form(
        explore=lambda key, shape: jax.random.uniform(key, shape, minval=0.02, maxval=0.98),
        own_rate=0.0,  # the published networks have no terms of single groups
        init_targets=lambda actor, critic: (actor, critic),
        critic_error=lambda *arguments: _bootstrapped(discount, *arguments),
        follow=lambda targets, weights: jax.tree.map(
            lambda slow, new: (1 - mix) * slow + mix * new, targets, weights
        ),
    )
    settings = _Settings(batch, warm_up, memory, updates, sample, noise, decay, learning_rates)
    return _ddpg(graph, settings, published)


def warm_up_of(evaluations: int) -> int:
    """Returns how many episodes should be random: a sixth of all, but at least 16."""
    return max(16, evaluations // 6)


def _bootstrapped(
    discount: float, each: Array, state: AgmcState, graph: PolicyGraph, actions: Array,
    rewards: Array,
) -> Array:  # fmt: skip
    """Returns the mean of (Q_t - r - γ Q'_{t+1})², with Q' of the target networks."""
    actor, critic = state.targets
    states = jax.vmap(lambda a: states_of(actor, graph, a))(actions)
    next_value = value(critic, states, policy(actor, states, actor["own"][None]))[:, 1:]
    after = jnp.pad(next_value, ((0, 0), (0, 1)))
    target = lax.stop_gradient(rewards[:, None] + discount * after)
    return jnp.square(each - target).mean()


def _ddpg(graph: PolicyGraph, settings: _Settings, form: _Form) -> Strategy:
    batch, memory, num_groups = settings.batch, settings.memory, len(graph.sizes)
    if memory < settings.sample:
        raise ValueError(
            f"memory={memory} must hold at least one sample of {settings.sample} episodes."
        )
    optimizers = tuple(_optimizer(rate, form.own_rate * rate) for rate in settings.learning_rates)
    update = _updater(graph, settings, form, optimizers)

    def init(key: Key) -> AgmcState:
        actor_key, critic_key = jax.random.split(key)
        sample_key = jax.random.fold_in(key, 2)
        actor, critic = init_actor(actor_key, num_groups), init_critic(critic_key, num_groups)
        return AgmcState(
            actor=actor,
            critic=critic,
            targets=form.init_targets(actor, critic),
            opt_states=(optimizers[0].init(actor), optimizers[1].init(critic)),
            memory_actions=jnp.zeros((memory, num_groups)),
            memory_rewards=jnp.zeros(memory),
            stored=jnp.int32(0),
            baseline=jnp.zeros(()),
            seed=jax.random.bits(sample_key),
        )

    def ask(state: AgmcState, key: Key) -> tuple[Array, AgmcState]:
        warm_key, noise_key = jax.random.split(key)
        numbers = state.stored + jnp.arange(batch)
        random = form.explore(warm_key, (batch, num_groups))
        after = jnp.maximum(numbers - settings.warm_up, 0).astype(jnp.float32)
        sds = settings.noise * settings.decay**after
        keys = jax.random.split(noise_key, batch)
        chosen = jax.vmap(lambda k, sd: act(state.actor, graph, k, sd))(keys, sds)
        ratios = jnp.where((numbers < settings.warm_up)[:, None], random, chosen)
        return to_logits(ratios), state

    def tell(state: AgmcState, actions: Array, counts: Array, scores: Array) -> AgmcState:
        ratios = counts.astype(jnp.float32) / graph.sizes[None]
        state = _remember(state, ratios, scores)
        size = jnp.minimum(state.stored, memory)
        held = (jnp.arange(memory) < size).astype(jnp.float32)
        centred = state.memory_rewards - state.baseline
        scale = jnp.sqrt((jnp.square(centred) * held).sum() / size.astype(jnp.float32)) + 1e-8
        rewards = centred / scale
        step = lambda s, i: (update(s, rewards, size, i), None)
        learned, _ = lax.scan(step, state, jnp.arange(settings.updates))
        ready = state.stored >= settings.warm_up
        return jax.tree.map(lambda new, old: jnp.where(ready, new, old), learned, state)

    return Strategy(init, ask, tell, batch)


def _optimizer(rate: float, own_rate: float) -> optax.GradientTransformation:
    """Returns Adam with a learning rate of its own for the terms of single groups."""
    own = lambda weights: {name: name == "own" for name in weights}
    return optax.multi_transform({True: optax.adam(own_rate), False: optax.adam(rate)}, own)


def _remember(state: AgmcState, ratios: Array, scores: Array) -> AgmcState:
    """Stores a batch of episodes in place of the oldest ones, and moves the baseline."""
    place = (state.stored + jnp.arange(len(scores))) % len(state.memory_rewards)
    first = state.stored == 0
    return state._replace(
        memory_actions=state.memory_actions.at[place].set(ratios),
        memory_rewards=state.memory_rewards.at[place].set(scores),
        stored=state.stored + len(scores),
        baseline=jnp.where(first, scores.mean(), 0.5 * state.baseline + 0.5 * scores.mean()),
    )


def _updater(graph: PolicyGraph, settings: _Settings, form: _Form, optimizers: tuple) -> Callable:
    """Returns `update(state, rewards f32[R], size i32[], i) -> state`, step i of a `tell`."""

    def update(state: AgmcState, rewards: Array, size: Array, i: Array) -> AgmcState:
        number = state.stored * settings.updates + i
        key = jax.random.fold_in(jax.random.key(state.seed), number)
        rows = jax.random.randint(key, (settings.sample,), 0, size)
        taken, reward = state.memory_actions[rows], rewards[rows]

        def critic_loss(critic: PyTree) -> Array:
            states = jax.vmap(lambda a: states_of(state.actor, graph, a))(taken)
            return form.critic_error(value(critic, states, taken), state, graph, taken, reward)

        def actor_loss(actor: PyTree) -> Array:
            states = jax.vmap(lambda a: states_of(actor, graph, a))(taken)
            chosen = policy(actor, states, actor["own"][None])
            return -value(state.critic, states, chosen).sum(1).mean()

        losses, weights = (actor_loss, critic_loss), (state.actor, state.critic)
        grads = [jax.grad(loss)(own) for loss, own in zip(losses, weights, strict=True)]
        steps = zip(optimizers, grads, state.opt_states, weights, strict=True)
        (actor, actor_opt), (critic, critic_opt) = (apply_gradients(*step) for step in steps)
        return state._replace(
            actor=actor,
            critic=critic,
            targets=form.follow(state.targets, (actor, critic)),
            opt_states=(actor_opt, critic_opt),
        )

    return update
