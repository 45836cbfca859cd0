"""The laws of learned policies: what they read of a network, and how they learn from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfm.search import (
    agmc,
    agmc_published,
    counts_of,
    cut,
    full,
    gnn_rl,
    gnn_rl_published,
    load_policy,
    network,
    policy_graph,
    save_policy,
    sliced,
    transfer_policy,
)
from jaxfm.search.strategies.gnn_rl import embed_graph, standardised
from jaxfm.search.strategies.loop import run
from jaxfm.search.strategies.policy_graph import at_groups, chain, kept_channels, motif, spread
from jaxfm.search.strategies.strategy import separable

KEY = jax.random.key(0)
jitted_motif = jax.jit(motif)


def convolve(x, weight):
    return jax.lax.conv_general_dilated(
        x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def residual(params, x):
    """Three convolutions, the second one past a shortcut, and a classifier."""
    x = jax.nn.relu(convolve(x, params["stem"]))
    x = jax.nn.relu(x + convolve(jax.nn.relu(convolve(x, params["in"])), params["out"]))
    return x.mean((1, 2)) @ params["head"]


@functools.cache
def small():
    shapes = {"stem": (3, 3, 3, 4), "in": (3, 3, 4, 6), "out": (3, 3, 6, 4), "head": (4, 2)}
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    net = network(residual, params, np.zeros((1, 5, 5, 3), np.float32))
    return net, params


def star(features, c):
    """Kipf and Welling's layer on s -> u_1..u_c -> v_1..v_c -> t, node by node."""
    s, u, v, t = features
    nodes = np.stack([s, *[u] * c, *[v] * c, t])
    edges = np.eye(2 * c + 2)  # [target, source]
    for i in range(c):
        edges[1 + i, 0] = edges[1 + c + i, 1 + i] = edges[-1, 1 + c + i] = 1
    degree = edges.sum(1)
    return np.tanh(edges / np.sqrt(np.outer(degree, degree)) @ nodes).mean(0)


@given(st.integers(1, 40), st.integers(0, 1000))
def test_a_motif_of_four_nodes_is_the_whole_star(c, seed):
    features = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
    found = jitted_motif(*features, np.float32(c))
    np.testing.assert_allclose(found, star(features.astype(np.float64), c), atol=1e-6)


def test_spreading_is_the_normalised_adjacency():
    graph = chain(6, shortcuts=True)
    h = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    dense = np.eye(6)
    for source, target in np.asarray(graph.flow):
        dense[source, target] = dense[target, source] = 1
    degree = dense.sum(1)
    expected = dense / np.sqrt(np.outer(degree, degree)) @ h
    np.testing.assert_allclose(spread(graph, jnp.asarray(h)), expected, atol=1e-6)


def test_a_group_sees_the_means_of_those_that_read_it_and_of_those_that_make_it():
    graph, (net, _) = policy_graph(*small()), small()
    h = jnp.eye(4)  # one-hot: rows of what comes out are the shares of each contraction
    read, made = np.split(np.asarray(at_groups(graph, h)), 2, axis=1)
    by_size = {group.size: g for g, group in enumerate(net.groups)}
    np.testing.assert_allclose(read[by_size[6]], [0, 0, 1, 0])
    np.testing.assert_allclose(made[by_size[6]], [0, 1, 0, 0])
    np.testing.assert_allclose(read[by_size[4]], [0, 0.5, 0, 0.5])  # inner convolution and head
    np.testing.assert_allclose(made[by_size[4]], [0.5, 0, 0.5, 0])  # the stem and the sum


def test_the_flow_of_a_residual_block():
    graph = policy_graph(*small())
    late = {tuple(e): int(s) for e, s in zip(graph.flow.tolist(), graph.shortcut, strict=True)}
    assert late == {(0, 1): 0, (1, 2): 0, (0, 3): 1, (2, 3): 0}


def test_channels_at_any_counts_are_those_of_the_slice():
    net, params = small()
    graph = policy_graph(net, params)
    np.testing.assert_array_equal(graph.channels, [3, 4, 6, 4])
    kept = tuple(np.arange(mask.shape[-1]) < 2 for mask in full(net))
    counts = counts_of(net, kept)
    again = policy_graph(
        network(sliced(net, kept), cut(net, params, kept), *net.example), cut(net, params, kept)
    )
    found = kept_channels(graph, jnp.asarray(counts, jnp.float32))
    np.testing.assert_allclose(found, again.channels, rtol=1e-6)
    np.testing.assert_array_equal(again.sizes, counts)


def test_the_first_policy_is_uniform_pruning():
    made, there = gnn_rl(chain(5), std=1e-6, std_range=(1e-6, 1.0)), separable(4)
    actions, _ = jax.jit(made.ask)(jax.jit(made.init)(KEY), KEY)
    np.testing.assert_allclose(actions, np.zeros((16, 4)), atol=1e-4)
    counts = jax.jit(there.project)(actions[0])  # but for the order in which rests are given out
    assert np.ptp(counts) <= 1


@pytest.mark.parametrize("clip", [1e-4, 100.0])
def test_the_ratio_is_one_before_an_update(clip):
    """So the first step is that of the plain policy gradient, whatever the clipping: of the bias
    of group g, the advantage times the standardised action, but for a common shift."""
    rate = 0.01
    made = gnn_rl(chain(5), epochs=1, clip=clip, learning_rate=rate)
    rng = np.random.default_rng(0)
    actions, scores = rng.normal(size=(16, 4)), rng.normal(size=16)
    before = jax.jit(made.init)(KEY)
    # A policy that is not the first one: its means differ.
    before = before._replace(bias=jnp.array([0.5, -0.2, 0.3, -0.6]))
    after = jax.jit(made.tell)(
        before, actions.astype(np.float32), np.zeros((16, 4), np.int32), scores.astype(np.float32)
    )
    gradient = (scores - scores.mean()) @ (actions - np.asarray(before.bias))
    expected = rate * np.sign(gradient - gradient.mean())  # Adam's first step
    np.testing.assert_allclose(after.bias - before.bias, expected, rtol=1e-3)


