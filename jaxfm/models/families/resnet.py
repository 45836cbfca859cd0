"""Residual networks: ResNet-8 to 110 for 32x32 images, ResNet-18, 34 and 50 for ImageNet.

>>> import jax
>>> model = resnet(resnet_config(8))
>>> variables = jax.eval_shape(model.init, jax.random.key(0))
>>> logits, _ = jax.eval_shape(model.apply, variables, jax.numpy.ones((2, 32, 32, 3)))
>>> logits.shape
(2, 10)

Each block has its own parameters, so blocks whose inner channels were pruned unequally run as they
are. Source: He et al. 2016, sections 3 and 4.2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfm.layers import Axis, Linear, check_fields
from jaxfm.model import Array, Model
from jaxfm.models.families.convnet import ConvNorm, Sequence, as_classifier, max_pool_3x3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """The shape of a residual network.

    Attributes:
      depths: blocks of each stage; every stage but the first halves the image.
      widths: channels of the residual stream of each stage (of "bottleneck", a quarter of them).
      block: "basic", two 3x3 convolutions, or "bottleneck", 1x1, 3x3 and 1x1.
      shortcut: where the shape changes, "pad" (every second pixel, zeros for the new channels, no
        parameters: option A) or "projection" (a 1x1 convolution). Zero padding ties channels of
        one stage to those of the next at an offset, so its streams have no axis name; with
        projections they are called "stage1", "stage2", ... The inner channels of block j of stage
        i are "stage{i}_{j}" (and "stage{i}_{j}b" in a bottleneck) either way.
        The taps of the kernels above 1x1 are "kernel_stem", and "kernel_stage{i}_{j}" and
        "kernel_stage{i}_{j}b" of the first and the second convolution of a block.
      stem: "cifar", one 3x3 convolution, or "imagenet", 7x7 with stride 2 and pooling.
      norm: "batch" or "group".
      num_groups: of "group"; a subnet has to keep equally many channels of each.
      num_channels: of the image.
      num_classes: outputs.
      dtype: of parameters and computation; logits are float32.
    """

    depths: tuple[int, ...] = (3, 3, 3)
    widths: tuple[int, ...] = (16, 32, 64)
    block: str = "basic"
    shortcut: str = "pad"
    stem: str = "cifar"
    norm: str = "batch"
    num_groups: int = 8
    num_channels: int = 3
    num_classes: int = 10
    dtype: str = "float32"

    def __post_init__(self):
        check_fields(
            self,
            positive=("num_groups", "num_channels", "num_classes"),
            choices={
                "block": ("basic", "bottleneck"),
                "shortcut": ("pad", "projection"),
                "stem": ("cifar", "imagenet"),
                "norm": ("batch", "group"),
            },
        )
        if len(self.depths) != len(self.widths) or min((*self.depths, *self.widths)) < 1:
            raise ValueError(
                f"depths={self.depths} and widths={self.widths} must be one positive count a stage."
            )
        if self.shortcut == "pad" and self.block == "bottleneck":
            raise ValueError("shortcut='pad' needs block='basic'; a bottleneck takes 'projection'.")


_IMAGENET: dict[int, tuple[str, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
}


def resnet_config(depth: int, **changes: Any) -> ResNetConfig:
    """Returns the config of ResNet-18, 34, 50 (ImageNet) or 6n + 2: 8, 20, ..., 110 (CIFAR).

    Raises:
      ValueError: another depth.
    """
    if depth in _IMAGENET:
        block, depths = _IMAGENET[depth]
        fields: dict[str, Any] = {
            "block": block, "depths": depths, "widths": (64, 128, 256, 512), "stem": "imagenet",
            "shortcut": "projection", "num_classes": 1000,
        }  # fmt: skip
    elif depth >= 8 and depth % 6 == 2:
        fields = {"depths": ((depth - 2) // 6,) * 3}
    else:
        raise ValueError(
            f"There is no ResNet-{depth}; give {sorted(_IMAGENET)} (ImageNet), or 6n + 2: 8, 20, "
            "32, 44, 56, 110 (CIFAR)."
        )
    return ResNetConfig(**(fields | changes))


class Block(nnx.Module):
    """relu(shortcut(x) + conv(... relu(conv(x))))."""

    def __init__(
        self, config: ResNetConfig, inputs: Axis, outputs: Axis, inner: Axis, stride: int, rngs
    ):
        kw: dict[str, Any] = {
            "norm": config.norm, "num_groups": config.num_groups,
            "dtype": jnp.dtype(config.dtype), "rngs": rngs,
        }  # fmt: skip
        taps = f"kernel_{inner[0]}"
        if config.block == "basic":
            self.conv1 = ConvNorm(inputs, inner, 3, stride=stride, taps=taps, **kw)
            self.conv2 = ConvNorm(inner, outputs, 3, taps=f"{taps}b", activation=None, **kw)
        else:
            second = (f"{inner[0]}b", inner[1])
            self.conv1 = ConvNorm(inputs, inner, 1, **kw)
            self.conv2 = ConvNorm(inner, second, 3, stride=stride, taps=f"{taps}b", **kw)
            self.conv3 = ConvNorm(second, outputs, 1, activation=None, **kw)
        self.num_convs = 2 if config.block == "basic" else 3
        self.projects = config.shortcut == "projection" and (stride > 1 or inputs != outputs)
        if self.projects:
            self.shortcut = ConvNorm(inputs, outputs, 1, stride=stride, activation=None, **kw)
        self.stride = stride

    def __call__(self, x: Array) -> Array:
        y = x
        for i in range(1, self.num_convs + 1):
            y = getattr(self, f"conv{i}")(y)
        if self.projects:
            return jax.nn.relu(self.shortcut(x) + y)
        x = x[:, :: self.stride, :: self.stride]
        new = y.shape[-1] - x.shape[-1]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2))) if new else x
        return jax.nn.relu(x + y)


class ResNet(nnx.Module):
    """Stem, stages of blocks, the mean over space, the classifier."""

    def __init__(self, config: ResNetConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        named = config.shortcut == "projection"
        wider = 1 if config.block == "basic" else 4
        kw: dict[str, Any] = {"norm": config.norm, "num_groups": config.num_groups}
        size, stride = (3, 1) if config.stem == "cifar" else (7, 2)
        # A basic first stage adds to the stem's output, so both are one stream.
        first = "stage1" if wider == 1 else "stem"
        stream: Axis = (first if named else None, config.widths[0])
        image = ("channel", config.num_channels)
        self.stem = ConvNorm(
            image, stream, size, stride=stride, taps="kernel_stem", dtype=dtype, rngs=rngs, **kw
        )
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True), 1):
            outputs: Axis = (f"stage{i}" if named else None, width * wider)
            blocks: list[nnx.Module] = []
            for j in range(depth):
                step = 2 if i > 1 and j == 0 else 1
                inner = (f"stage{i}_{j}", width)
                blocks.append(Block(config, stream, outputs, inner, step, rngs))
                stream = outputs
            setattr(self, f"stage{i}", Sequence(blocks))
        classes = ("class", config.num_classes)
        self.classifier = Linear((stream,), (classes,), bias=True, dtype=dtype, rngs=rngs)
        self.num_stages, self.pools = len(config.depths), config.stem == "imagenet"

    def __call__(self, images: Array) -> Array:
        x = self.stem(images)
        x = max_pool_3x3(x) if self.pools else x
        for i in range(1, self.num_stages + 1):
            x = getattr(self, f"stage{i}")(x)
        return self.classifier(x.mean((1, 2)))


def resnet(config: ResNetConfig = ResNetConfig()) -> Model:
    """Returns a Model: `apply(variables, images f32[B, H, W, C]) -> logits f32[B, num_classes]`."""
    return as_classifier(config, ResNet)
