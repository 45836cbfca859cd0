"""The laws of the interpreter: one function read dense, masked and sliced."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import Phase, example, given, settings
from jax.ad_checkpoint import checkpoint_name
from jax.example_libraries import stax
from jax.extend.core import jaxprs_in_params
from random_networks import (
    EVERY_BLOCK,
    Case,
    Draw,
    Shape,
    chains,
    conv,
    convolutional,
    decoder,
    keep_some,
    normalised,
    seeds,
    shapes,
)

from jaxfm.search import cut, full, masked, network, place, sliced
from jaxfm.search.trace.interpret import record

PHASES = (Phase.explicit, Phase.generate)  # to shrink takes a compilation a try
# Without optimisation no rounding depends on what XLA fuses, so equal operations give equal bits;
# and it compiles in half the time.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def close(a, b, scale):
    chex.assert_trees_all_close(a, b, rtol=0, atol=1e-5 * max(np.abs(scale).max(), 1e-3))


def obeys_the_laws(case: Case, seed: int = 0):
    """Dense is the function bit for bit; candidates under vmap are their slices."""
    net = network(case.function, case.params, case.x)
    assert not net.unknown
    candidates = [keep_some(net, seed), keep_some(net, seed + 1)]
    run = masked(net)

    @compiled
    def everything(params, x):
        stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *candidates)
        return (
            case.function(params, x),
            run(params, None, x),
            jax.vmap(lambda kept: run(params, kept, x))(stacked),
            sliced(net, candidates[0])(cut(net, params, candidates[0]), x),
        )

    function, dense, both, small = everything(case.params, case.x)
    chex.assert_trees_all_equal(dense, function)
    close(both[0], small, function)
    assert not np.array_equal(both[0], both[1])
    return net


@settings(max_examples=4, phases=PHASES)
@given(chains, seeds)
@example(EVERY_BLOCK[0], 1)
@example(EVERY_BLOCK[1], 2)
@example(EVERY_BLOCK[2], 3)
def test_random_convolutional_networks(blocks, seed):
    obeys_the_laws(convolutional(blocks, seed % 2 == 0, seed), seed)


@settings(max_examples=3, phases=PHASES)
@given(shapes, seeds)
@example(Shape(), 1)
@example(Shape(2, 2, fused=False, gated=False, scanned=False, remat=False, tied=True), 2)
def test_random_decoders(shape, seed):
    obeys_the_laws(decoder(shape, seed), seed)


def mixer(seed: int) -> Case:
    """Two blocks that mix 4 tokens, then 6 channels; written for this test alone."""
    draw = Draw(seed)
    stem, head = draw(3, 6), draw(6, 3)
    blocks = [(draw(4, 7), draw(7, 4), draw(6, 8), draw(8, 6)) for _ in range(2)]

    def function(p, x):
        y = x @ p[stem]
        for up, down, wide, narrow in blocks:
            mixed = jax.nn.gelu(normalised(y, -1).swapaxes(1, 2) @ p[up]) @ p[down]
            y = y + mixed.swapaxes(1, 2)
            y = y + jax.nn.gelu(normalised(y, -1) @ p[wide]) @ p[narrow]
        return y.mean(1) @ p[head]

    return Case(function, draw.params, draw.rng.normal(size=(2, 4, 3)).astype(np.float32))


def unet(seed: int) -> Case:
    """Down twice, up twice by transposed and repeated pixels, with skips by concatenation."""
    draw = Draw(seed)
    first, second, bottom = draw(3, 3, 1, 4), draw(3, 3, 4, 6), draw(3, 3, 6, 8)
    up, joined, last, out = draw(2, 2, 8, 5), draw(3, 3, 11, 6), draw(3, 3, 10, 4), draw(1, 1, 4, 2)

    def function(p, x):
        high = jax.nn.relu(conv(x, p[first]))
        middle = jax.nn.relu(conv(high, p[second], 2))
        low = jax.nn.relu(conv(middle, p[bottom], 2))
        grown = jax.lax.conv_transpose(low, p[up], (2, 2), "SAME")
        middle = jax.nn.relu(conv(jnp.concatenate([middle, grown], -1), p[joined]))
        grown = jnp.repeat(jnp.repeat(middle, 2, axis=1), 2, axis=2)
        return conv(jax.nn.relu(conv(jnp.concatenate([high, grown], -1), p[last])), p[out])

    return Case(function, draw.params, draw.rng.normal(size=(2, 8, 8, 1)).astype(np.float32))


def test_a_mixer_nobody_has_seen():
    net = obeys_the_laws(mixer(0))
    # The stream, and of each block its token units and its channel units; tokens stay.
    assert sorted(g.size for g in net.groups) == [6, 7, 7, 8, 8]
    assert "w02:0" in net.frozen


def test_a_unet_nobody_has_seen():
    net = obeys_the_laws(unet(0))
    assert sorted(g.size for g in net.groups) == [4, 4, 5, 6, 6, 8]


class Vision(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=8, qkv_features=8, decode=False, rngs=rngs
        )
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        y = nnx.silu(self.norm(self.depthwise(self.conv(x))))
        y = y.reshape(y.shape[0], -1, y.shape[-1])
        return self.out((y + self.attention(y)).mean(1))


class Language(linen.Module):
    def attention(self, y):
        return linen.MultiHeadDotProductAttention(num_heads=2)(y, y)

    @linen.compact
    def __call__(self, tokens):
        y = linen.Embed(11, 8)(tokens)
        y = y + self.attention(linen.LayerNorm()(y))
        y = y + linen.Dense(8)(linen.gelu(linen.Dense(12)(linen.RMSNorm()(y))))
        return linen.Dense(3)(y)


def like(shapes):
    """Random arrays of these shapes; a module's own `init` would compile each draw."""
    rng = np.random.default_rng(0)
    draw = lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32)
    return jax.tree.map(draw, shapes)


