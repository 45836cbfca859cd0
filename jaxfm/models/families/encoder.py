"""Bidirectional encoders: BERT, RoBERTa and their kin (MiniLM is a small BERT).

Post-norm transformers with learned positions. Inputs are a dict of
    tokens: i32[B, T];
    mask:   bool or i32[B, T], true where there is a token and false at padding; all by default;
    types:  i32[B, T] segments; zeros by default;
or of the names that a Hugging Face tokenizer gives them: input_ids, attention_mask, token_type_ids.
Sources: Devlin et al. 2019 (BERT), Liu et al. 2019 (RoBERTa), Wang et al. 2020 (MiniLM).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfm.layers import (
    ACTIVATIONS,
    Attention,
    Embedding,
    Linear,
    Mlp,
    Norm,
    check_fields,
    check_length,
    param,
)
from jaxfm.model import Array, Model, Variables, assemble, fold_layers, layers_of, part_of, split
from jaxfm.models.families.token_inputs import read_inputs
from jaxfm.virtual_tokens import (
    after,
    before,
    length_of,
    padded_before,
    prefix_length,
    prefix_of,
    seeing_prefix,
    virtual_vectors,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The shape of an encoder.

    Attributes:
      family: whose Hugging Face format it is saved in. RoBERTa counts positions of tokens that
        are not `pad_id`, from `pad_id + 1` on.
      vocab_size, num_types: tokens, and segment types.
      embed_dim, num_layers, num_heads, mlp_dim: widths and depth.
      head_dim: of attention; None means embed_dim // num_heads.
      max_len: rows of the table of positions (RoBERTa's inputs may be `pad_id + 1` shorter).
      pad_id: the padding token.
      activation, norm_eps: of the MLPs and the layer norms.
      head: what is on top, and so the output:
        "none": tokens [B, T, D];
        "pooler": {"tokens": [B, T, D], "pooled": [B, P]}, the first token's vector through a
          linear map and tanh;
        "masked_lm": logits f32[B, T, V], tied to the embedding;
        "classify": logits f32[B, num_classes] of the pooled vector;
        "tag": logits f32[B, T, num_classes] of each token.
      num_classes: of "classify" and "tag".
      attention_scale: factor on the scores; None means head_dim ** -0.5. A subnet keeps its
        parent's.
      dtype: of parameters and computation; norms, softmax and logits are float32.
      remat: recompute each layer in the backward pass instead of keeping it in memory.
      metadata: what the model's folder says beside its function (`jaxfm.hub.metadata`).
    """

    family: Literal["bert", "roberta"] = "bert"
    vocab_size: int
    num_types: int = 2
    embed_dim: int
    num_layers: int
    num_heads: int
    head_dim: int = None  # type: ignore[assignment]  # __post_init__ sets it
    mlp_dim: int
    max_len: int = 512
    pad_id: int = 0
    activation: str = "gelu"
    norm_eps: float = 1e-12
    head: Literal["none", "pooler", "masked_lm", "classify", "tag"] = "masked_lm"
    num_classes: int = 2
    attention_scale: float | None = None
    dtype: str = "float32"
    remat: bool = False
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.embed_dim // max(1, self.num_heads))
        check_fields(
            self,
            positive=("vocab_size", "num_types", "embed_dim", "num_layers", "num_heads", "head_dim",
                      "mlp_dim", "max_len", "num_classes"),
            choices={"activation": tuple(ACTIVATIONS), "family": ("bert", "roberta"),
                     "head": ("none", "pooler", "masked_lm", "classify", "tag")},
        )  # fmt: skip


class EncoderEmbedding(nnx.Module):
    """The norm of token, position and type vectors added up."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        embed, dtype = ("embed", config.embed_dim), jnp.dtype(config.dtype)
        kw = {"dtype": dtype, "rngs": rngs}
        self.tokens = Embedding(("vocab", config.vocab_size), embed, **kw)
        self.positions = Embedding(("position", config.max_len), embed, **kw)
        self.types = Embedding(("type", config.num_types), embed, **kw)
        self.norm = Norm(embed, kind="layer", eps=config.norm_eps, dtype=dtype)

    def __call__(
        self, tokens: Array, positions: Array, types: Array, virtual: Array | None = None
    ) -> Array:
        x = before(virtual, self.tokens(tokens))
        return self.norm(x + self.types(types) + self.positions(positions))


class EncoderBlock(nnx.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        embed, dtype = ("embed", config.embed_dim), jnp.dtype(config.dtype)
        norm: dict[str, Any] = {"kind": "layer", "eps": config.norm_eps, "dtype": dtype}
        self.attention = Attention(
            embed, num_heads=config.num_heads, num_kv_heads=config.num_heads,
            head_dim=config.head_dim, qkv_bias=True, out_bias=True, scale=config.attention_scale,
            dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.attention_norm = Norm(embed, **norm)
        self.mlp = Mlp(
            embed, ("mlp", config.mlp_dim), activation=config.activation, gated=False, bias=True,
            dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.mlp_norm = Norm(embed, **norm)

    def __call__(self, x: Array, mask: Array, prefix: Mapping[str, Array] | None = None) -> Array:
        x = self.attention_norm(x + self.attention(x, mask, prefix=prefix)[0])
        with jax.named_scope("mlp"):
            return self.mlp_norm(x + self.mlp(x))


class MaskedLmHead(nnx.Module):
    """A transform of each token, and logits by the transposed embedding plus a bias."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        embed, dtype = ("embed", config.embed_dim), jnp.dtype(config.dtype)
        self.transform = Linear((embed,), (embed,), bias=True, dtype=dtype, rngs=rngs)
        self.norm = Norm(embed, kind="layer", eps=config.norm_eps, dtype=dtype)
        self.bias = param(jnp.zeros((config.vocab_size,), dtype), ("vocab",))
        # RoBERTa's head always uses GELU.
        self.activation = "gelu" if config.family == "roberta" else config.activation

    def __call__(self, x: Array, table: Array) -> Array:
        x = self.norm(ACTIVATIONS[self.activation](self.transform(x)))
        logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
        return logits + self.bias[...].astype(jnp.float32)[None, None]


