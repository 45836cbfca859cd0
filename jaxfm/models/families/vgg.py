"""VGG: plain stacks of 3x3 convolutions. Source: Simonyan and Zisserman 2015, table 1 (A and D)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfm.conv import max_pool
from jaxfm.layers import Axis, Linear, check_fields
from jaxfm.model import Array, Model
from jaxfm.models.families.convnet import ConvNorm, Sequence, as_classifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class VggConfig:
    """The shape of a VGG.

    Attributes:
      stages: channels of the convolutions of each stage; a 2x2 pooling follows each stage.
      batch_norm: after every convolution.
      dense_dims: units of the dense layers before the classifier.
      image_size: height and width in pixels; the output of the last pooling is flattened.
      num_channels: of the image.
      num_classes: outputs.
      dtype: of parameters and computation; logits are float32.
    """

    stages: tuple[tuple[int, ...], ...]
    batch_norm: bool = True
    dense_dims: tuple[int, ...] = (4096, 4096)
    image_size: int = 224
    num_channels: int = 3
    num_classes: int = 1000
    dtype: str = "float32"

    def __post_init__(self):
        check_fields(self, positive=("num_channels", "num_classes"), choices={})
        counts = [count for stage in (*self.stages, self.dense_dims) for count in stage]
        if not self.stages or not all(self.stages) or min(counts) < 1:
            raise ValueError(
                f"stages={self.stages} and dense_dims={self.dense_dims} must hold positive counts."
            )
        if self.image_size < 2 ** len(self.stages):
            raise ValueError(
                f"image_size={self.image_size} is halved {len(self.stages)} times; give at least "
                f"{2 ** len(self.stages)}."
            )


_STAGES = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
}


def vgg_config(depth: int, *, cifar: bool = False, **changes: Any) -> VggConfig:
    """Returns the config of VGG-11 or VGG-16; `cifar` is 32x32 images and no dense layers between.

    Raises:
      ValueError: another depth.
    """
    if depth not in _STAGES:
        raise ValueError(f"There is no VGG-{depth} here; give one of {sorted(_STAGES)}.")
    fields: dict[str, Any] = {"stages": _STAGES[depth]}
    if cifar:
        fields |= {"dense_dims": (), "image_size": 32, "num_classes": 10}
    return VggConfig(**(fields | changes))


class Vgg(nnx.Module):
    """Stages of convolutions and pooling; dense layers; the classifier."""

    def __init__(self, config: VggConfig, rngs: nnx.Rngs):
        kw: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        norm = "batch" if config.batch_norm else "none"
        inputs: Axis = ("channel", config.num_channels)
        for i, counts in enumerate(config.stages, 1):
            convs: list[nnx.Module] = []
            for j, count in enumerate(counts):
                outputs = (f"conv{i}_{j}", count)
                taps = f"kernel_conv{i}_{j}"
                convs.append(ConvNorm(inputs, outputs, 3, taps=taps, bias=True, norm=norm, **kw))
                inputs = outputs
            setattr(self, f"stage{i}", Sequence(convs))
        left = config.image_size // 2 ** len(config.stages)
        # The first kernel keeps the axes of the image, so that the last channels can be cut.
        axes: tuple[Axis, ...] = ((None, left), (None, left), inputs)
        for i, count in enumerate(config.dense_dims, 1):
            layer = Linear(axes, ((f"dense{i}", count),), bias=True, scale=2**0.5, **kw)
            setattr(self, f"dense{i}", layer)
            axes = ((f"dense{i}", count),)
        self.classifier = Linear(axes, (("class", config.num_classes),), bias=True, **kw)
        self.num_stages, self.num_dense = len(config.stages), len(config.dense_dims)

    def __call__(self, images: Array) -> Array:
        x = images
        for i in range(1, self.num_stages + 1):
            x = max_pool(getattr(self, f"stage{i}")(x), 2)
        for i in range(1, self.num_dense + 1):
            x = jax.nn.relu(getattr(self, f"dense{i}")(x))
        return self.classifier(x)


def vgg(config: VggConfig) -> Model:
    """A classifier: `apply(variables, images f32[B, S, S, C]) -> logits f32[B, num_classes]`."""
    return as_classifier(config, Vgg, config.image_size)