def by_share(num_groups):
    """Groups that hold more of the cost should keep more: what a policy can read off a graph."""
    return separable(num_groups, target=np.linspace(0.15, 0.85, num_groups))


def test_a_policy_serves_a_network_of_another_size():
    """What it learned on a chain of 7 is worth more than uniform pruning on a chain of 12, before
    anything is evaluated there."""
    learned = transfer_policy(run(by_share(6), gnn_rl(chain(7)), 480, KEY).state.strategy)
    graph, there = chain(12), by_share(11)
    start = gnn_rl(graph, policy=learned).init(KEY)
    jax.tree.map(
        np.testing.assert_array_equal,
        transfer_policy(start) | {"log_std": 0},
        learned | {"log_std": 0},
    )

    @jax.jit
    def score(logits):
        return there.evaluate(there.data, there.project(logits)[None])[0]

    mean = (embed_graph(start.policy, graph, graph.sizes) @ start.policy["head"])[:, 0]
    assert score(mean) > 0.25 * score(jnp.zeros(11))


def test_a_policy_is_written_and_read_again(tmp_path):
    policy = transfer_policy(gnn_rl(chain(5)).init(KEY))
    save_policy(tmp_path / "policy.safetensors", policy)
    again = load_policy(tmp_path / "policy.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again, policy)
    save_policy(tmp_path / "other.safetensors", policy | {"head": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="does not hold a policy"):
        load_policy(tmp_path / "other.safetensors")


def test_gradients_reach_encoder_decoder_and_policy():
    """No weight of the actor stays where it was (in the released code all but the policy's did)."""
    made = agmc(chain(5), batch=16, warm_up=16, updates=8)
    before = jax.jit(made.init)(KEY)
    counts = jax.random.randint(KEY, (16, 4), 1, 33)
    scores = -jnp.square(counts.astype(jnp.float32) / 32 - 0.3).mean(1)
    after = jax.jit(made.tell)(before, jnp.zeros((16, 4)), counts, scores)
    for name, old in before.actor.items():
        assert jnp.abs(after.actor[name] - old).max() > 1e-5, name


@pytest.mark.parametrize("make", [agmc, pytest.param(agmc_published, marks=pytest.mark.slow)])
def test_what_is_sampled_from_the_memory_depends_on_the_key_of_the_search(make):
    made = make(chain(5), batch=16, warm_up=16, updates=2, sample=4)
    before, other = (jax.jit(made.init)(jax.random.key(k)) for k in (0, 1))
    assert before.seed != other.seed
    counts = jax.random.randint(KEY, (16, 4), 1, 33)
    scores = -jnp.square(counts.astype(jnp.float32) / 32 - 0.3).mean(1)
    learned = lambda seed: jax.jit(made.tell)(
        before._replace(seed=seed), jnp.zeros((16, 4)), counts, scores
    )
    once, again, elsewhere = map(learned, (before.seed, before.seed, other.seed))
    jax.tree.map(np.testing.assert_array_equal, once.actor, again.actor)
    assert any(jnp.any(once.actor[name] != elsewhere.actor[name]) for name in once.actor)


def test_returns_are_standardised_over_what_counts():
    rng = np.random.default_rng(0)
    values, live = rng.normal(3, 2, 12).astype(np.float32), np.arange(12) % 3 > 0
    found = standardised(values, live)
    np.testing.assert_allclose(found[live].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(found[live].std(), 1, rtol=1e-5)
    np.testing.assert_allclose(standardised(np.where(live, values, 99), live)[live], found[live])
    np.testing.assert_allclose(standardised(values, np.ones(12)), standardised(values), atol=1e-6)


def test_steps_after_the_end_of_an_episode_teach_nothing():
    """Two more dead steps and the published agent learns the same."""
    live = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]], np.float32)
    rng = np.random.default_rng(0)
    before, actions = 32 * rng.uniform(0.2, 1, (4, 3, 4)), rng.normal(size=(4, 3, 4))
    scores = jnp.array([0.9, 0.2, 0.5, 0.4])

    def change(more: int) -> np.ndarray:
        made = gnn_rl_published(chain(5), jnp.mean, 0.5, batch=4, steps=3 + more, epochs=1)
        pad = lambda x: jnp.asarray(np.concatenate([x, x[:, :1].repeat(more, 1)], 1), jnp.float32)
        start = jax.jit(made.init)(KEY)
        alive = pad(live).at[:, 3:].set(0)
        told = start._replace(
            before=pad(before), actions=pad(actions), live=alive, reached=jnp.ones(4, bool)
        )
        after = jax.jit(made.tell)(told, jnp.zeros((4, 4)), jnp.ones((4, 4), jnp.int32), scores)
        moved = jax.tree.map(lambda a, b: a - b, after.weights, start.weights)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(moved)])

    once, longer = change(0), change(2)
    assert np.linalg.norm(once - longer) < 0.02 * np.linalg.norm(once)


def test_a_policy_refuses_what_it_cannot_learn_from():
    with pytest.raises(ValueError, match="batch=3"):
        gnn_rl(chain(3), batch=3)
    with pytest.raises(ValueError, match="memory=8"):
        agmc(chain(3), memory=8, sample=32)
