"""Parts that the convolutional families share: convolution, norm, activation, pooling.

Widths are read from the shapes of the parameters when called, as everywhere, and so is the number
of groups: a kernel that reads fewer channels than there are is a grouped one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxfm.conv import conv2d
from jaxfm.layers import Axis, BatchNorm, GroupNorm, param
from jaxfm.model import Array, Model, from_nnx

NORMS = ("batch", "group", "none")
_ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda x: x,
    "relu": jax.nn.relu,
    "relu6": lambda x: jnp.clip(x, 0, 6),
}
_RELU_GAIN = 2**0.5  # He et al. 2015, equation 10: keeps the variance through a ReLU


class Conv(nnx.Module):
    """A convolution, padded by size // 2 on all sides; kernel [size, size, in // groups, out].

    The centre of a kernel is a smaller kernel: a crop reduces the padding by as much on all sides,
    so the window stays in place for any stride. `taps` names both axes.
    """

    def __init__(
        self, inputs: Axis, outputs: Axis, size: int, *, stride: int = 1, groups: int = 1,
        taps: str | None = None, bias: bool = False, dtype=jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        shape = (size, size, inputs[1] // groups, outputs[1])
        stddev = _RELU_GAIN / math.sqrt(math.prod(shape[:3]))
        kernel = (jax.random.normal(rngs.params(), shape) * stddev).astype(dtype)
        reads = inputs[0] if groups == 1 else None
        self.kernel = param(kernel, (taps, taps, reads, outputs[0]))
        if bias:
            self.bias = param(jnp.zeros((outputs[1],), dtype), (outputs[0],))
        self.stride, self.has_bias = stride, bias

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...]
        pads = ((kernel.shape[0] // 2,) * 2, (kernel.shape[1] // 2,) * 2)
        groups = x.shape[-1] // kernel.shape[2]
        if groups == 1:
            y = conv2d(x, kernel, strides=self.stride, padding=pads)
        else:
            y = lax.conv_general_dilated(
                x, kernel, (self.stride, self.stride), pads, feature_group_count=groups,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
        if self.has_bias:
            y = y + lax.broadcast_in_dim(self.bias[...], y.shape, (3,))
        return y


class ConvNorm(nnx.Module):
    """Convolution, norm, activation; without a norm the convolution always has a bias."""

    def __init__(
        self, inputs: Axis, outputs: Axis, size: int, *, stride: int = 1, groups: int = 1,
        taps: str | None = None, bias: bool = False, norm: str = "batch", num_groups: int = 8,
        activation: str | None = "relu", dtype=jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.conv = Conv(
            inputs, outputs, size, stride=stride, groups=groups, taps=taps,
            bias=bias or norm == "none", dtype=dtype, rngs=rngs,
        )  # fmt: skip
        if norm == "batch":
            self.norm = BatchNorm(outputs, dtype=dtype)
        elif norm == "group":
            self.norm = GroupNorm(outputs, num_groups=num_groups, dtype=dtype)
        self.has_norm, self.activation = norm != "none", activation

    def __call__(self, x: Array) -> Array:
        y = self.conv(x)
        return _ACTIVATIONS[self.activation](self.norm(y) if self.has_norm else y)


def depthwise(axis: Axis, size: int = 3, **options: Any) -> ConvNorm:
    """Returns a convolution with one filter per channel."""
    return ConvNorm(axis, axis, size, groups=axis[1], **options)


def max_pool_3x3(x: Array) -> Array:
    """Pools 3x3 windows by their largest value, stride 2, padded by 1, as ImageNet stems do."""
    lowest = np.asarray(-np.inf, x.dtype)  # of NumPy: JAX must see its value to differentiate
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, lowest, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)


def average_pool_3x3(x: Array) -> Array:
    """Returns the mean of each 3x3 window, stride 2; the padding of 1 counts as zeros."""
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    zero = np.zeros((), x.dtype)  # of NumPy: JAX must see its value to differentiate
    return lax.reduce_window(x, zero, lax.add, (1, 3, 3, 1), (1, 2, 2, 1), pads) / 9


class Sequence(nnx.Module):
    """Modules one after the other, named "0", "1", ..."""

    def __init__(self, modules: list[nnx.Module]):
        for i, module in enumerate(modules):
            setattr(self, str(i), module)
        self.length = len(modules)

    def __call__(self, x: Array) -> Array:
        for i in range(self.length):
            x = getattr(self, str(i))(x)
        return x


def as_classifier(
    config: Any, make_module: Callable[[Any, nnx.Rngs], nnx.Module], image_size: int | None = None
) -> Model:
    """Returns a Model that checks images, casts them to its dtype and gives float32 logits."""
    network = from_nnx(lambda rngs: make_module(config, rngs))
    size = "H, W" if image_size is None else f"{image_size}, {image_size}"

    def apply(variables, images: Array, *, train: bool = False, key=None):
        square = image_size is None or images.shape[1:3] == (image_size, image_size)
        if images.ndim != 4 or images.shape[3] != config.num_channels or not square:
            raise ValueError(
                f"The images have shape {images.shape}; this model takes "
                f"[B, {size}, {config.num_channels}]."
            )
        x = images.astype(jnp.dtype(config.dtype))
        logits, stats = network.apply(variables, x, train=train, key=key)
        return logits.astype(jnp.float32), stats

    return network._replace(apply=apply, config=dataclasses.replace(config))
