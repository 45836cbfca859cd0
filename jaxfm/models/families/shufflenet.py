"""ShuffleNet v1 and v2: grouped and split convolutions with channel shuffles.

Source: Zhang et al. 2018, figure 2 and table 1; Ma et al. 2018, figure 3 and table 5. A shuffle
ties channels to others by their number, so the streams of the stages have no axis name and only
`jaxfm.search` can cut them; the inner channels of v2, which are not shuffled, are "stage{i}_{j}".
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfm.layers import Axis, Linear, check_fields
from jaxfm.model import Array, Model
from jaxfm.models.families.convnet import (
    ConvNorm,
    Sequence,
    as_classifier,
    average_pool_3x3,
    depthwise,
    max_pool_3x3,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffleNetConfig:
    """The shape of a ShuffleNet.

    Attributes:
      version: 1 or 2.
      depths: blocks of each stage; the first of each halves the image.
      widths: channels of each stage.
      groups: of the 1x1 convolutions (version 1).
      stem_channels: of the first convolution.
      stem: "imagenet", stride 2 and pooling, or "cifar", neither.
      last_channels: of the 1x1 convolution before the classifier (version 2).
      num_channels: of the image.
      num_classes: outputs.
      dtype: of parameters and computation; logits are float32.
    """

    version: int
    depths: tuple[int, ...] = (4, 8, 4)
    widths: tuple[int, ...] = (116, 232, 464)
    groups: int = 3
    stem_channels: int = 24
    stem: str = "imagenet"
    last_channels: int = 1024
    num_channels: int = 3
    num_classes: int = 1000
    dtype: str = "float32"

    def __post_init__(self):
        positive = ("groups", "stem_channels", "last_channels", "num_channels", "num_classes")
        choices: dict[str, tuple] = {"version": (1, 2), "stem": ("imagenet", "cifar")}
        check_fields(self, positive=positive, choices=choices)
        if len(self.depths) != len(self.widths) or min((*self.depths, *self.widths)) < 1:
            raise ValueError(
                f"depths={self.depths} and widths={self.widths} must be one positive count a stage."
            )
        unit = 2 if self.version == 2 else 4 * self.groups
        if any(width % unit for width in self.widths):
            raise ValueError(f"widths={self.widths} must be multiples of {unit}.")
        counts = (self.stem_channels, *self.widths)
        added = [after - before for before, after in itertools.pairwise(counts)]
        if self.version == 1 and any(more < 1 or more % self.groups for more in added):
            raise ValueError(
                f"stem_channels and widths {counts} must grow by multiples of groups="
                f"{self.groups}: the first block of a stage adds channels to those it has."
            )


def shufflenet_config(version: int, **changes: Any) -> ShuffleNetConfig:
    """Returns the config of ShuffleNet v1 (3 groups) or v2 for ImageNet, at width 1.

    Raises:
      ValueError: another version.
    """
    fields: dict[str, Any] = {"version": version}
    if version == 1:
        fields["widths"] = (240, 480, 960)
    return ShuffleNetConfig(**(fields | changes))


def shuffle(x: Array, groups: int) -> Array:
    """Takes channels of all groups in turn: transposes [groups, channels // groups]."""
    y = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return y.swapaxes(-1, -2).reshape(x.shape)


class GroupedBlock(nnx.Module):
    """v1: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; added, or beside the pooled input."""

    def __init__(
        self, inputs: int, outputs: int, groups: int, stride: int, first_groups: int, taps: str,
        **kw: Any,
    ):  # fmt: skip
        inner = outputs // 4
        self.halves, self.groups = stride == 2, groups
        added = outputs - inputs if self.halves else outputs
        self.reduce = ConvNorm((None, inputs), (None, inner), 1, groups=first_groups, **kw)
        self.depth = depthwise((None, inner), stride=stride, taps=taps, activation=None, **kw)
        self.expand = ConvNorm(
            (None, inner), (None, added), 1, groups=groups, activation=None, **kw
        )

    def __call__(self, x: Array) -> Array:
        y = self.expand(self.depth(shuffle(self.reduce(x), self.groups)))
        if self.halves:
            return jax.nn.relu(jnp.concatenate([average_pool_3x3(x), y], -1))
        return jax.nn.relu(x + y)


class SplitBlock(nnx.Module):
    """v2: half of the channels pass, the other half is convolved; with stride 2, both are."""

    def __init__(self, inputs: int, outputs: int, stride: int, name: str, **kw: Any):
        half, inner = outputs // 2, (name, outputs // 2)
        self.halves = stride == 2
        read: Axis = (None, inputs if self.halves else half)
        if self.halves:
            self.left_depth = depthwise(
                read, stride=2, taps=f"kernel_{name}b", activation=None, **kw
            )
            self.left_point = ConvNorm(read, (None, half), 1, **kw)
        self.expand = ConvNorm(read, inner, 1, **kw)
        self.depth = depthwise(inner, stride=stride, taps=f"kernel_{name}", activation=None, **kw)
        self.project = ConvNorm(inner, (None, half), 1, **kw)

    def __call__(self, x: Array) -> Array:
        if self.halves:
            left, right = self.left_point(self.left_depth(x)), x
        else:
            left, right = jnp.split(x, 2, -1)
        right = self.project(self.depth(self.expand(right)))
        return shuffle(jnp.concatenate([left, right], -1), 2)


class ShuffleNet(nnx.Module):
    """Stem, stages of blocks, the last convolution of v2, the mean over space, the classifier."""

    def __init__(self, config: ShuffleNetConfig, rngs: nnx.Rngs):
        kw: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.pools = config.stem == "imagenet"
        channels = config.stem_channels
        image = ("channel", config.num_channels)
        self.stem = ConvNorm(
            image, (None, channels), 3, stride=2 if self.pools else 1, taps="kernel_stem", **kw
        )
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True), 1):
            blocks: list[nnx.Module] = []
            for j in range(depth):
                stride = 2 if j == 0 else 1
                if config.version == 1:
                    # The stem's few channels are not divided.
                    first = 1 if i == 1 and j == 0 else config.groups
                    taps = f"kernel_stage{i}_{j}"
                    blocks.append(
                        GroupedBlock(channels, width, config.groups, stride, first, taps, **kw)
                    )
                else:
                    blocks.append(SplitBlock(channels, width, stride, f"stage{i}_{j}", **kw))
                channels = width
            setattr(self, f"stage{i}", Sequence(blocks))
        stream: Axis = (None, channels)
        self.has_last = config.version == 2
        if self.has_last:
            last = ("last", config.last_channels)
            self.last = ConvNorm(stream, last, 1, **kw)
            stream = last
        self.classifier = Linear((stream,), (("class", config.num_classes),), bias=True, **kw)
        self.num_stages = len(config.depths)

    def __call__(self, images: Array) -> Array:
        x = self.stem(images)
        x = max_pool_3x3(x) if self.pools else x
        for i in range(1, self.num_stages + 1):
            x = getattr(self, f"stage{i}")(x)
        x = self.last(x) if self.has_last else x
        return self.classifier(x.mean((1, 2)))


def shufflenet(config: ShuffleNetConfig) -> Model:
    """Returns a Model: `apply(variables, images f32[B, H, W, C]) -> logits f32[B, num_classes]`."""
    return as_classifier(config, ShuffleNet)
