"""Vision transformers: an image as a sequence of patches with a class token before it.

Pre-norm, learned positions. Inputs are f32[B, H, W, C]. Source: Dosovitskiy et al. 2021.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxfm.layers import ACTIVATIONS, Attention, Linear, Mlp, Norm, check_fields, param
from jaxfm.model import Array, Model, Variables, assemble, fold_layers, layers_of, part_of, split
from jaxfm.virtual_tokens import after, before, prefix_of, seeing_prefix, virtual_vectors


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
    """The shape of a vision transformer.

    Attributes:
      image_size: (height, width) in pixels; one number stands for a square.
      patch_size: of a patch, likewise; pixels beyond the last whole patch are dropped.
      num_channels: of the image.
      embed_dim, num_layers, num_heads, mlp_dim: widths and depth.
      head_dim: of attention; None means embed_dim // num_heads.
      activation, norm_eps, qkv_bias: of the layers.
      patch_bias, head_bias: whether the map of patches and that of the head have a bias.
      pre_norm: a norm of what goes into the first layer (CLIP).
      head: what is on top, and so the output:
        "none": tokens [B, 1 + N, D], the class token first;
        "pooler": {"tokens": [B, 1 + N, D], "pooled": [B, P]}, the class token through a linear
          map and tanh;
        "classify": logits f32[B, num_classes] of the class token.
      num_classes: of "classify".
      attention_scale: factor on the scores; None means head_dim ** -0.5. A subnet keeps its
        parent's.
      dtype: of parameters and computation; norms, softmax and logits are float32.
      remat: recompute each layer in the backward pass instead of keeping it in memory.
      metadata: what the model's folder says beside its function (`jaxfm.hub.metadata`).
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    embed_dim: int
    num_layers: int
    num_heads: int
    head_dim: int = None  # type: ignore[assignment]  # __post_init__ sets it
    mlp_dim: int
    activation: str = "gelu"
    norm_eps: float = 1e-12
    qkv_bias: bool = True
    patch_bias: bool = True
    head_bias: bool = True
    pre_norm: bool = False
    head: Literal["none", "pooler", "classify"] = "classify"
    num_classes: int = 2
    attention_scale: float | None = None
    dtype: str = "float32"
    remat: bool = False
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            pair = (size, size) if isinstance(size, int) else tuple(size)
            if len(pair) != 2:
                raise ValueError(f"{name} must be one number or (height, width), got {size}.")
            object.__setattr__(self, name, pair)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.embed_dim // max(1, self.num_heads))
        check_fields(
            self,
            positive=("num_channels", "embed_dim", "num_layers", "num_heads", "head_dim",
                      "mlp_dim", "num_classes"),
            choices={"activation": tuple(ACTIVATIONS), "head": ("none", "pooler", "classify")},
        )  # fmt: skip
        if min(self.patch_size) < 1 or min(self.grid) < 1:
            raise ValueError(
                f"An image of {self.image_size} pixels holds no patch of {self.patch_size}."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Returns how many patches an image has, down and across."""
        (height, width), (down, across) = self.image_size, self.patch_size
        return height // down, width // across


class PatchEmbedding(nnx.Module):
    """A linear map of each patch, a class token before them, and position vectors added."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs):
        embed, dtype = ("embed", config.embed_dim), jnp.dtype(config.dtype)
        down, across = config.patch_size
        patch = (None, down), (None, across), ("channel", config.num_channels)
        self.patches = Linear(patch, (embed,), bias=config.patch_bias, dtype=dtype, rngs=rngs)
        rows = 1 + config.grid[0] * config.grid[1]
        positions = jax.random.normal(rngs.params(), (rows, config.embed_dim)) * 0.02
        self.class_token = param(jnp.zeros((config.embed_dim,), dtype), ("embed",))
        self.positions = param(positions.astype(dtype), ("position", "embed"))
        self.grid, self.patch_size = config.grid, config.patch_size
        if config.pre_norm:
            self.norm = Norm(embed, kind="layer", eps=config.norm_eps, dtype=dtype)
        self.pre_norm = config.pre_norm

    def __call__(self, images: Array) -> Array:
        batch, channels = images.shape[0], images.shape[3]
        (rows, columns), (down, across) = self.grid, self.patch_size
        x = images[:, : rows * down, : columns * across].astype(self.class_token[...].dtype)
        x = x.reshape(batch, rows, down, columns, across, channels).transpose(0, 1, 3, 2, 4, 5)
        x = self.patches(x.reshape(batch, rows * columns, down, across, channels))
        first = lax.broadcast_in_dim(self.class_token[...], (batch, 1, x.shape[2]), (2,))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...][None]
        return self.norm(x) if self.pre_norm else x


class VitBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); every token sees every other."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs):
        embed, dtype = ("embed", config.embed_dim), jnp.dtype(config.dtype)
        out_scale = (2 * config.num_layers) ** -0.5  # keeps the residual stream's variance at init
        norm: dict[str, Any] = {"kind": "layer", "eps": config.norm_eps, "dtype": dtype}
        self.attention_norm = Norm(embed, **norm)
        self.attention = Attention(
            embed, num_heads=config.num_heads, num_kv_heads=config.num_heads,
            head_dim=config.head_dim, qkv_bias=config.qkv_bias, out_bias=True, out_scale=out_scale,
            scale=config.attention_scale, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.mlp_norm = Norm(embed, **norm)
        self.mlp = Mlp(
            embed, ("mlp", config.mlp_dim), activation=config.activation, gated=False, bias=True,
            out_scale=out_scale, dtype=dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: Array, prefix: Mapping[str, Array] | None = None) -> Array:
        mask = seeing_prefix(prefix, jnp.ones((1, 1, x.shape[1]), bool))
        x = x + self.attention(self.attention_norm(x), mask, prefix=prefix)[0]
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x))


class VitHead(nnx.Module):
    """The last norm, and for "pooler" and "classify" a linear map of the class token."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs):
        embed, dtype = ("embed", config.embed_dim), jnp.dtype(config.dtype)
        kw = {"bias": config.head_bias, "dtype": dtype, "rngs": rngs}
        self.norm = Norm(embed, kind="layer", eps=config.norm_eps, dtype=dtype)
        if config.head == "pooler":
            # Not named "embed", so that a cut of the stream leaves the pooled vector whole.
            self.pooler = Linear((embed,), (("pooled", config.embed_dim),), **kw)
        if config.head == "classify":
            self.classifier = Linear((embed,), (("class", config.num_classes),), **kw)
        self.head = config.head

    def __call__(self, x: Array):
        x = self.norm(x)
        if self.head == "classify":
            return self.classifier(x[:, 0]).astype(jnp.float32)
        if self.head == "pooler":
            return {"tokens": x, "pooled": jnp.tanh(self.pooler(x[:, 0]))}
        return x


def vit(config: VitConfig) -> Model:
    """Returns a ViT: `apply(variables, images f32[B, H, W, C]) -> output` of `config.head`."""
    embedding = split(lambda rngs: PatchEmbedding(config, rngs))
    block = split(lambda rngs: VitBlock(config, rngs))
    out = split(lambda rngs: VitHead(config, rngs))
    init, axes, kernels = assemble(embedding, block, out, config.num_layers)
    expected = (*config.image_size, config.num_channels)

    def run_block(layer: Variables, x: Array) -> Array:
        return block.call(layer, x, prefix_of(layer))[0]

    one_block = jax.checkpoint(run_block) if config.remat else run_block

    def apply(variables: Variables, images: Array, *, train: bool = False, key=None):
        if images.shape[1:] != expected:
            raise ValueError(
                f"The images have shape {images.shape}; this model takes [B, H, W, C] = "
                f"[B, {', '.join(map(str, expected))}]."
            )
        with jax.named_scope("embed"):
            x = embedding.call(part_of(variables, "embed"), images)[0]
        virtual = virtual_vectors(variables, images.shape[0])
        x = before(virtual, x)
        x, _ = fold_layers(lambda x, layer, _: (one_block(layer, x), None), x, layers_of(variables))
        with jax.named_scope("head"):
            return out.call(part_of(variables, "head"), after(virtual, x))[0], variables.stats

    return Model(init, apply, axes, config, kernels=kernels)
