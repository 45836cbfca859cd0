"""Causal decoders: the Llama family (Llama, Mistral, Qwen2, SmolLM) and GPT-2.

Language models, or classifiers of texts by the last token. One pre-norm decoder with a few typed
switches. Equal layers are stacked and run by one scan; the parts of a language model are also given
singly (`Model.stages`), so that decoders can cache and pipelines can cut.
Sources: Touvron et al. 2023 (Llama), Jiang et al. 2023 (Mistral), Yang et al. 2024 (Qwen2),
Radford et al. 2019 (GPT-2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

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
    causal_mask,
    check_fields,
    check_length,
)
from jaxfm.model import (
    Array,
    Model,
    Past,
    Stages,
    Variables,
    assemble,
    fold_layers,
    layers_of,
    part_of,
    split,
)
from jaxfm.models.families.token_inputs import read_inputs
from jaxfm.rotary import RopeScaling, rotary_frequencies
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

Config = TypeVar("Config", bound=Any)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder.

    Attributes:
      family: whose Hugging Face format it is saved in.
      vocab_size: tokens.
      embed_dim: width of the residual stream.
      num_layers, num_heads: depth, and query heads.
      num_kv_heads: key/value heads, of which num_heads is a multiple; None means
        num_heads.
      head_dim: of each head; None means embed_dim // num_heads.
      mlp_dim: hidden width of each MLP.
      max_len: longest context, in tokens; the size of the table for learned positions.
      activation, gated: of the MLP.
      norm, norm_eps: "rms" or "layer".
      positions: "rotary" or "learned".
      rope_theta, rope_scaling: of rotary positions.
      sliding_window: number of latest positions that a token sees; None means all.
      qkv_bias, out_bias, mlp_bias: which linear maps have a bias.
      tied: the head is the transposed embedding.
      head: what is on top, and so the input and the output:
        "causal": tokens i32[B, T] to logits f32[B, T, V];
        "classify": a dict of tokens and a mask, as encoders take it, to logits f32[B, num_classes]
          of the last token that the mask shows and that is not `pad_id`.
      num_classes, pad_id: of "classify".
      attention_scale: factor on the scores; None means head_dim ** -0.5. A subnet keeps its
        parent's.
      dtype: of the parameters and the computation; norms, softmax and logits are float32.
      remat: recompute each layer in the backward pass instead of keeping it in memory.
      metadata: what the model's folder says beside its function (`jaxfm.hub.metadata`).
    """

    family: Literal["llama", "mistral", "qwen2", "gpt2"] = "llama"
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = None  # type: ignore[assignment]  # __post_init__ sets them
    head_dim: int = None  # type: ignore[assignment]
    mlp_dim: int
    max_len: int = 2048
    activation: str = "silu"
    gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    head: Literal["causal", "classify"] = "causal"
    num_classes: int = 2
    pad_id: int | None = None
    attention_scale: float | None = None
    dtype: str = "float32"
    remat: bool = False
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.embed_dim // max(1, self.num_heads))
        check_fields(
            self,
            positive=("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads",
                      "head_dim", "mlp_dim", "max_len", "num_classes"),
            choices={"activation": tuple(ACTIVATIONS), "norm": ("rms", "layer"),
                     "positions": ("rotary", "learned"),
                     "family": ("llama", "mistral", "qwen2", "gpt2"),
                     "head": ("causal", "classify")},
        )  # fmt: skip
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}."
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"Rotary positions need an even head_dim, got {self.head_dim}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}.")


def gpt2_config(**sizes) -> DecoderConfig:
    """Returns a `DecoderConfig` with GPT-2's switches; `sizes` are its remaining fields."""
    switches: dict[str, Any] = {
        "family": "gpt2", "activation": "gelu_tanh", "gated": False, "norm": "layer",
        "positions": "learned", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "tied": True,
    }  # fmt: skip
    return DecoderConfig(**(switches | sizes))


class TokenEmbedding(nnx.Module):
    """Token vectors, plus position vectors where positions are learned."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        embed, dtype = ("embed", config.embed_dim), jnp.dtype(config.dtype)
        self.tokens = Embedding(("vocab", config.vocab_size), embed, dtype=dtype, rngs=rngs)
        if config.positions == "learned":
            self.positions = Embedding(("position", config.max_len), embed, dtype=dtype, rngs=rngs)
        self.learned = config.positions == "learned"

    def __call__(self, tokens: Array, positions: Array, virtual: Array | None = None) -> Array:
        x = before(virtual, self.tokens(tokens))
        return x + self.positions(positions) if self.learned else x


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        embed, dtype = ("embed", config.embed_dim), jnp.dtype(config.dtype)
        out_scale = (2 * config.num_layers) ** -0.5  # keeps the residual stream's variance at init
        norm: dict[str, Any] = {"kind": config.norm, "eps": config.norm_eps, "dtype": dtype}
        rotary = None
        if config.positions == "rotary":
            rotary = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.attention_norm = Norm(embed, **norm)
        self.attention = Attention(
            embed, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim, qkv_bias=config.qkv_bias, out_bias=config.out_bias,
            out_scale=out_scale, scale=config.attention_scale, rotary=rotary, dtype=dtype,
            rngs=rngs,
        )  # fmt: skip
        self.mlp_norm = Norm(embed, **norm)
        self.mlp = Mlp(
            embed, ("mlp", config.mlp_dim), activation=config.activation, gated=config.gated,
            bias=config.mlp_bias, out_scale=out_scale, dtype=dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(
        self, x: Array, positions: Array, mask: Array, past: Past | None = None,
        prefix: Mapping[str, Array] | None = None,
    ):  # fmt: skip
        mixed, rows = self.attention(self.attention_norm(x), mask, positions, past, prefix)
        x = x + mixed
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x)), rows


class Head(nnx.Module):
    """The last norm and the map to logits; with tied weights it is given the embedding."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        embed, dtype = ("embed", config.embed_dim), jnp.dtype(config.dtype)
        self.norm = Norm(embed, kind=config.norm, eps=config.norm_eps, dtype=dtype)
        self.classifies = config.head == "classify"
        if self.classifies:
            self.score = Linear((embed,), (("class", config.num_classes),), dtype=dtype, rngs=rngs)
        elif not config.tied:
            vocab = ("vocab", config.vocab_size)
            self.out = Linear((embed,), (vocab,), dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, table: Array | None = None) -> Array:
        x = self.norm(x)
        if self.classifies:
            return self.score(x).astype(jnp.float32)
        if table is None:
            return self.out(x).astype(jnp.float32)
        return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)


