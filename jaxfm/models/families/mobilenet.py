"""MobileNet v1 and v2: depthwise separable convolutions and inverted residuals.

Source: Howard et al. 2017, table 1; Sandler et al. 2018, tables 1 and 2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxfm.layers import Axis, Linear, check_fields
from jaxfm.model import Array, Model
from jaxfm.models.families.convnet import ConvNorm, Sequence, as_classifier, depthwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobileNetConfig:
    """The shape of a MobileNet.

    Attributes:
      version: 1 or 2.
      rows: (expansion, channels, blocks, stride of the first) of each stage; in version 1 the
        expansion is 1.
      stem_channels: of the first convolution.
      stem_stride: of the first convolution; 1 suits 32x32 images.
      last_channels: of the 1x1 convolution before the classifier (version 2).
      num_channels: of the image.
      num_classes: outputs.
      dtype: of parameters and computation; logits are float32.
    """

    version: int
    rows: tuple[tuple[int, int, int, int], ...]
    stem_channels: int = 32
    stem_stride: int = 2
    last_channels: int = 1280
    num_channels: int = 3
    num_classes: int = 1000
    dtype: str = "float32"

    def __post_init__(self):
        positive = ("stem_channels", "stem_stride", "last_channels", "num_channels", "num_classes")
        check_fields(self, positive=positive, choices={"version": (1, 2)})
        if not self.rows or any(len(row) != 4 or min(row) < 1 for row in self.rows):
            raise ValueError(
                f"rows must be (expansion, channels, blocks, stride), got {self.rows}."
            )


_ROWS = {
    1: (
        (1, 64, 1, 1), (1, 128, 2, 2), (1, 256, 2, 2), (1, 512, 6, 2), (1, 1024, 2, 2),
    ),
    2: (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    ),
}  # fmt: skip


def mobilenet_config(version: int, **changes: Any) -> MobileNetConfig:
    """Returns the config of MobileNet v1 or v2 for ImageNet, at width 1.

    Raises:
      ValueError: another version.
    """
    if version not in _ROWS:
        raise ValueError(f"version must be 1 or 2, got {version}.")
    fields: dict[str, Any] = {"version": version, "rows": _ROWS[version]}
    return MobileNetConfig(**(fields | changes))


class SeparableBlock(nnx.Module):
    """A depthwise 3x3 and a 1x1 convolution, each with norm and ReLU (v1)."""

    def __init__(self, inputs: Axis, outputs: Axis, stride: int, taps: str, **kw: Any):
        self.depth = depthwise(inputs, stride=stride, taps=taps, **kw)
        self.point = ConvNorm(inputs, outputs, 1, **kw)

    def __call__(self, x: Array) -> Array:
        return self.point(self.depth(x))


class InvertedBlock(nnx.Module):
    """Expand by 1x1, filter by depthwise 3x3, project by 1x1 without activation (v2)."""

    def __init__(self, inputs: Axis, outputs: Axis, inner: Axis, stride: int, taps: str, **kw: Any):
        self.expands = inner != inputs
        if self.expands:
            self.expand = ConvNorm(inputs, inner, 1, activation="relu6", **kw)
        self.depth = depthwise(inner, stride=stride, taps=taps, activation="relu6", **kw)
        self.project = ConvNorm(inner, outputs, 1, activation=None, **kw)
        self.adds = inputs == outputs and stride == 1

    def __call__(self, x: Array) -> Array:
        y = self.project(self.depth(self.expand(x) if self.expands else x))
        return x + y if self.adds else y


class MobileNet(nnx.Module):
    """Stem, stages of blocks, the last convolution of v2, the mean over space, the classifier."""

    def __init__(self, config: MobileNetConfig, rngs: nnx.Rngs):
        kw: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        activation = "relu" if config.version == 1 else "relu6"
        stream: Axis = ("stem", config.stem_channels)
        self.stem = ConvNorm(
            ("channel", config.num_channels), stream, 3,
            stride=config.stem_stride, taps="kernel_stem", activation=activation, **kw,
        )  # fmt: skip
        for i, (expansion, channels, depth, stride) in enumerate(config.rows, 1):
            blocks: list[nnx.Module] = []
            outputs: Axis
            for j in range(depth):
                step = stride if j == 0 else 1
                taps = f"kernel_stage{i}_{j}"
                if config.version == 1:
                    outputs = (f"stage{i}_{j}", channels)
                    blocks.append(SeparableBlock(stream, outputs, step, taps, **kw))
                else:
                    # A block that adds to its input shares its channels, even across stages.
                    adds = step == 1 and channels == stream[1]
                    outputs = stream if adds else (f"stage{i}", channels)
                    wide = (f"stage{i}_{j}", expansion * stream[1])
                    inner = stream if expansion == 1 else wide
                    blocks.append(InvertedBlock(stream, outputs, inner, step, taps, **kw))
                stream = outputs
            setattr(self, f"stage{i}", Sequence(blocks))
        self.has_last = config.version == 2
        if self.has_last:
            last = ("last", config.last_channels)
            self.last = ConvNorm(stream, last, 1, activation=activation, **kw)
            stream = last
        self.classifier = Linear((stream,), (("class", config.num_classes),), bias=True, **kw)
        self.num_stages = len(config.rows)

    def __call__(self, images: Array) -> Array:
        x = self.stem(images)
        for i in range(1, self.num_stages + 1):
            x = getattr(self, f"stage{i}")(x)
        x = self.last(x) if self.has_last else x
        return self.classifier(x.mean((1, 2)))


def mobilenet(config: MobileNetConfig) -> Model:
    """Returns a Model: `apply(variables, images f32[B, H, W, C]) -> logits f32[B, num_classes]`."""
    return as_classifier(config, MobileNet)
