"""Laws of `jaxfm.conv`: what XLA's convolution and pooling give, with derivatives fast in loops."""

import functools
import re

import chex
import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxfm.conv import METHODS, conv2d, max_pool

close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def reference(x, kernel, strides, padding):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def squares(method, strides=2):
    return lambda x, kernel: jnp.sum(conv2d(x, kernel, strides=strides, method=method) ** 2)


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
edges = st.tuples(st.integers(-1, 3), st.integers(0, 3))
pads = st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(edges, edges))


@hypothesis.settings(max_examples=12)
@given(
    size=st.tuples(st.sampled_from([2, 6]), st.integers(2, 7)),
    taps=pairs,
    strides=pairs,
    padding=pads,
)
def test_values_and_gradients_are_those_of_lax(size, taps, strides, padding):
    x, kernel = normal(0, 2, *size, 2), normal(1, *taps, 2, 3)
    y, pullback = jax.vjp(lambda x, k: reference(x, k, strides, padding), x, kernel)
    assume(y.size > 0)
    for method in METHODS:
        conv = functools.partial(conv2d, strides=strides, padding=padding, method=method)
        ours, ours_pullback = jax.vjp(conv, x, kernel)
        close(ours, y)
        close(ours_pullback(y), pullback(y))


def test_gradient_of_a_gradient_agrees():
    x, kernel = normal(0, 2, 5, 5, 2), normal(1, 3, 3, 2, 2)

    def curvature(method):
        gradient = jax.grad(squares(method), argnums=(0, 1))
        inner = lambda *args: sum(jnp.sum(g**3) for g in gradient(*args))
        return jax.grad(inner, argnums=(0, 1))(x, kernel)

    chex.assert_trees_all_close(curvature("canonical"), curvature("direct"), rtol=1e-4)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_vmap_is_a_loop_over_its_axis(axes):
    x, kernel = normal(0, 3, 2, 5, 5, 2), normal(1, 3, 3, 3, 2, 2)
    x, kernel = (x if axes[0] == 0 else x[0]), (kernel if axes[1] == 0 else kernel[0])
    gradient = jax.value_and_grad(squares("canonical"), argnums=(0, 1))
    pick = lambda a, axis, i: a if axis is None else a[i]
    looped = [gradient(pick(x, axes[0], i), pick(kernel, axes[1], i)) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped)
    close(jax.vmap(gradient, in_axes=axes)(x, kernel), stacked)


def test_nested_vmap_agrees():
    x, kernel = normal(0, 2, 3, 1, 4, 4, 2), normal(1, 3, 3, 3, 2, 2)
    nested = [
        jax.vmap(jax.vmap(functools.partial(conv2d, method=m)), in_axes=(0, None))(x, kernel)
        for m in METHODS
    ]
    close(*nested)


@pytest.mark.parametrize("method", METHODS)
def test_shard_map_gives_the_gradient_of_the_whole(method):
    mesh = jax.make_mesh((2,), ("clients",), axis_types=(AxisType.Auto,))
    x, kernel = normal(0, 4, 5, 5, 2), normal(1, 3, 3, 2, 2)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("clients"), P()), out_specs=P())
    def gradient(x, kernel):  # of a kernel that does not vary: summed over the devices
        return jax.grad(squares(method), argnums=1)(x, kernel)

    close(gradient(x, kernel), jax.grad(squares(method), argnums=1)(x, kernel), rtol=1e-4)


@pytest.mark.parametrize(("side", "strides"), [(8, 2), (2, 1)])  # the kernel's area above, too
def test_inside_a_loop_every_convolution_has_the_form_that_is_fast_on_cpu(side, strides):
    def train(kernel, x):
        gradient = jax.grad(squares("canonical", strides), argnums=(0, 1))

        def step(carry, _):
            return jax.tree.map(lambda a, g: a - 0.01 * g, carry, gradient(*carry)), None

        return lax.scan(step, (x, kernel), length=3)[0]

    lowered = jax.jit(train).lower(normal(1, 3, 3, 2, 4), normal(0, 2, side, side, 2))
    text = lowered.compile().as_text()
    forms = re.findall(r" convolution\(.*dim_labels=([^,\s]+)", text)
    assert len(forms) == 3 and set(forms) == {"b01f_01io->b01f"}, forms


def test_default_method_follows_the_backend(monkeypatch):
    x, kernel = normal(0, 1, 4, 4, 1), normal(1, 3, 3, 1, 1)
    for backend, custom in [("cpu", True), ("gpu", False), ("tpu", False)]:
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        jaxpr = jax.make_jaxpr(lambda *args: conv2d(*args))(x, kernel)  # a new one: traces anew
        assert ("custom_vjp" in str(jaxpr)) == custom


@pytest.mark.parametrize(("height", "width", "size"), [(4, 6, 2), (5, 7, 2), (7, 3, 3), (3, 2, 1)])
def test_max_pool_is_a_valid_window_maximum(height, width, size):
    x = normal(0, 2, height, width, 3)
    window = (1, size, size, 1)
    pool = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
    y, pullback = jax.vjp(pool, x)
    ours, ours_pullback = jax.vjp(lambda x: max_pool(x, size), x)
    chex.assert_trees_all_equal((ours, ours_pullback(y)), (y, pullback(y)))


x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: conv2d(x, kernel, method="fft"), ValueError, "'fft'.*direct.*canonical"),
        (lambda: conv2d(x[0], kernel), ValueError, r"\[B, H, W, C\].*\(4, 4, 2\).*vmap"),
        (lambda: conv2d(x, kernel[:, :, :1]), ValueError, "2 channels.*reads 1.*grouped"),
        (lambda: conv2d(x, kernel.astype(jnp.bfloat16)), TypeError, "float32.*bfloat16.*cast"),
        (lambda: conv2d(x, kernel, strides=(1, 0)), ValueError, r"strides are \(1, 0\).*positive"),
        (lambda: conv2d(x, kernel, padding="FULL"), ValueError, "'FULL'.*'SAME', 'VALID' or pairs"),
        (lambda: conv2d(x, kernel, padding=((1, 1),)), ValueError, r"give \(\(top, bottom\)"),
        (lambda: max_pool(x, 5), ValueError, r"size=5.*\(1, 4, 4, 2\)"),
        (lambda: max_pool(x[0], 2), ValueError, r"\[B, H, W, C\].*\(4, 4, 2\)"),
    ],
)
def test_bad_input_is_named_before_tracing(call, error, message):
    with pytest.raises(error, match=message):
        call()
