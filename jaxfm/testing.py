"""Tiny models for tests: a few thousand parameters, a second to compile.

>>> import jax
>>> model = tiny_decoder(num_layers=1)
>>> variables = random_variables(model)
>>> model.apply(variables, jax.numpy.zeros((1, 4), int))[0].shape
(1, 4, 64)

Each takes changes of its config. The same changes give the same object, so that JAX compiles each
program once for all tests of a process.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Model, Variables
from jaxfm.models.families.cnn import CnnConfig, cnn
from jaxfm.models.families.decoder import DecoderConfig, decoder, gpt2_config
from jaxfm.models.families.encoder import EncoderConfig, encoder
from jaxfm.models.families.mobilenet import MobileNetConfig, mobilenet
from jaxfm.models.families.resnet import ResNetConfig, resnet
from jaxfm.models.families.shufflenet import ShuffleNetConfig, shufflenet
from jaxfm.models.families.vgg import VggConfig, vgg
from jaxfm.models.families.vit import VitConfig, vit

_SIZES: dict[str, Any] = {"embed_dim": 16, "num_layers": 2, "num_heads": 4, "mlp_dim": 24}


@functools.cache
def tiny_decoder(**changes: Any) -> Model:
    """Returns a Llama of 2 layers, width 16, 4 query heads over 2 key/value heads, 64 tokens."""
    sizes = {**_SIZES, "vocab_size": 64, "num_kv_heads": 2, "max_len": 64}
    return decoder(DecoderConfig(**(sizes | changes)))


@functools.cache
def tiny_gpt2(**changes: Any) -> Model:
    """Returns a GPT-2 of 2 layers, width 16, 4 heads, 64 tokens."""
    return decoder(gpt2_config(**({**_SIZES, "vocab_size": 64, "max_len": 64} | changes)))


@functools.cache
def tiny_encoder(**changes: Any) -> Model:
    """Returns a BERT of 2 layers, width 16, 4 heads, 64 tokens, with a masked-language head."""
    return encoder(EncoderConfig(**({**_SIZES, "vocab_size": 64, "max_len": 64} | changes)))


@functools.cache
def tiny_vit(**changes: Any) -> Model:
    """Returns a ViT of 2 layers, width 16, 4 heads: 8x8x3 images, 4x4 patches, 5 classes."""
    sizes = {**_SIZES, "image_size": 8, "patch_size": 4, "num_classes": 5}
    return vit(VitConfig(**(sizes | changes)))


@functools.cache
def tiny_cnn(**changes: Any) -> Model:
    """Returns the small CNN on 8x8x1 images with 4 and 6 channels, 12 units, 5 classes."""
    sizes: dict[str, Any] = {
        "image_size": (8, 8),
        "conv_channels": (4, 6),
        "dense_dim": 12,
        "num_classes": 5,
    }
    return cnn(CnnConfig(**(sizes | changes)))


@functools.cache
def tiny_resnet(**changes: Any) -> Model:
    """Returns a residual network of 2 stages of 2 and 1 blocks, 4 and 8 channels, 5 classes."""
    sizes: dict[str, Any] = {"depths": (2, 1), "widths": (4, 8), "num_groups": 2, "num_classes": 5}
    return resnet(ResNetConfig(**(sizes | changes)))


@functools.cache
def tiny_vgg(**changes: Any) -> Model:
    """Returns a VGG of 4 and 6 channels and 12 units on 8x8x3 images, 5 classes."""
    sizes: dict[str, Any] = {
        "stages": ((4,), (6, 6)),
        "dense_dims": (12,),
        "image_size": 8,
        "num_classes": 5,
    }
    return vgg(VggConfig(**(sizes | changes)))


@functools.cache
def tiny_mobilenet(version: int = 2, **changes: Any) -> Model:
    """Returns a MobileNet of 2 stages, 4 and 6 channels, 5 classes."""
    sizes: dict[str, Any] = {
        "rows": ((1, 4, 1, 1), (2 if version == 2 else 1, 6, 2, 2)),
        "stem_channels": 6,
        "stem_stride": 1,
        "last_channels": 10,
        "num_classes": 5,
    }
    return mobilenet(MobileNetConfig(version=version, **(sizes | changes)))


@functools.cache
def tiny_shufflenet(version: int = 2, **changes: Any) -> Model:
    """Returns a ShuffleNet of one stage of 2 blocks, 8 channels (v1: 16, 2 groups), 5 classes."""
    sizes: dict[str, Any] = {
        "depths": (2,),
        "widths": (8,) if version == 2 else (16,),
        "groups": 2,
        "stem_channels": 4,
        "stem": "cifar",
        "last_channels": 10,
        "num_classes": 5,
    }
    return shufflenet(ShuffleNetConfig(version=version, **(sizes | changes)))


def random_variables(model: Model, seed: int = 0) -> Variables:
    """Returns random variables, none at its constant of initialisation, so that every one matters.

    Drawn by NumPy from N(0, 0.3²), scales of norms around 1, running variances in [0.5, 1.5];
    unlike `model.init`, which takes seconds, this compiles nothing.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "var":
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32))
        centre = 1.0 if path[-1].key == "scale" else 0.0
        values = (centre + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32)
        return jnp.asarray(values).astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, shapes.params)
    stats = jax.tree_util.tree_map_with_path(draw, shapes.stats)
    frozen = jax.tree_util.tree_map_with_path(draw, shapes.frozen)
    ones = lambda tree: jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), tree)
    return Variables(params, stats, ones(shapes.live), frozen, ones(shapes.masks))
