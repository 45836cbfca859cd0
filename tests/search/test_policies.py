"""The laws of learned policies: what they read of a network, and how they learn from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxfm.search import (
    counts_of,
    cut,
    full,
    network,
    policy_graph,
    sliced,
)
from jaxfm.search.policy_graph import at_groups, chain, kept_channels, motif, spread

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
