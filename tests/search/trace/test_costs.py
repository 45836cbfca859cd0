"""The laws of cost: what is predicted for kept units is what their slice costs, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from random_networks import (
    BLOCKS,
    EVERY_BLOCK,
    Case,
    Shape,
    chains,
    convolutional,
    decoder,
    keep_some,
    seeds,
    shapes,
)

from jaxfm.cost import count_flops, num_bytes
from jaxfm.search import (
    budgets,
    costs,
    counts_of,
    cut,
    full,
    model_network,
    network,
    nominal_macs,
    sliced,
)
from jaxfm.search.trace.cost import AxisTable, contractions
from jaxfm.testing import random_variables, tiny_decoder, tiny_mobilenet, tiny_resnet

BATCH = 2


def costs_what_its_slice_does(case: Case, seed: int):
    net = network(case.function, case.params, case.x)
    own = costs(net)
    for kept in (full(net), keep_some(net, seed)):
        counts = counts_of(net, kept)
        small = jax.eval_shape(lambda p, kept=kept: cut(net, p, kept), case.params)
        run = sliced(net, kept)
        assert 2 * BATCH * own.macs(counts) == count_flops(run, small, case.x)
        assert own.parameters(counts) == sum(x.size for x in jax.tree.leaves(small))
        assert own.parameter_bytes(counts) == num_bytes(small)
        assert own.each(counts).sum() == pytest.approx(own.macs(counts), rel=1e-12)
    assert 2 * BATCH * own.macs(net.sizes.astype(np.int64)) == count_flops(
        case.function, case.params, case.x
    )


@settings(max_examples=12)
@given(chains, seeds)
@example(EVERY_BLOCK[0], 1)
@example(EVERY_BLOCK[1], 2)
@example(EVERY_BLOCK[2], 3)
def test_random_convolutional_networks(blocks, seed):
    costs_what_its_slice_does(convolutional(blocks, seed % 2 == 0, seed), seed)


@settings(max_examples=8)
@given(shapes, seeds)
def test_random_decoders(shape, seed):
    costs_what_its_slice_does(decoder(shape, seed), seed)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_slice_read_again_has_the_costs_that_were_predicted(block):
    case = convolutional((block, block), True, 1)
    net = network(case.function, case.params, case.x)
    kept = keep_some(net, 2)
    small = jax.eval_shape(lambda p: cut(net, p, kept), case.params)
    again = network(sliced(net, kept), small, case.x)
    predicted, found = costs(net), costs(again)
    counts, everything = counts_of(net, kept), again.sizes.astype(np.int64)
    for name in ("macs", "parameters", "parameter_bytes", "activation_bytes"):
        assert getattr(predicted, name)(counts) == getattr(found, name)(everything), name


MODELS = {
    "resnet": (tiny_resnet(), jax.ShapeDtypeStruct((BATCH, 8, 8, 3), jnp.float32)),
    "mobilenet": (tiny_mobilenet(), jax.ShapeDtypeStruct((BATCH, 8, 8, 3), jnp.float32)),
    "decoder": (tiny_decoder(), jax.ShapeDtypeStruct((BATCH, 5), jnp.int32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_our_models_cost_what_they_hold_and_run(name):
    model, x = MODELS[name]
    variables = random_variables(model)
    net = model_network(model, variables, x)
    own = costs(net)
    kept = keep_some(net, 1)
    small = jax.eval_shape(lambda v: cut(net, v, kept), variables)
    counts = counts_of(net, kept)
    assert 2 * BATCH * own.macs(counts) == count_flops(sliced(net, kept), small, x)
    assert own.parameters(counts) == sum(x.size for x in jax.tree.leaves(small.params))
    assert own.parameter_bytes(counts) == num_bytes(small)  # statistics too
    dense = count_flops(lambda v, x: model.apply(v, x)[0], variables, x)
    assert 2 * BATCH * own.macs(net.sizes.astype(np.int64)) == dense


@pytest.mark.smoke
def test_a_stacked_layer_costs_what_a_separate_one_does():
    shape = Shape(fused=False, remat=False)
    one, two = decoder(shape._replace(scanned=False), 0), decoder(shape, 0)
    counted = []
    for case in (one, two):
        net = network(case.function, case.params, case.x)
        counted.append(costs(net).macs(net.sizes.astype(np.int64)))
        head = 5 * 6 * 11  # tokens, width, words
    assert counted[1] - head == 2 * (counted[0] - head)


def test_expressions_are_the_same_for_jax_batched_and_differentiable():
    case = decoder(Shape(), 0)
    net = network(case.function, case.params, case.x)
    own = costs(net)
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(1, net.sizes + 1) for _ in range(3)]).astype(np.int64)

    @jax.jit
    def values(counts):
        return [jax.vmap(getattr(own, n))(counts) for n in own._fields[:-1]]

    for name, found in zip(own._fields[:-1], values(jnp.asarray(rows, jnp.float32))):
        expected = [getattr(own, name)(row) for row in rows]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Multiply-adds are a polynomial that is linear in each group of its own: the slope of one is
    # the difference of one unit.
    up = next(g for g, group in enumerate(net.groups) if group.size == 10)
    slope = jax.jit(jax.grad(own.macs))(jnp.asarray(rows[0], jnp.float32))
    one_more = rows[0] + np.eye(len(net.groups), dtype=np.int64)[up]
    assert slope[up] == pytest.approx(own.macs(one_more) - own.macs(rows[0]), rel=1e-6)


def test_activations_by_hand():
    params = {"up": np.ones((3, 16), np.float32), "down": np.ones((16, 2), np.float32)}
    net = network(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], params, np.ones((4, 3), "f4"))
    own = costs(net)
    # The most are alive while relu runs: its input and its output. Bytes an example.
    assert own.activation_bytes(np.array([16])) == 2 * 16 * 4
    assert own.activation_bytes(np.array([5])) == 2 * 5 * 4
    # With few hidden units the widest point is the product with the input alive.
    assert own.activation_bytes(np.array([1])) == (3 + 1) * 4


def perceptron(p, x):
    y = jax.nn.relu(x @ p["up"])
    y = jax.lax.cond(x.sum() > 0, lambda y: y @ p["fixed"], lambda y: -y @ p["fixed"], y)
    return jax.nn.relu(y @ p["mid"]) @ p["down"]


def test_the_compiler_counts_the_same_and_what_cannot_be_cut_counts_too():
    draw = np.random.default_rng(0).normal
    sizes = {"up": (24, 32), "fixed": (32, 32), "mid": (32, 40), "down": (40, 24)}
    params = {name: draw(size=size).astype(np.float32) for name, size in sizes.items()}
    x = draw(size=(BATCH, 24)).astype(np.float32)
    net = network(perceptron, params, x)
    (group,) = net.groups
    assert group.size == 40 and net.unknown == {"cond": 1}
    own, dense = costs(net), net.sizes.astype(np.int64)
    kept = (np.arange(40) % 2 == 0,)
    for masks in (full(net), kept):
        now = own.macs(counts_of(net, masks))
        small, run = cut(net, params, masks), sliced(net, masks)
        assert 2 * BATCH * now == count_flops(run, small, x)
        counted = jax.jit(run).lower(small, x).compile().cost_analysis()["flops"]
        assert 2 * BATCH * now <= counted < 1.1 * 2 * BATCH * now
    # A published counter sees the output of `mid` halved and not what `down` saves.
    nominal = nominal_macs(net)
    assert nominal(dense) == own.each(dense).sum()
    assert nominal(dense) - nominal(counts_of(net, kept)) == 32 * 20
    assert own.macs(dense) - own.macs(counts_of(net, kept)) == 32 * 20 + 20 * 24


def test_an_axis_of_heads_and_dimensions_has_a_size_that_is_their_product():
    case = decoder(Shape(2, 2, fused=True), 0)
    net = network(case.function, case.params, case.x)
    table = AxisTable(net.groups)
    leaf = next(leaf for leaf in net.leaves if leaf.path == "layers/qkv")
    terms = sorted((c, len(own)) for c, own in table.terms(leaf.axes[2]))
    # q: heads x queries x dims; k and v: heads x dims, each of dims of its own.
    assert terms == [(1.0, 2), (1.0, 2), (1.0, 3)]
    (size,) = table.products([(leaf.axes[2],)], [1.0])(net.sizes.astype(np.int64))
    assert size == leaf.shape[2]


def test_contractions_name_what_they_sum_over():
    case = decoder(Shape(fused=False, gated=False), 0)
    net = network(case.function, case.params, case.x)
    found = contractions(net.plan(0, case.x))
    assert [c.times for c in found] == [2] * 8 + [1]  # q k v, scores, values, o, up, down; the head
    counts = net.sizes.astype(np.int64)
    sizes = [c.times * np.prod([len(axis) for axis in c.axes]) for c in found]
    np.testing.assert_array_equal(BATCH * costs(net).each(counts), sizes)


def test_budgets_are_shares_or_absolute():
    case = convolutional(EVERY_BLOCK[0], False, 0)
    net = network(case.function, case.params, case.x)
    dense = net.sizes.astype(np.int64)
    macs, parameters = budgets(net, macs=0.5, parameters=200)
    assert macs.limit == 0.5 * costs(net).macs(dense) and parameters.limit == 200.0
    assert parameters.cost(dense) == sum(x.size for x in case.params.values())
    with pytest.raises(ValueError, match="no cost 'time'; choose from"):
        budgets(net, time=0.5)
    with pytest.raises(ValueError, match="macs=0 must be positive"):
        budgets(net, macs=0)