class PooledHead(nnx.Module):
    """tanh of a linear map of the first token, and a classifier of that for "classify"."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        # Not named "embed", so that a cut of the residual stream leaves the pooled vector whole.
        embed, pooled = ("embed", config.embed_dim), ("pooled", config.embed_dim)
        kw = {"bias": True, "dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.pooler = Linear((embed,), (pooled,), **kw)
        self.classifies = config.head == "classify"
        if self.classifies:
            self.classifier = Linear((pooled,), (("class", config.num_classes),), **kw)

    def __call__(self, x: Array) -> Array:
        pooled = jnp.tanh(self.pooler(x[:, 0]))
        return self.classifier(pooled).astype(jnp.float32) if self.classifies else pooled


class TagHead(nnx.Module):
    """A classifier of each token."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        embed, classes = ("embed", config.embed_dim), ("class", config.num_classes)
        dtype = jnp.dtype(config.dtype)
        self.classifier = Linear((embed,), (classes,), bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.classifier(x).astype(jnp.float32)


class _NoHead(nnx.Module):
    """The head of a model that has none."""


def encoder(config: EncoderConfig) -> Model:
    """Returns an encoder: `apply(variables, {"tokens", "mask", "types"}) -> output` of `head`."""
    heads: dict[str, Callable[..., nnx.Module]] = {
        "none": lambda config, rngs: _NoHead(), "masked_lm": MaskedLmHead, "tag": TagHead,
    }  # fmt: skip
    embedding = split(lambda rngs: EncoderEmbedding(config, rngs))
    block = split(lambda rngs: EncoderBlock(config, rngs))
    out = split(lambda rngs: heads.get(config.head, PooledHead)(config, rngs))
    init, axes, kernels = assemble(embedding, block, out, config.num_layers)
    spare = config.pad_id + 1 if config.family == "roberta" else 0

    def run_block(layer: Variables, x: Array, mask: Array) -> Array:
        prefix = prefix_of(layer)
        return block.call(layer, x, seeing_prefix(prefix, mask), prefix)[0]

    one_block = jax.checkpoint(run_block) if config.remat else run_block

    def apply(variables: Variables, inputs: Mapping[str, Array], *, train=False, key=None):
        tokens, seen, types = read_inputs(inputs)
        virtual = virtual_vectors(variables, tokens.shape[0])
        ahead, past = length_of(virtual), prefix_length(variables)
        check_length(tokens.shape[1], config.max_len - spare, ahead + past)
        positions = jnp.arange(past, past + ahead + tokens.shape[1], dtype=jnp.int32)[None]
        if config.family == "roberta":
            real = padded_before((tokens != config.pad_id).astype(jnp.int32), ahead, 1)
            positions = jnp.cumsum(real, axis=1) * real + config.pad_id
            positions = positions + past * real if past else positions
        seen, types = padded_before(seen, ahead, True), padded_before(types, ahead, 0)
        with jax.named_scope("embed"):
            x = embedding.call(part_of(variables, "embed"), tokens, positions, types, virtual)[0]
        step = lambda x, layer, _: (one_block(layer, x, seen[:, None]), None)
        x, _ = fold_layers(step, x, layers_of(variables))
        return head(variables, after(virtual, x)), variables.stats

    def head(variables: Variables, x: Array):
        if config.head == "none":
            return x
        table = variables.params["embed"]["tokens"]["table"]
        more = (table,) if config.head == "masked_lm" else ()
        with jax.named_scope("head"):
            y = out.call(part_of(variables, "head"), x, *more)[0]
        return {"tokens": x, "pooled": y} if config.head == "pooler" else y

    return Model(init, apply, axes, config, kernels=kernels)
