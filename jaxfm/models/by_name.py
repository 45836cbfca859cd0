"""Image classifiers by the name of a family and a depth, sized for the images at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax

from jaxfm.model import Model
from jaxfm.models.families.clip import ClipConfig, Tower, clip
from jaxfm.models.families.cnn import CnnConfig, cnn, mlp
from jaxfm.models.families.decoder import DecoderConfig
from jaxfm.models.families.encoder import EncoderConfig
from jaxfm.models.families.resnet import resnet, resnet_config
from jaxfm.models.families.vgg import vgg, vgg_config
from jaxfm.models.families.vit import VitConfig, vit
from jaxfm.subnet import axis_sizes
from jaxfm.tokenizer import Tokenizer

ImageFamily = Literal[
    "cnn", "mlp", "vit", "resnet8", "resnet18", "resnet20", "resnet32", "resnet34", "resnet44",
    "resnet56", "resnet110", "vgg11", "vgg16",
]  # fmt: skip


def image_classifier(
    family: str,
    image_shape: tuple[int, ...],
    num_classes: int,
    *,
    dtype: str = "float32",
    **sizes: Any,
) -> Model:
    """Returns a classifier of small images or rows of numbers, of any size that its family takes.

    resnet* and vgg* are those for 32x32 images.

    Args:
      family: one of `ImageFamily`.
      image_shape: height, width and channels; for an mlp any shape, which it flattens.
      num_classes: number of logits.
      dtype: of parameters and computation; an mlp is always float32.
      **sizes: fields of `VitConfig`; ignored by the other families.
    Raises:
      ValueError: an unknown family, or images that the family cannot take.
    """
    if family == "mlp":
        return mlp((math.prod(image_shape), 200, num_classes))
    height, width, channels = image_shape
    common: dict[str, Any] = {"num_channels": channels, "num_classes": num_classes, "dtype": dtype}
    if family == "cnn":
        return cnn(CnnConfig(image_size=(height, width), **common))
    if family == "vit":
        patch = patch_size(height, width)
        return vit(
            VitConfig(
                image_size=(height, width), patch_size=(patch, patch), **common, **sizes
            )
        )  # fmt: skip
    if family not in get_args(ImageFamily):
        raise ValueError(
            f"family={family!r} is unknown; choose one of {', '.join(get_args(ImageFamily))}."
        )
    kind = family.rstrip("0123456789")
    depth = int(family.removeprefix(kind))
    if kind == "resnet":
        return resnet(resnet_config(depth, stem="cifar", **common))
    if height != width or height < 32:
        raise ValueError(
            f"The family {family} halves its images five times: it takes squares of 32x32 or "
            f"more, and these are {height}x{width}. Choose a resnet, or cnn."
        )
    return vgg(vgg_config(depth, cifar=True, image_size=height, **common))


def small_clip(
    examples: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    *,
    dtype: str = "float32",
    remat: bool = False,
    **sizes: int,
) -> Model:
    """Returns a CLIP for small captioned images, both of whose towers have the same sizes.

    Args:
      examples: leaves "image" [N, H, W, C] and "tokens" i32[N, T].
      tokenizer: of the captions.
      dtype, remat: as in `ClipConfig`.
      **sizes: fields of `Tower`.
    Raises:
      ValueError: a tokenizer without an end token.
    """
    if tokenizer is None or tokenizer.eos_id is None:
        raise ValueError("A caption ends in the tokenizer's eos_token, and this one has none.")
    (height, width, channels), tower = examples["image"].shape[1:], Tower(**sizes)
    patch = patch_size(height, width)
    return clip(
        ClipConfig(
            image=tower, text=tower, shared_dim=tower.embed_dim, image_size=(height, width),
            patch_size=(patch, patch), num_channels=channels, vocab_size=tokenizer.vocab_size,
            max_len=examples["tokens"].shape[1], eos_id=tokenizer.eos_id, activation="gelu",
            dtype=dtype, remat=remat,
        )
    )  # fmt: skip


def patch_size(height: int, width: int) -> int:
    """Returns the largest size of square patches that tile an image, up to an eighth of it."""
    largest = max(2, height // 8)
    return max(n for n in range(1, largest + 1) if height % n == 0 and width % n == 0)


def width_axes(model: Model) -> tuple[str, ...]:
    """Returns the axes that a narrower model of one of our families is cut along."""
    if isinstance(model.config, DecoderConfig | EncoderConfig | VitConfig):
        classifies = isinstance(model.config, EncoderConfig) and model.config.head == "classify"
        # Of a classifier, whose output it is not, the pooled vector is as wide as the stream.
        return ("embed", "mlp", "kv_heads", *(("pooled",) if classifies else ()))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    sizes = axis_sizes(shapes, model.axes)
    return tuple(sorted(sizes.keys() - {"input", "channel", "class"}))