def test_modules_of_flax_as_they_are():
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Vision(nnx.Rngs(0))))
    params = like(shapes)
    net = obeys_the_laws(Case(lambda p, x: nnx.merge(graph, p)(x), params, x))
    assert len(net.groups) > 2

    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    params = like(jax.eval_shape(Language().init, jax.random.key(0), tokens))
    net = obeys_the_laws(Case(Language().apply, params, tokens))
    assert {g.size for g in net.groups} >= {8, 12}


def test_a_model_of_another_library():
    init, apply = stax.serial(
        stax.Conv(6, (3, 3), padding="SAME"), stax.BatchNorm(), stax.Gelu,
        stax.FanOut(2), stax.parallel(stax.Identity, stax.Conv(6, (3, 3), padding="SAME")),
        stax.FanInSum, stax.MaxPool((2, 2), strides=(2, 2)), stax.Flatten, stax.Dense(8),
        stax.Softplus, stax.Dense(3), stax.LogSoftmax,
    )  # fmt: skip
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 2)).astype(np.float32)
    shapes = jax.eval_shape(lambda key: init(key, x.shape)[1], jax.random.key(0))

    def function(params, x):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return apply(params, x)

    net = obeys_the_laws(Case(function, like(shapes), x))
    assert sorted(g.size for g in net.groups) == [6, 8]


def shapes_by_other_names(p, x):
    """Units that pass primitives which move, copy or name them."""
    y = checkpoint_name(jax.nn.relu(x @ p["up"]), "hidden")
    gate, value = jnp.split(y, 2, axis=-1)
    first, second = jnp.unstack(jnp.stack([gate, value], axis=1), axis=1)
    y = jnp.tile(jax.device_put(first * second), (1, 2))
    kept = jax.random.bernoulli(jax.random.split(jax.random.key(3))[0], 0.7, y.shape)
    return jnp.where(kept, y, 0) @ p["down"]


