"""Small image classifiers: the convolutional network and the MLP of the federated papers.

Source: McMahan et al. 2017 (FedAvg), section 3: two 5x5 convolutions (32 and 64 channels, each
followed by 2x2 max pooling) and a dense layer of 512 units; and a multilayer perceptron.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxfm.conv import conv2d, max_pool
from jaxfm.layers import Axis, Linear, check_fields, param
from jaxfm.model import Array, Model, from_nnx

_RELU_GAIN = 2**0.5  # He et al. 2015, equation 10: keeps the variance through a ReLU


@dataclasses.dataclass(frozen=True, kw_only=True)
class CnnConfig:
    """The shape of the small convolutional network.

    Attributes:
      image_size: (height, width) in pixels; each pooling halves it, rounding down.
      num_channels: of the image.
      conv_channels: of the two convolutions.
      dense_dim: units of the dense layer.
      num_classes: outputs.
      dtype: of parameters and computation; logits are float32.
    """

    image_size: tuple[int, int] = (28, 28)
    num_channels: int = 1
    conv_channels: tuple[int, int] = (32, 64)
    dense_dim: int = 512
    num_classes: int = 10
    dtype: str = "float32"

    def __post_init__(self):
        check_fields(self, positive=("num_channels", "dense_dim", "num_classes"), choices={})
        if len(self.image_size) != 2 or min(self.image_size) < 4:
            raise ValueError(f"image_size must be (height, width) >= 4, got {self.image_size}.")
        if len(self.conv_channels) != 2 or min(self.conv_channels) < 1:
            raise ValueError(f"conv_channels must be two counts, got {self.conv_channels}.")


class Conv(nnx.Module):
    """A convolution with a bias that keeps height and width; kernel [size, size, in, out]."""

    def __init__(self, inputs: Axis, outputs: Axis, size: int, taps: str, *, dtype, rngs: nnx.Rngs):
        shape = (size, size, inputs[1], outputs[1])
        stddev = _RELU_GAIN / math.sqrt(math.prod(shape[:3]))
        kernel = (jax.random.normal(rngs.params(), shape) * stddev).astype(dtype)
        self.kernel = param(kernel, (taps, taps, inputs[0], outputs[0]))
        self.bias = param(jnp.zeros((outputs[1],), dtype), (outputs[0],))

    def __call__(self, x: Array) -> Array:
        y = conv2d(x, self.kernel[...])
        return y + lax.broadcast_in_dim(self.bias[...], y.shape, (3,))


class Cnn(nnx.Module):
    """Two rounds of convolution, ReLU and pooling; a dense layer; the classifier."""

    def __init__(self, config: CnnConfig, rngs: nnx.Rngs):
        first, second = (("conv1", config.conv_channels[0]), ("conv2", config.conv_channels[1]))
        dense, classes = ("dense", config.dense_dim), ("class", config.num_classes)
        height, width = (size // 2 // 2 for size in config.image_size)
        kw = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.conv1 = Conv(("channel", config.num_channels), first, 5, "kernel_conv1", **kw)
        self.conv2 = Conv(first, second, 5, "kernel_conv2", **kw)
        # The kernel keeps the axes of the image, so that channels of conv2 can be cut.
        self.dense = Linear(
            ((None, height), (None, width), second), (dense,), bias=True, scale=_RELU_GAIN, **kw
        )
        self.classifier = Linear((dense,), (classes,), bias=True, **kw)

    def __call__(self, images: Array) -> Array:
        x = images.astype(self.conv1.kernel[...].dtype)
        x = max_pool(jax.nn.relu(self.conv1(x)), 2)
        x = max_pool(jax.nn.relu(self.conv2(x)), 2)
        return self.classifier(jax.nn.relu(self.dense(x))).astype(jnp.float32)


def cnn(config: CnnConfig = CnnConfig()) -> Model:
    """Returns a Model: `apply(variables, images f32[B, H, W, C]) -> logits f32[B, num_classes]`."""
    expected = (*config.image_size, config.num_channels)
    network = from_nnx(lambda rngs: Cnn(config, rngs))

    def apply(variables, images: Array, *, train: bool = False, key=None):
        if images.shape[1:] != expected:
            raise ValueError(
                f"The images have shape {images.shape}; this model takes [B, H, W, C] = "
                f"[B, {', '.join(map(str, expected))}]."
            )
        return network.apply(variables, images, train=train, key=key)

    return network._replace(apply=apply, config=config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """The shape of a multilayer perceptron.

    Attributes:
      sizes: numbers of inputs, of the units of each hidden layer, and of classes.
    """

    sizes: tuple[int, ...] = (784, 200, 10)

    def __post_init__(self):
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            raise ValueError(
                f"sizes must be counts of inputs, hidden units and classes; got {self.sizes}."
            )

    @property
    def num_classes(self) -> int:
        """Returns the number of logits."""
        return self.sizes[-1]


class Mlp(nnx.Module):
    """Linear maps with a ReLU between."""

    def __init__(self, sizes: tuple[int, ...], rngs: nnx.Rngs):
        hidden = [f"hidden{i}" for i in range(1, len(sizes) - 1)]
        axes = list(zip(["input", *hidden, "class"], sizes, strict=True))
        self.num_layers = len(sizes) - 1
        for i, (inputs, outputs) in enumerate(itertools.pairwise(axes)):
            scale = _RELU_GAIN if i < self.num_layers - 1 else 1.0
            layer = Linear((inputs,), (outputs,), bias=True, scale=scale, rngs=rngs)
            setattr(self, f"dense{i + 1}", layer)

    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        for i in range(1, self.num_layers):
            x = jax.nn.relu(getattr(self, f"dense{i}")(x))
        return getattr(self, f"dense{self.num_layers}")(x)


def mlp(sizes: tuple[int, ...] = (784, 200, 10)) -> Model:
    """Returns a Model of `sizes` units a layer: `apply(variables, f32[B, ...]) -> logits [B, C]`.

    Raises:
      ValueError: fewer than two sizes, or one below 1.
    """
    config = MlpConfig(sizes=tuple(sizes))
    return from_nnx(lambda rngs: Mlp(config.sizes, rngs))._replace(config=config)
