"""Modules that users bring, NNX and Linen, do in training and out of it what plain Flax does."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.nnx import bridge

from jaxfm import from_linen, from_nnx
from jaxfm.subnet import axis_sizes

KEY = jax.random.key(3)
X = np.random.default_rng(2).normal(1.0, 2.0, size=(64, 4)).astype(np.float32)
NAMES = {
    "train": True, "training": True, "is_training": True, "deterministic": False,
    "use_running_average": False,
}  # fmt: skip


class Linen(linen.Module):
    """Batch norm and dropout, switched by an argument."""

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(5)(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return linen.Dropout(0.5, deterministic=not train)(x)


def apply_of(model):
    return jax.jit(model.apply, static_argnames="train")


def test_a_linen_module_trains_as_in_flax():
    model = from_linen(Linen(), jax.ShapeDtypeStruct((1, 4), jnp.float32))
    variables, apply = model.init(KEY), apply_of(model)
    assert set(variables.params) == {"Dense_0", "BatchNorm_0"}
    collections = {"params": variables.params, "batch_stats": variables.stats}
    chex.assert_trees_all_equal_shapes_and_dtypes(
        collections, Linen().init(KEY, X[:1], train=False)
    )
    output, stats = apply(variables, X)
    np.testing.assert_allclose(output, Linen().apply(collections, X, train=False), atol=1e-6)
    chex.assert_trees_all_equal(stats, variables.stats)
    output, stats = apply(variables, X, train=True, key=KEY)
    rngs = {"dropout": jax.random.fold_in(KEY, 1)}
    expected, new = Linen().apply(collections, X, train=True, rngs=rngs, mutable=["batch_stats"])
    np.testing.assert_allclose(output, expected, atol=1e-5)
    assert 0.3 < float((output == 0).mean()) < 0.7
    mean = 0.5 * (X @ variables.params["Dense_0"]["kernel"]).mean(0)
    np.testing.assert_allclose(stats["BatchNorm_0"]["mean"], mean, atol=1e-5)
    chex.assert_trees_all_close(stats, new["batch_stats"], atol=1e-6)
    with pytest.raises(ValueError, match="draws random numbers in training; pass `key`"):
        model.apply(variables, X, train=True)


def test_a_linen_module_may_be_switched_by_a_field_and_name_its_axes():
    class Field(linen.Module):
        deterministic: bool = True

        @linen.compact
        def __call__(self, x):
            init = linen.with_partitioning(linen.initializers.ones, ("inputs", "hidden"))
            x = linen.Dense(3, use_bias=False, kernel_init=init)(x)
            return linen.Dropout(0.5, deterministic=self.deterministic)(x)

    model = from_linen(Field(), X[:1])
    variables = model.init(KEY)
    assert axis_sizes(variables, model.axes) == {"inputs": 4, "hidden": 3}
    sums = np.repeat(X.sum(1, keepdims=True), 3, axis=1)
    np.testing.assert_allclose(model.apply(variables, X)[0], sums, rtol=1e-4, atol=1e-5)
    output = np.asarray(model.apply(variables, X, train=True, key=KEY)[0])
    assert 0.3 < (output == 0).mean() < 0.7
    np.testing.assert_allclose(output[output != 0], 2 * sums[output != 0], rtol=1e-4, atol=1e-5)


def test_collections_that_a_model_cannot_hold_are_named():
    class Cached(linen.Module):
        @linen.compact
        def __call__(self, x):
            self.variable("cache", "calls", jnp.zeros, ())
            return x

    with pytest.raises(ValueError, match="variables in 'cache'; a model may have 'params'"):
        from_linen(Cached(), X)


@pytest.mark.parametrize("name", NAMES)
def test_nnx_modules_are_switched_by_the_argument_that_they_have(name):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def run(self, x, train):
            x = self.norm(x, use_running_average=not train)
            return self.dropout(x, deterministic=not train)

    def call(self, x, **told):
        return self.run(x, told.get(name, not NAMES[name]) == NAMES[name])

    source = f"lambda self, x, {name}={not NAMES[name]}: call(self, x, {name}={name})"
    Net.__call__ = eval(source, {"call": call})
    model = from_nnx(Net)
    variables = model.init(KEY)
    output, stats = model.apply(variables, X)
    np.testing.assert_allclose(output, X, rtol=1e-4)  # the mean 0 and variance 1 of the start
    chex.assert_trees_all_equal(stats, variables.stats)
    output, stats = model.apply(variables, X, train=True, key=KEY)
    np.testing.assert_allclose(stats["norm"]["mean"], 0.5 * X.mean(0), rtol=1e-4)
    assert 0.3 < float((output == 0).mean()) < 0.7


def test_a_linen_module_within_nnx_trains_as_in_flax():
    model = from_nnx(lambda rngs: bridge.ToNNX(Linen(), rngs).lazy_init(X[:1], train=False))
    variables = model.init(KEY)
    mean = variables.stats["BatchNorm_0"]["mean"]
    np.testing.assert_array_equal(mean, 0)
    output, stats = model.apply(variables, X)
    hidden = X @ variables.params["Dense_0"]["kernel"]
    np.testing.assert_allclose(output, hidden / np.sqrt(1 + 1e-5), atol=1e-5)
    chex.assert_trees_all_equal(stats, variables.stats)
    output, stats = model.apply(variables, X, train=True, key=KEY)
    np.testing.assert_allclose(stats["BatchNorm_0"]["mean"], 0.5 * hidden.mean(0), atol=1e-5)
    assert 0.3 < float((output == 0).mean()) < 0.7
    again, _ = model.apply(variables, X, train=True, key=KEY)
    np.testing.assert_array_equal(output, again)


def test_random_streams_may_be_an_argument():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x, *, rngs: nnx.Rngs, train: bool = False):
            return x + float(train) * self.scale * jax.random.normal(rngs.noise(), x.shape)

    model = from_nnx(Noisy)
    variables = model.init(KEY)
    np.testing.assert_array_equal(model.apply(variables, X)[0], X)
    first, other = (
        model.apply(variables, X, train=True, key=jax.random.key(n))[0] for n in range(2)
    )
    assert not np.allclose(first, other)


def test_an_nnx_module_may_name_its_own_axes():
    class Net(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.ones, ("inputs", "hidden"))
            self.linear = nnx.Linear(4, 3, kernel_init=init, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    model = from_nnx(Net)
    variables = jax.jit(model.init)(KEY)
    assert axis_sizes(variables, model.axes) == {"inputs": 4, "hidden": 3}
    output = jax.jit(model.apply)(variables, X)[0]
    np.testing.assert_allclose(
        output, np.repeat(X.sum(1, keepdims=True), 3, 1), rtol=1e-4, atol=1e-5
    )
