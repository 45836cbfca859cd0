"""CLIP: a text and an image tower whose vectors lie close together where the two belong together.

    logits[i, j] = exp(scale) cos(f(image_i), g(text_j))

The image tower is a ViT whose class token is projected, the text tower a causal transformer whose
vector is that of the text's first end token. Both are this library's own (`vit`, `decoder`), under
the names "image" and "text" in the parameters. Source: Radford et al. 2021 (Learning transferable
visual models from natural language supervision), section 2 and figure 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxfm.layers import check_fields
from jaxfm.model import Array, Key, Model, Variables, is_axes
from jaxfm.models.families.decoder import decoder, gpt2_config
from jaxfm.models.families.vit import VitConfig, vit

LARGEST_ID = 2  # an eos_id that old files have: the end token is then the one of the largest id


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """Width and depth of a tower: embed_dim, num_layers, num_heads, mlp_dim."""

    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int

    def __post_init__(self):
        check_fields(self, positive=tuple(f.name for f in dataclasses.fields(self)), choices={})
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The shape of a CLIP.

    Attributes:
      image, text: the towers.
      shared_dim: of the vectors that are compared.
      image_size, patch_size, num_channels: as in `VitConfig`.
      vocab_size, max_len: tokens, and the longest text.
      eos_id: the token at whose first place a text is read; 2 stands for the largest id in the
        text, as in transformers.
      activation, norm_eps: of both towers.
      log_scale: the scale at the start; its exponential is at most 100.
      dtype, remat, metadata: as in `VitConfig`.
    """

    image: Tower
    text: Tower
    shared_dim: int
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (32, 32)
    num_channels: int = 3
    vocab_size: int = 49408
    max_len: int = 77
    eos_id: int = 49407
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    log_scale: float = 2.6592
    dtype: str = "float32"
    remat: bool = False
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        check_fields(self, positive=("shared_dim", "vocab_size", "max_len"), choices={})
        vision = self.vision  # checks the sides, too
        object.__setattr__(self, "image_size", vision.image_size)
        object.__setattr__(self, "patch_size", vision.patch_size)
        if not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(
                f"eos_id={self.eos_id} is no token of a vocabulary of {self.vocab_size}."
            )

    @property
    def vision(self) -> VitConfig:
        """The image tower as a ViT that "classifies" into the shared vector."""
        return VitConfig(
            **dataclasses.asdict(self.image), image_size=self.image_size,
            patch_size=self.patch_size, num_channels=self.num_channels,
            activation=self.activation, norm_eps=self.norm_eps, patch_bias=False, head_bias=False,
            pre_norm=True, num_classes=self.shared_dim, dtype=self.dtype, remat=self.remat,
        )  # fmt: skip

    @property
    def language(self) -> Any:
        """The text tower as a decoder that "classifies" into the shared vector."""
        return gpt2_config(
            **dataclasses.asdict(self.text), vocab_size=self.vocab_size, max_len=self.max_len,
            activation=self.activation, norm_eps=self.norm_eps, head="classify",
            num_classes=self.shared_dim, dtype=self.dtype, remat=self.remat,
        )  # fmt: skip


def clip(config: ClipConfig) -> Model:
    """Returns a CLIP, for `jaxfm.tasks.contrastive`.

    `apply(variables, {"image" f32[A, H, W, C], "tokens" i32[B, T]})` returns {"image" f32[A, P],
    "text" f32[B, P], both of length 1, "scale" f32[]}.
    """
    towers = {"image": vit(config.vision), "text": decoder(config.language)}

    def join(parts: Mapping[str, Variables], scale: Any) -> Variables:
        collected = {
            field: {
                name: getattr(part, field) for name, part in parts.items() if getattr(part, field)
            }
            for field in Variables._fields
        }
        collected["params"]["scale"] = scale
        return Variables(**collected)

    def init(key: Key) -> Variables:
        keys = jax.random.split(key, len(towers))
        parts = {
            name: tower.init(own) for (name, tower), own in zip(towers.items(), keys, strict=True)
        }
        return join(parts, jnp.asarray(config.log_scale, config.dtype))

    def encode(name: str, variables: Variables, inputs: Any, **mode: Any) -> Array:
        own = Variables(*(part.get(name, {}) for part in variables))
        x = towers[name].apply(own, inputs, **mode)[0]
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def apply(variables: Variables, inputs: Mapping[str, Array], *, train=False, key=None):
        tokens = inputs["tokens"]
        texts = {"tokens": tokens, "mask": _until_end(tokens, config.eos_id)}
        scale = jnp.minimum(jnp.exp(variables.params["scale"].astype(jnp.float32)), 100.0)
        return {
            "image": encode("image", variables, inputs["image"], train=train, key=key),
            "text": encode("text", variables, texts, train=train, key=key),
            "scale": scale,
        }, variables.stats

    # A tower's widths are its own; "layer" keeps its name, by which stacks are known.
    named = {
        name: jax.tree.map(
            lambda axes, name=name: tuple(
                axis if axis in (None, "layer") else f"{name}_{axis}" for axis in axes
            ),
            tower.axes,
            is_leaf=is_axes,
        )
        for name, tower in towers.items()
    }
    kernels = {(name, *path): n for name, own in towers.items() for path, n in own.kernels.items()}
    return Model(init, apply, join(named, ()), config, kernels=kernels)


def zero_shot(model: Model, captions: Array) -> Model:
    """A CLIP as a classifier of images: `apply(variables, images) -> logits f32[B, K]`.

    Args:
      model: of `clip`, also with an adapter.
      captions: i32[K, T], a text for each class.
    """

    def apply(variables: Variables, images: Array, *, train: bool = False, key=None):
        texts = {"image": images, "tokens": jnp.asarray(captions)}
        output, stats = model.apply(variables, texts, train=train, key=key)
        return output["scale"] * output["image"] @ output["text"].T, stats

    return model._replace(apply=apply)


def _until_end(tokens: Array, eos_id: int) -> Array:
    """bool[B, T], true up to the end token; only the first place where a text has none."""
    last = jnp.argmax(tokens if eos_id == LARGEST_ID else tokens == eos_id, axis=1)
    return jnp.arange(tokens.shape[1])[None] <= last[:, None]