def test_units_pass_names_stacks_tiles_copies_and_dropout():
    draw = np.random.default_rng(0).normal
    params = {"up": draw(size=(5, 12)).astype(np.float32), "down": draw(size=(12, 3))}
    params["down"] = params["down"].astype(np.float32)
    x = draw(size=(4, 5)).astype(np.float32)
    net = obeys_the_laws(Case(shapes_by_other_names, params, x))
    assert [g.size for g in net.groups] == [6] and not net.unknown


def convolutions(jaxpr):
    """(feature groups, batch groups) of every convolution, those of inner calls included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn.params["feature_group_count"], eqn.params["batch_group_count"]
        for inner in jaxprs_in_params(eqn.params):
            yield from convolutions(inner)


@pytest.mark.parametrize("blocks", EVERY_BLOCK)
def test_candidates_make_no_grouped_convolutions(blocks):
    case = convolutional(blocks, True, 0)
    net = network(case.function, case.params, case.x)
    masks = jax.tree.map(lambda m: jnp.stack([m] * 3), full(net))
    many = jax.jit(jax.vmap(masked(net), in_axes=(None, 0, None)))
    traced = many.trace(case.params, masks, case.x)
    found = list(convolutions(traced.jaxpr.jaxpr))
    own = list(convolutions(jax.make_jaxpr(case.function)(case.params, case.x).jaxpr))
    assert found == own and own
    text = traced.lower().as_text()
    assert text.count("stablehlo.convolution") == len(own)
    for groups in {g for g, _ in own}:
        assert text.count(f"feature_group_count = {groups} ") == sum(g == groups for g, _ in own)


CASES = {"convolutional": convolutional(EVERY_BLOCK[0], True, 4), "decoder": decoder(Shape(), 4)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_place_is_the_adjoint_of_cut(case):
    net = network(case.function, case.params, case.x)
    kept = keep_some(net, 5)

    @compiled
    def trips(params, other):
        taken, small = cut(net, params, kept), cut(net, other, kept)
        placed = place(net, small, kept)
        everything = place(net, cut(net, params, full(net)), full(net))
        return taken, small, placed, cut(net, placed, kept), everything

    other = jax.tree.map(lambda x: np.flip(x) + 1, case.params)
    taken, small, placed, again, everything = trips(case.params, other)
    chex.assert_trees_all_equal(again, small)
    chex.assert_trees_all_equal(everything, case.params)
    inner = lambda a, b: sum(jax.tree.leaves(jax.tree.map(lambda x, y: np.vdot(x, y), a, b)))
    assert inner(taken, small) == pytest.approx(inner(case.params, placed), rel=1e-4)
    cells = sum(np.count_nonzero(x) for x in jax.tree.leaves(placed))
    assert cells == sum(x.size for x in jax.tree.leaves(small))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_candidates_one_at_a_time_and_with_everything_kept(case):
    net = network(case.function, case.params, case.x)
    some, whole = keep_some(net, 7), full(net)

    @compiled
    def readings(params, masks, x):
        run = lambda kept: masked(net)(params, kept, x)
        many = jax.vmap(run)(jax.tree.map(lambda *rows: jnp.stack(rows), *masks))
        return case.function(params, x), many, run(masks[0]), sliced(net, whole)(params, x)

    function, many, one, small = readings(case.params, (some, whole), case.x)
    close(many[0], one, function)
    close(many[1], function, function)
    close(small, function, function)


def test_gradients_of_what_is_kept_are_those_of_the_slice():
    draw = Draw(6)
    params = {"up": draw(2, 5, 8), "down": draw(2, 8, 5), "head": draw(5, 3)}
    params = {name: draw.params[w] for name, w in params.items()}
    layer = lambda x, w: (x + jax.nn.relu(normalised(x, -1) @ w["up"]) @ w["down"], None)
    stack = lambda p, x: jax.lax.scan(layer, x, {k: p[k] for k in ("up", "down")})[0] @ p["head"]
    case = Case(stack, params, draw.rng.normal(size=(4, 5)).astype(np.float32))
    net = network(case.function, case.params, case.x)
    kept = keep_some(net, 6)
    loss = lambda run: lambda params: jnp.square(run(params)).sum()

    @compiled
    def gradients(params):
        dense = jax.grad(loss(lambda p: masked(net)(p, kept, case.x)))(params)
        small = jax.grad(loss(lambda p: sliced(net, kept)(p, case.x)))(cut(net, params, kept))
        return dense, place(net, small, kept)

    dense, placed = gradients(case.params)
    jax.tree.map(lambda a, b: close(a, b, b), dense, placed)


def test_a_mean_divides_by_what_is_left_and_nothing_else_changes():
    x = np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3)
    params = {"up": np.eye(3, 4, dtype=np.float32) + 1, "down": np.ones((1, 2), np.float32)}

    def function(p, x):
        return (x @ p["up"]).mean(-1, keepdims=True) @ p["down"] / 4  # 4 is no size of a sum here

    net = network(function, params, x)
    assert [g.name for g in net.groups] == ["up:1"]
    kept = (np.array([True, False, True, False]),)
    expected = np.repeat((x @ params["up"])[:, [0, 2]].mean(1, keepdims=True), 2, 1) / 4
    np.testing.assert_allclose(masked(net)(params, kept, x), expected, rtol=1e-6)
    np.testing.assert_allclose(sliced(net, kept)(cut(net, params, kept), x), expected, rtol=1e-6)


def test_other_shapes_of_inputs_and_structures_of_outputs():
    params = {"up": np.ones((3, 4), np.float32), "down": np.ones((4, 2), np.float32)}
    function = lambda p, x: {"out": (x["a"] @ p["up"]) @ p["down"], "x": x["a"]}
    net = network(function, params, {"a": np.ones((2, 3), np.float32)})
    kept = (np.arange(4) < 3,)
    for x in (np.ones((5, 3), np.float32), np.ones((2, 2, 3), np.float32)):
        out = sliced(net, kept)(cut(net, params, kept), {"a": x})
        np.testing.assert_array_equal(out["out"], np.full((*x.shape[:-1], 2), 9.0))
        chex.assert_trees_all_equal(masked(net)(params, kept, {"a": x}), out)


def test_every_layer_of_a_loop_is_recorded():
    case = CASES["decoder"]
    net = network(case.function, case.params, case.x)
    tap = lambda op, operands: jnp.float32(len(operands))
    seen = jax.eval_shape(lambda p, x: [v for _, v in record(net, p, tap, x)], case.params, case.x)
    assert {v.shape for v in seen} == {(), (2,)}  # outside of the loop, and in its two layers


def test_errors_say_what_does_not_fit():
    case = CASES["decoder"]
    net = network(case.function, case.params, case.x)
    kept = full(net)
    at = next(i for i, g in enumerate(net.groups) if g.layers)
    replaced = lambda mask: (*kept[:at], mask, *kept[at + 1 :])
    with pytest.raises(ValueError, match=f"{len(kept) - 1} masks for {len(kept)} groups"):
        sliced(net, kept[1:])
    with pytest.raises(ValueError, match=r"has shape \(3,\), expected \(2, "):
        sliced(net, replaced(np.ones(3, bool)))
    with pytest.raises(ValueError, match="keep at least one unit"):
        cut(net, case.params, replaced(np.zeros_like(kept[at])))
    uneven = kept[at].copy()
    uneven[0, 0] = False
    with pytest.raises(ValueError, match="give equal numbers"):
        cut(net, case.params, replaced(uneven))
    with pytest.raises(ValueError, match="expected"):
        masked(net)(jax.tree.map(lambda x: x[:1], case.params), None, case.x)
    with pytest.raises(ValueError, match="structure"):
        masked(net)({"w": case.x}, None, case.x)
