"""Models as pure functions: modules brought in, layers in both forms, the laws of layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfm.layers import (
    GroupNorm,
    Norm,
    attend,
    causal_mask,
)
from jaxfm.model import (
    Past,
    from_nnx,
    is_axes,
    is_stacked,
    layer_at,
    layers_of,
    num_layers,
    unstack,
    with_layers,
)
from jaxfm.rotary import RopeScaling, rotary_frequencies, rotate
from jaxfm.testing import (
    random_variables,
    tiny_cnn,
    tiny_decoder,
    tiny_encoder,
    tiny_gpt2,
    tiny_vit,
)

KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 7)).astype(np.int32)
IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
FAMILIES = {
    "decoder": (tiny_decoder(), TOKENS),
    "gpt2": (tiny_gpt2(), TOKENS),
    "encoder": (tiny_encoder(), {"tokens": TOKENS}),
    "vit": (tiny_vit(), IMAGES),
}


class UsersModule(nnx.Module):
    """What a user may bring: a linear map, batch norm and dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


X = np.random.default_rng(2).normal(size=(64, 4)).astype(np.float32)


def test_a_users_module_keeps_its_statistics_apart():
    model = from_nnx(UsersModule)
    variables = model.init(KEY)
    assert set(variables.params) == {"linear", "norm"}
    assert set(variables.stats) == {"norm"}
    apply = jax.jit(model.apply, static_argnames="train")
    output, stats = apply(variables, X)
    chex.assert_trees_all_equal(stats, variables.stats)  # only measured in training
    np.testing.assert_allclose(
        output, X @ variables.params["linear"]["kernel"], rtol=1e-4, atol=1e-5
    )
    _, stats = apply(variables, X, train=True, key=KEY)
    mean = (X @ variables.params["linear"]["kernel"]).mean(0)
    np.testing.assert_allclose(stats["norm"]["mean"], 0.5 * mean, rtol=1e-4, atol=1e-6)
    _, again = apply(variables._replace(stats=stats), X, train=True, key=KEY)
    np.testing.assert_allclose(again["norm"]["mean"], 0.75 * mean, rtol=1e-4, atol=1e-6)


def test_random_numbers_come_from_the_key_alone():
    model = from_nnx(UsersModule)
    variables = model.init(KEY)
    train = jax.jit(lambda key: model.apply(variables, X, train=True, key=key)[0])
    first, again, other = train(KEY), train(KEY), train(jax.random.key(1))
    chex.assert_trees_all_equal(first, again)
    assert 0.3 < float((first == 0).mean()) < 0.7
    assert not np.array_equal(first == 0, other == 0)
    with pytest.raises(ValueError, match="draws random numbers in training; pass `key`"):
        model.apply(variables, X, train=True)


def test_unknown_kinds_of_variables_are_refused_by_name():
    class Counter(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(1, 1, rngs=rngs)
            self.calls = nnx.Cache(jnp.zeros(()))

    with pytest.raises(ValueError, match=r"'calls' is a Cache; a model may hold nnx\.Param"):
        from_nnx(Counter)


def test_missing_variables_are_named():
    model = from_nnx(lambda rngs: nnx.Linear(4, 2, rngs=rngs))
    variables = model.init(KEY)
    with pytest.raises(ValueError, match=r"lack 'params\.bias'"):
        model.apply(variables._replace(params={"kernel": variables.params["kernel"]}), X)


@pytest.mark.parametrize("make", [tiny_decoder, tiny_gpt2, tiny_encoder, tiny_vit, tiny_cnn])
def test_every_leaf_has_a_name_for_each_axis(make):
    model = make()
    shapes = jax.eval_shape(model.init, KEY)

    def check(names, leaf):
        assert is_axes(names)
        assert len(names) == len(leaf.shape)

    jax.tree.map(check, model.axes, shapes, is_leaf=is_axes)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_layers_compute_what_single_ones_do(family):
    model, inputs = FAMILIES[family]
    variables = random_variables(model)
    layers = layers_of(variables)
    apart = with_layers(variables, unstack(layers))
    assert is_stacked(layers)
    assert not is_stacked(layers_of(apart))
    assert num_layers(layers) == num_layers(layers_of(apart)) == 2
    chex.assert_trees_all_equal(layer_at(layers_of(apart), 1), jax.tree.map(lambda x: x[1], layers))
    apply = jax.jit(model.apply)
    # The same sums; the compiler may fuse them otherwise.
    np.testing.assert_allclose(
        apply(variables, inputs)[0], apply(apart, inputs)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("family", ["decoder", "gpt2"])
def test_no_gradient_flows_from_a_token_to_earlier_ones(family):
    model, tokens = FAMILIES[family]
    variables = random_variables(model)
    positions = jnp.arange(7, dtype=jnp.int32)[None]

    def logits(x):
        x = x[None]
        for i in range(2):
            layer = layer_at(unstack(layers_of(variables)), i)
            x, _ = model.stages.block(layer, x, positions, causal_mask(positions, positions))
        return model.stages.head(variables, x)[0].sum(-1)

    x = model.stages.embed(variables, tokens[:1], positions)[0]
    reach = np.abs(jax.jit(jax.jacobian(logits))(x)).max(-1)  # [output, input]
    assert np.all(reach[np.triu_indices(7, 1)] == 0)
    assert np.all(reach[np.tril_indices(7)] > 0)


def test_a_window_hides_what_is_further_back():
    positions = jnp.arange(6, dtype=jnp.int32)[None]
    seen = causal_mask(positions, positions, window=3)[0]
    expected = [[0 <= i - j < 3 for j in range(6)] for i in range(6)]
    np.testing.assert_array_equal(seen, expected)
    whole = causal_mask(positions, positions)[0]
    np.testing.assert_array_equal(whole, np.tril(np.ones((6, 6), bool)))


def test_a_long_window_is_no_window_and_a_short_one_is():
    variables = random_variables(tiny_decoder())
    run = lambda **changes: jax.jit(tiny_decoder(**changes).apply)(variables, TOKENS)[0]
    np.testing.assert_allclose(run(sliding_window=7), run(), rtol=1e-6, atol=1e-6)
    short = run(sliding_window=2)
    np.testing.assert_allclose(short[:, :2], run()[:, :2], rtol=1e-5, atol=1e-5)
    assert not np.allclose(short[:, 4:], run()[:, 4:], atol=1e-3)


def test_recomputing_layers_changes_no_gradient():
    variables = random_variables(tiny_decoder())
    gradient = lambda model: jax.jit(
        jax.grad(lambda p: model.apply(variables._replace(params=p), TOKENS)[0].sum())
    )(variables.params)
    plain, remat = gradient(tiny_decoder()), gradient(tiny_decoder(remat=True))
    chex.assert_trees_all_close(plain, remat, rtol=1e-4, atol=1e-5)


def test_attention_over_a_past_equals_attention_over_all_of_it():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, k, v = draw(2, 6, 2, 3, 4), draw(2, 6, 2, 4), draw(2, 6, 2, 4)
    positions = jnp.arange(6, dtype=jnp.int32)[None]
    mask = causal_mask(positions, positions)
    expected = attend(q, k, v, mask, scale=0.5)
    heads_first = lambda x: jnp.swapaxes(x[:, :4], 1, 2)
    past = Past(heads_first(k), heads_first(v), mask[:, 4:, :4])
    last = attend(q[:, 4:], k[:, 4:], v[:, 4:], mask[:, 4:, 4:], scale=0.5, past=past)
    np.testing.assert_allclose(last, expected[:, 4:], rtol=1e-5, atol=1e-6)


def test_rotary_scores_depend_on_distance_alone():
    frequencies, factor = rotary_frequencies(8, 10000.0)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 8)), jnp.float32) for _ in range(2))
    turn = lambda x, at: rotate(x, jnp.full((1, 1), at, jnp.int32), frequencies, factor)
    score = lambda i, j: float((turn(q, i) * turn(k, j)).sum())
    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-2)
    assert float(jnp.linalg.norm(turn(q, 77))) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-5)


