"""Where a function reads the size of a cut axis, it runs as if written for what is left.

The oracle is the function itself, called with the parameters that were cut.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxfm.search import masked, network, sliced
from jaxfm.search.trace.interpret import cut

RNG = np.random.default_rng(0)
LAYOUT = ("NHWC", "HWIO", "NHWC")


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def hidden(between):
    return lambda p, x: between(x @ p["w"]) @ p["o"]


def convolve(x, kernel, groups=1):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT, feature_group_count=groups
    )


def attention_of_pooled_channels(p, x):
    """The spatial part of CBAM: mean and maximum over channels, a convolution, a gate."""
    y = convolve(x, p["w"])
    pooled = jnp.stack([y.mean(-1), y.max(-1)], -1)
    return (y * jax.nn.sigmoid(convolve(pooled, p["s"]))).mean((1, 2)) @ p["o"]


DENSE = {"w": draw(5, 12), "o": draw(12, 3)}
IMAGE = {"w": draw(3, 3, 3, 12), "s": draw(3, 3, 2, 1), "o": draw(12, 4)}
X, PICTURE = draw(2, 5), draw(2, 8, 8, 3)
last = {"axis": -1, "keepdims": True}
CASES = {
    "mean": (hidden(lambda y: y * y.mean(**last)), DENSE, X),
    "variance": (hidden(lambda y: y / (1 + y.var(**last))), DENSE, X),
    "ddof": (hidden(lambda y: y / y.std(**last, ddof=1)), DENSE, X),
    "ddof of squares": (
        hidden(lambda y: y / jnp.sqrt((y * y).sum(**last) / (y.shape[-1] - 1))), DENSE, X,
    ),
    "sum by a root": (hidden(lambda y: y * (y.sum(**last) / np.sqrt(y.shape[-1]))), DENSE, X),
    "norm by a root": (
        hidden(lambda y: y / (jnp.sqrt((y * y).sum(**last)) / np.sqrt(y.shape[-1]))), DENSE, X,
    ),
    "sum by a factor": (hidden(lambda y: y * (y.sum(**last) * y.shape[-1] ** -0.5)), DENSE, X),
    "largest": (hidden(lambda y: y * y.max(**last)), DENSE, X),
    "smallest": (hidden(lambda y: y - y.min(**last)), DENSE, X),
    "softmax": (hidden(lambda y: jax.nn.softmax(y, -1)), DENSE, X),
    "pooled attention": (attention_of_pooled_channels, IMAGE, PICTURE),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_masked_is_sliced_is_the_function_of_what_is_left(case):
    function, params, x = CASES[case]
    net = network(function, params, x)
    (group,) = net.groups
    assert group.size == 12
    for keep in ([0, 2, 3, 7, 10], [4]) if "ddof" not in case else ([0, 2, 3, 7, 10], [1, 11]):
        kept = (np.isin(np.arange(12), keep),)
        small = cut(net, params, kept)
        expected = function(small, x)
        np.testing.assert_allclose(sliced(net, kept)(small, x), expected, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(masked(net)(params, kept, x), expected, rtol=2e-4, atol=2e-4)
    whole = (np.ones(12, bool),)
    np.testing.assert_allclose(masked(net)(params, whole, x), function(params, x), rtol=1e-5)


def test_a_temperature_and_a_chance_constant_stay():
    """Not everything that resembles a size is one: a value that is no sum keeps its divisor."""
    function = hidden(lambda y: jnp.tanh(y / np.sqrt(12)))
    net = network(function, DENSE, X)
    kept = (np.arange(12) < 5,)
    small = cut(net, DENSE, kept)
    expected = jnp.tanh(X @ small["w"] / np.sqrt(12)) @ small["o"]
    np.testing.assert_allclose(sliced(net, kept)(small, X), expected, rtol=1e-5)
    np.testing.assert_allclose(masked(net)(DENSE, kept, X), expected, rtol=1e-5)


@pytest.mark.parametrize("per_group", [1, 2])
def test_a_grouped_convolution_on_the_image_is_cut_evenly(per_group):
    """Each colour keeps equal numbers of its own outputs."""
    channels = 3 * per_group
    params = {"w": draw(3, 3, per_group, 12), "o": draw(12, 4)}
    function = lambda p, x: jax.nn.relu(convolve(x, p["w"], 3)).mean((1, 2)) @ p["o"]
    x = draw(2, 8, 8, channels)
    net = network(function, params, x)
    (group,) = net.groups
    assert (group.size, len(group.members)) == (4, 2)
    kept = (np.array([True, False, False, True]),)
    small = cut(net, params, kept)
    assert small["w"].shape == (3, 3, per_group, 6)
    expected = function(small, x)
    np.testing.assert_allclose(sliced(net, kept)(small, x), expected, atol=1e-5)
    np.testing.assert_allclose(masked(net)(params, kept, x), expected, atol=1e-5)