def decoder(config: DecoderConfig) -> Model:
    """Returns a causal LM: `apply(variables, tokens i32[B, T]) -> logits f32[B, T, V]`.

    With the head "classify" a classifier: `apply(variables, {"tokens", "mask"}) -> f32[B, C]`.
    """
    embedding = split(lambda rngs: TokenEmbedding(config, rngs))
    block = split(lambda rngs: Block(config, rngs))
    out = split(lambda rngs: Head(config, rngs))

    init, axes, kernels = assemble(embedding, block, out, config.num_layers)

    def embed(
        variables: Variables, tokens: Array, positions: Array, virtual: Array | None = None
    ) -> Array:
        if ahead := prefix_length(variables):
            positions = positions + ahead
        with jax.named_scope("embed"):
            return embedding.call(part_of(variables, "embed"), tokens, positions, virtual)[0]

    def run_block(
        layer: Variables, x: Array, positions: Array, mask: Array, past: Past | None = None
    ):
        prefix = prefix_of(layer)
        if prefix is not None:
            mask = seeing_prefix(prefix, mask, positions, config.sliding_window)
            positions = positions + prefix["k"].shape[-3]
        return block.call(layer, x, positions, mask, past, prefix)[0]

    def head(variables: Variables, x: Array) -> Array:
        shares = config.tied and config.head == "causal"
        table = variables.params["embed"]["tokens"]["table"] if shares else None
        with jax.named_scope("head"):
            return out.call(part_of(variables, "head"), x, table)[0]

    one_block = jax.checkpoint(run_block) if config.remat else run_block

    def stream(variables: Variables, tokens: Array, seen: Array | None = None) -> Array:
        virtual = virtual_vectors(variables, tokens.shape[0])
        ahead, past = length_of(virtual), prefix_length(variables)
        if config.positions == "learned":
            check_length(tokens.shape[1], config.max_len, ahead + past)
        positions = jnp.arange(ahead + tokens.shape[1], dtype=jnp.int32)[None]
        mask = causal_mask(positions, positions, config.sliding_window)
        if seen is not None:
            seen = padded_before(seen, ahead, True)
            mask = mask & seen[:, None]
            if ahead or past:  # tokens follow virtual ones, though padding stands between
                positions = jnp.maximum(jnp.cumsum(seen, axis=1, dtype=jnp.int32) - 1, 0)
        step = lambda x, layer, _: (one_block(layer, x, positions, mask)[0], None)
        x = embed(variables, tokens, positions, virtual)
        return after(virtual, fold_layers(step, x, layers_of(variables))[0])

    def apply(variables: Variables, tokens: Array, *, train: bool = False, key=None):
        return head(variables, stream(variables, tokens)), variables.stats

    def classify(variables: Variables, inputs: Mapping[str, Array], *, train=False, key=None):
        tokens, seen, _ = read_inputs(inputs)
        last = _last(tokens, seen, config.pad_id)
        x = stream(variables, tokens, seen)
        chosen = jnp.einsum("bt,btd->bd", last.astype(x.dtype), x)
        return head(variables, chosen), variables.stats

    if config.head == "classify":
        return Model(init, classify, axes, config, kernels=kernels)
    return Model(init, apply, axes, config, Stages(embed, run_block, head), kernels)


def _last(tokens: Array, seen: Array, pad_id: int | None) -> Array:
    """Returns bool[B, T], true at the last token that is no padding; at the first if all are."""
    real = seen if pad_id is None else seen & (tokens != pad_id)
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return places == jnp.max(jnp.where(real, places, 0), axis=1, keepdims=True)


def resized(config: Config, sizes: Mapping[str, int]) -> Config:
    """Returns the config of a subnet whose axes have `sizes` (`jaxfm.axis_sizes` of its variables).

    Args:
      config: of the whole model; a decoder, encoder or vision transformer.
      sizes: by axis name.
    Raises:
      ValueError: keys and values of an attention head have different sizes.
    """
    head_dim = sizes.get("rotary_dim", sizes.get("qk_dim"))
    if sizes["v_dim"] != head_dim:
        raise ValueError(
            f"Keys have head dim {head_dim} and values {sizes['v_dim']}; a model has one head_dim."
        )
    changes = {
        "embed_dim": sizes["embed"],
        "num_layers": sizes["layer"],
        "num_heads": sizes["kv_heads"] * sizes["q_per_kv"],
        "head_dim": head_dim,
        "mlp_dim": sizes["mlp"],
        "attention_scale": config.attention_scale or config.head_dim**-0.5,
    }
    if hasattr(config, "num_kv_heads"):
        changes["num_kv_heads"] = sizes["kv_heads"]
    return dataclasses.replace(config, **changes)