def test_rope_scalings_stretch_slow_pairs_and_spare_fast_ones():
    plain, _ = rotary_frequencies(64, 10000.0)
    linear, _ = rotary_frequencies(64, 10000.0, RopeScaling(kind="linear", factor=4.0))
    np.testing.assert_allclose(linear, plain / 4)
    for kind in ("llama3", "yarn"):
        scaling = RopeScaling(kind=kind, factor=4.0, original_max_len=256)
        scaled, factor = rotary_frequencies(64, 10000.0, scaling)
        assert scaled[0] == plain[0]
        assert scaled[-1] == pytest.approx(plain[-1] / 4)
        assert np.all(np.diff(scaled) < 0)
        expected = 0.1 * np.log(4.0) + 1.0 if kind == "yarn" else 1.0
        assert factor == pytest.approx(expected)
    with pytest.raises(ValueError, match="Rope scaling 'dynamic' is unknown; known are linear"):
        rotary_frequencies(8, 1e4, RopeScaling(kind="dynamic", factor=2.0))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_leaves_unit_variance_and_counts_live_channels_only(kind):
    norm = Norm(("embed", 8), kind=kind, eps=0.0)
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (5, 8)), jnp.float32)
    y = norm(x)
    np.testing.assert_allclose(jnp.square(y).mean(-1), 1, rtol=1e-5)
    if kind == "layer":
        np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
    live = jnp.asarray([1, 1, 0, 1, 0, 1, 1, 0], jnp.float32)
    norm.live[...] = live
    masked = norm(x * live[None])
    small = Norm(("embed", 5), kind=kind, eps=0.0)(x[:, live == 1])
    np.testing.assert_allclose(masked[:, live == 1], small, rtol=1e-5, atol=1e-6)
    assert not masked[:, live == 0].any()


def test_a_group_norm_is_a_layer_norm_of_each_group():
    norm = GroupNorm(("conv", 6), num_groups=2)
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (2, 4, 4, 6)), jnp.float32)
    groups = norm(x).reshape(2, 16, 2, 3).transpose(0, 2, 1, 3).reshape(4, -1)
    np.testing.assert_allclose(groups.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(groups.var(-1), 1, rtol=1e-4)
    with pytest.raises(ValueError, match="6 channels do not divide into num_groups=4"):
        GroupNorm(("conv", 6), num_groups=4)
    with pytest.raises(ValueError, match="3 channels do not divide into 2 groups"):
        norm(x[..., :3])


@pytest.mark.smoke
def test_a_second_call_does_not_compile_again():
    model = tiny_decoder()
    variables = random_variables(model)
    apply = jax.jit(chex.assert_max_traces(model.apply, n=1))
    apply(variables, TOKENS)
    apply(variables, TOKENS + 1)
