"""An encoder of source code that reads the dependence graph beside the tokens.

A pre-norm transformer with rotary positions whose attention sees all tokens. An edge (i, j, r) of
the graph does two things: it adds a learned bias of its relation to the score of query i and key
j, one for each head of each layer, and it tells token i that it has an edge of relation r. Without
edges, or with `num_relations=0`, it is a plain encoder. Inputs are a dict of
    tokens: i32[B, T];
    mask:   bool[B, T], true where there is a token;
    edges:  u8, u16 or i32[B, E, 3] of (i, j, r); relation 0 is no edge. Not read without relations.
Sources: Vaswani et al. 2017; Su et al. 2021 (rotary positions); Raffel et al. 2020, section 2.1
(scalar bias of a relative position for each head); Guo et al. 2021 (GraphCodeBERT), section 4.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxfm.layers import Embedding, Linear, Mlp, Norm, check_fields, check_length, param
from jaxfm.model import Array, Model, Variables, assemble, fold_layers, layers_of, part_of, split
from jaxfm.rotary import rotary_frequencies, rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeEncoderConfig:
    """The shape of an encoder of source code.

    Attributes:
      vocab_size: tokens.
      embed_dim, num_layers, num_heads, mlp_dim: widths and depth.
      max_len: longest input, in tokens.
      num_relations: kinds of edges, the absent one (0) included; 0 reads no graph.
      head: what is on top, and so the output:
        "classify": f32[B, num_classes], of the mean and the maximum over the tokens;
        "locate": {"classes": f32[B, num_classes], "tokens": f32[B, T]}, a logit of each token, too;
        "embed": f32[B, D], unit vectors.
      num_classes: of "classify" and "locate"; a regression has one.
      rope_theta: of rotary positions.
    """

    vocab_size: int
    embed_dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_dim: int = 256
    max_len: int = 512
    num_relations: int = 0
    head: Literal["classify", "locate", "embed"] = "classify"
    num_classes: int = 2
    rope_theta: float = 1000.0

    def __post_init__(self):
        check_fields(
            self,
            positive=("vocab_size", "embed_dim", "num_layers", "num_heads", "mlp_dim", "max_len",
                      "num_classes"),
            choices={"head": ("classify", "locate", "embed")},
        )  # fmt: skip
        if self.num_relations < 0:
            raise ValueError(f"num_relations must be 0 or more, got {self.num_relations}.")
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"embed_dim={self.embed_dim} must be a multiple of twice num_heads="
                f"{self.num_heads}, since rotary positions turn pairs."
            )


class CodeEmbedding(nnx.Module):
    """Token vectors, plus a vector of each relation that a token has an edge of."""

    def __init__(self, config: CodeEncoderConfig, rngs: nnx.Rngs):
        embed = ("embed", config.embed_dim)
        self.tokens = Embedding(("vocab", config.vocab_size), embed, stddev=0.5, rngs=rngs)
        if config.num_relations:
            self.relations = Embedding(("relation", config.num_relations), embed, rngs=rngs)
        self.num_relations = config.num_relations

    def __call__(self, tokens: Array, edges: Array | None = None) -> Array:
        x = self.tokens(tokens)
        if edges is None:
            return x
        rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
        present = jnp.zeros((*tokens.shape, self.num_relations), x.dtype)
        real = (edges[..., 2] > 0).astype(x.dtype)
        present = present.at[rows, edges[..., 0], edges[..., 2]].max(real)
        return x + present @ self.relations.table[...]


class GraphAttention(nnx.Module):
    """softmax(q k / sqrt(K) + bias of the edge) v over all tokens of a row."""

    def __init__(self, config: CodeEncoderConfig, rngs: nnx.Rngs):
        embed, heads = ("embed", config.embed_dim), ("heads", config.num_heads)
        size = config.embed_dim // config.num_heads
        qk, value = ("rotary_dim", size), ("v_dim", size)
        self.q = Linear((embed,), (heads, qk), rngs=rngs)
        self.k = Linear((embed,), (heads, qk), rngs=rngs)
        self.v = Linear((embed,), (heads, value), rngs=rngs)
        scale = (2 * config.num_layers) ** -0.5
        self.o = Linear((heads, value), (embed,), scale=scale, rngs=rngs)
        if config.num_relations:
            shape = (config.num_relations, config.num_heads)
            self.bias = param(jnp.zeros(shape), ("relation", "heads"))
        frequencies, _ = rotary_frequencies(size, config.rope_theta)
        self.frequencies = tuple(frequencies.tolist())

    def __call__(self, x: Array, seen: Array, edges: Array | None = None) -> Array:
        batch, length, _ = x.shape
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        turn = lambda y: rotate(y, positions, np.asarray(self.frequencies), 1.0)
        q, k, v = turn(self.q(x)), turn(self.k(x)), self.v(x)
        scores = jnp.einsum("bthk,bshk->bhts", q, k) * (q.shape[-1] ** -0.5)
        if edges is not None:
            rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
            bias = jnp.take(self.bias[...], edges[..., 2], axis=0)
            bias = jnp.where(edges[..., 2:] > 0, bias, 0.0)
            table = jnp.zeros((batch, length, length, bias.shape[-1]), x.dtype)
            table = table.at[rows, edges[..., 0], edges[..., 1]].add(bias)
            scores = scores + table.transpose(0, 3, 1, 2)
        scores = jnp.where(seen[:, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1)
        return self.o(jnp.einsum("bhts,bshk->bthk", weights, v))


class CodeBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: CodeEncoderConfig, rngs: nnx.Rngs):
        embed = ("embed", config.embed_dim)
        self.attention_norm = Norm(embed)
        self.attention = GraphAttention(config, rngs)
        self.mlp_norm = Norm(embed)
        self.mlp = Mlp(
            embed, ("mlp", config.mlp_dim), activation="silu", gated=True,
            out_scale=(2 * config.num_layers) ** -0.5, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: Array, seen: Array, edges: Array | None = None) -> Array:
        x = x + self.attention(self.attention_norm(x), seen, edges)
        return x + self.mlp(self.mlp_norm(x))


class CodeHead(nnx.Module):
    """The last norm, the mean and the maximum over a row's tokens, and what is read from them."""

    def __init__(self, config: CodeEncoderConfig, rngs: nnx.Rngs):
        embed, pooled = ("embed", config.embed_dim), ("pooled", 2 * config.embed_dim)
        self.norm = Norm(embed)
        self.kind = config.head
        outputs = config.embed_dim if config.head == "embed" else config.num_classes
        self.hidden = Linear((pooled,), (("hidden", config.embed_dim),), bias=True, rngs=rngs)
        self.out = Linear((("hidden", config.embed_dim),), (("class", outputs),), bias=True,
                          rngs=rngs)  # fmt: skip
        if config.head == "locate":
            self.token = Linear((embed,), ((None, 1),), bias=True, rngs=rngs)

    def __call__(self, x: Array, seen: Array) -> Any:
        x = self.norm(x)
        here = seen[..., None]
        count = jnp.maximum(seen.sum(1, keepdims=True), 1).astype(x.dtype)
        mean = jnp.where(here, x, 0.0).sum(1) / count
        most = jnp.where(here, x, jnp.finfo(x.dtype).min).max(1)
        most = jnp.where(seen.any(1, keepdims=True), most, 0.0)
        y = self.out(jax.nn.silu(self.hidden(jnp.concatenate([mean, most], axis=-1))))
        if self.kind == "embed":
            return y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + 1e-6)
        return {"classes": y, "tokens": self.token(x)[..., 0]} if self.kind == "locate" else y


def code_encoder(config: CodeEncoderConfig) -> Model:
    """Returns an encoder: `apply(variables, {"tokens", "mask", "edges"}) -> output` of `head`."""
    embedding = split(lambda rngs: CodeEmbedding(config, rngs))
    block = split(lambda rngs: CodeBlock(config, rngs))
    out = split(lambda rngs: CodeHead(config, rngs))
    init, axes, kernels = assemble(embedding, block, out, config.num_layers)

    def apply(variables: Variables, inputs: Mapping[str, Array], *, train=False, key=None):
        tokens = inputs["tokens"]
        check_length(tokens.shape[1], config.max_len)
        seen = inputs.get("mask", jnp.ones(tokens.shape, bool)).astype(bool)
        edges = inputs.get("edges") if config.num_relations else None
        edges = None if edges is None else edges.astype(jnp.int32)
        x = embedding.call(part_of(variables, "embed"), tokens, edges)[0]
        step = lambda x, layer, _: (block.call(layer, x, seen, edges)[0], None)
        x, _ = fold_layers(step, x, layers_of(variables))
        return out.call(part_of(variables, "head"), x, seen)[0], variables.stats

    return Model(init, apply, axes, config, kernels=kernels)
