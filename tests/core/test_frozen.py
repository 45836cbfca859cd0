"""Frozen parameters: the same function, and no leaf of theirs in any gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxfm import hub
from jaxfm.distillation import distill
from jaxfm.frozen import freeze, freeze_variables, thaw
from jaxfm.model import (
    Frozen,
    Variables,
    from_nnx,
    is_axes,
    is_stacked,
    layer_at,
    layers_of,
    num_layers,
    unstack,
    with_layers,
)
from jaxfm.optimizer import apply_gradients, update
from jaxfm.subnet import Subnet, cover, embed, extract, mask
from jaxfm.tasks import classification
from jaxfm.testing import random_variables, tiny_cnn, tiny_decoder, tiny_encoder, tiny_vit

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 7)).astype(np.int32)
IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
MODELS = {
    "decoder": (tiny_decoder(), TOKENS),
    "encoder": (tiny_encoder(), {"tokens": TOKENS}),
    "vit": (tiny_vit(), IMAGES),
    "cnn": (tiny_cnn(), IMAGES[..., :1]),
}
CHOICES = {
    "kernels": lambda path: path[-1] == "kernel",
    "all layers": lambda path: path[0] in ("layers", "conv1"),
    "all": lambda path: True,
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", MODELS)
def test_a_frozen_model_computes_what_the_model_does(family, choice):
    model, inputs = MODELS[family]
    is_frozen = CHOICES[choice]
    variables = random_variables(model)
    held = freeze(model, is_frozen)
    split = freeze_variables(variables, is_frozen)
    np.testing.assert_array_equal(
        jax.jit(held.apply)(split, inputs)[0], jax.jit(model.apply)(variables, inputs)[0]
    )
    chex.assert_trees_all_equal(thaw(split), variables)
    assert thaw(held.axes) == model.axes
    shapes = jax.eval_shape(held.init, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, split)
    jax.tree.map(lambda names, leaf: chex.assert_rank(leaf, len(names)), held.axes, split,
                 is_leaf=is_axes)  # fmt: skip


@pytest.mark.parametrize("family", ["decoder", "cnn"])
def test_a_gradient_has_no_frozen_leaf(family):
    model, inputs = MODELS[family]
    is_frozen = CHOICES["kernels"]
    variables = random_variables(model)
    square = lambda model, v: (
        lambda p: jnp.square(model.apply(v._replace(params=p), inputs)[0]).mean()
    )
    split = freeze_variables(variables, is_frozen)
    grads = jax.jit(jax.grad(square(freeze(model, is_frozen), split)))(split.params)
    whole = jax.jit(jax.grad(square(model, variables)))(variables.params)
    expected = freeze_variables(Variables(whole, {}, {}), is_frozen).params
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_stages_take_frozen_layers():
    model, tokens = MODELS["decoder"]
    is_frozen = CHOICES["kernels"]
    held, split = freeze(model, is_frozen), freeze_variables(random_variables(model), is_frozen)
    positions = jnp.arange(7, dtype=jnp.int32)[None]
    mask = jnp.tril(jnp.ones((1, 7, 7), bool))

    def logits(variables):
        x = held.stages.embed(variables, tokens, positions)
        for i in range(2):
            layer = layer_at(unstack(layers_of(variables)), i)
            x, _ = held.stages.block(layer, x, positions, mask)
        return held.stages.head(variables, x)

    expected = jax.jit(held.apply)(split, tokens)[0]
    np.testing.assert_allclose(jax.jit(logits)(split), expected, rtol=1e-5, atol=1e-5)


def test_layers_are_counted_and_unstacked_where_all_are_frozen():
    model, tokens = MODELS["decoder"]
    split = freeze_variables(random_variables(model), CHOICES["all layers"])
    layers = layers_of(split)
    assert not layers.params
    assert is_stacked(layers)
    apart = unstack(layers)
    assert not is_stacked(apart)
    assert num_layers(layers) == num_layers(apart) == 2
    held = freeze(model, CHOICES["all layers"])
    np.testing.assert_allclose(
        jax.jit(held.apply)(with_layers(split, apart), tokens)[0],
        jax.jit(held.apply)(split, tokens)[0],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "mlp", [np.array([0, 3, 5]), [np.array([1, 2]), np.array([0, 4, 9])]], ids=["equal", "ragged"]
)
def test_a_subnet_is_cut_from_frozen_parameters_too(mlp):
    model, tokens = MODELS["decoder"]
    is_frozen, subnet = CHOICES["kernels"], Subnet({"mlp": mlp})
    variables = random_variables(model)
    held, split = freeze(model, is_frozen), freeze_variables(variables, is_frozen)
    small = extract(split, held.axes, subnet)
    chex.assert_trees_all_equal(thaw(small), extract(variables, model.axes, subnet))
    masked = mask(split, held.axes, subnet)
    chex.assert_trees_all_equal(embed(small, held.axes, subnet, split), masked)
    chex.assert_trees_all_equal(
        thaw(cover(held.axes, subnet, split)), cover(model.axes, subnet, variables)
    )
    np.testing.assert_allclose(
        jax.jit(held.apply)(small, tokens)[0], jax.jit(held.apply)(masked, tokens)[0],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_a_frozen_model_is_saved_whole(tmp_path):
    model, _ = MODELS["decoder"]
    variables = random_variables(model)
    held = freeze(model, CHOICES["kernels"])
    hub.save(held, freeze_variables(variables, CHOICES["kernels"]), tmp_path / "model")
    loaded, again = hub.load(tmp_path / "model")
    assert loaded.config == model.config
    chex.assert_trees_all_equal(again, variables)


def test_distillation_leaves_frozen_parameters_alone():
    model, images = MODELS["cnn"]
    held = freeze(model, CHOICES["all layers"])
    start = held.init(jax.random.key(0))
    teacher = lambda x: jnp.zeros((len(x), 5)).at[:, 0].set(3.0)
    after, _ = distill(
        held, start, teacher, classification(5), {"image": images, "label": np.zeros(2, np.int32)},
        steps=2, batch_size=2, optimizer=optax.adam(0.1), key=jax.random.key(1),
    )  # fmt: skip
    chex.assert_trees_all_equal(after.frozen, start.frozen)
    assert not np.array_equal(
        after.params["classifier"]["kernel"], start.params["classifier"]["kernel"]
    )


class Adapted(nnx.Module):
    """A fixed linear map and a trained one beside it."""

    def __init__(self, rngs: nnx.Rngs):
        self.base = Frozen(
            jax.random.normal(rngs.params(), (4, 3)),
            out_sharding=("in", "out"),
            eager_sharding=False,
        )
        self.side = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return x @ self.base[...] + self.side(x)


def test_a_modules_frozen_variables_have_a_place_of_their_own():
    model = from_nnx(Adapted)
    variables = model.init(jax.random.key(0))
    assert sorted(variables.params) == ["side"]
    assert sorted(variables.frozen) == ["base"]
    assert model.axes.frozen == {"base": ("in", "out")}
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    expected = x @ variables.frozen["base"] + x @ variables.params["side"]["kernel"]
    np.testing.assert_allclose(model.apply(variables, x)[0], expected, rtol=1e-5, atol=1e-6)
    kernel = lambda path: path[-1] == "kernel"
    held = freeze(freeze(model, kernel), lambda path: path[-1] == "bias")
    twice = held.init(jax.random.key(0))
    assert not twice.params
    np.testing.assert_allclose(held.apply(twice, x)[0], expected, rtol=1e-5, atol=1e-6)


def test_freezing_nothing_and_two_places_for_a_leaf_are_errors():
    model, _ = MODELS["cnn"]
    with pytest.raises(ValueError, match=r"No parameter is frozen.*'classifier', 'conv1'"):
        freeze(model, lambda path: path[0] == "conv9")
    twice = random_variables(model)._replace(frozen={"conv1": {"kernel": jnp.ones(())}})
    with pytest.raises(ValueError, match=r"Both parts have 'conv1\.kernel'"):
        thaw(twice)


def test_a_step_of_an_optimizer_works_under_strict_promotion():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    grads = {"w": jnp.full(3, 0.5, jnp.bfloat16)}
    optimizer = optax.adam(0.1)
    state = optimizer.init(params)
    updates, new_state = jax.jit(lambda *a: update(optimizer, *a))(grads, state, params)
    moved, same_state = jax.jit(lambda *a: apply_gradients(optimizer, *a))(grads, state, params)
    chex.assert_trees_all_equal(moved, optax.apply_updates(params, updates))
    chex.assert_trees_all_equal(new_state, same_state)
    assert moved["w"].dtype == jnp.bfloat16
