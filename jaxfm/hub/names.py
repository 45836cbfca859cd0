"""What each parameter is called in Hugging Face files, and how its axes lie there.

One table per family, read in both directions: names, shapes and values of the file follow from a
rule and the shape of our leaf. The layout of a rule is written like an einsum, with axes of the
file between commas: "dgrk->grk,d" is our q kernel [D, G, R, K] stored as a matrix [G*R*K, D].
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class NameRule(NamedTuple):
    """What one kind of leaf is called in a file.

    Attributes:
      path: of our leaf, joined by dots; leaves under "layers" have a leading axis of layers, which
        the layout leaves out.
      name: of the tensor in the file; {} stands for the number of the layer.
      layout: "our axes->axes of the file, each a product of some of ours".
      part: which of the equal leaves that lie side by side on the last axis of one tensor.
    """

    path: str
    name: str
    layout: str
    part: int = 0


def linear(path: str, name: str, ours: str, outputs: str) -> tuple[NameRule, ...]:
    """Returns the rules of PyTorch's Linear, whose weight is [outputs, inputs]."""
    inputs = "".join(axis for axis in ours if axis not in outputs)
    return (
        NameRule(f"{path}.kernel", f"{name}.weight", f"{ours}->{outputs},{inputs}"),
        NameRule(f"{path}.bias", f"{name}.bias", f"{outputs}->{outputs}"),
    )


def conv1d(path: str, name: str, ours: str, outputs: str, part: int = 0) -> tuple[NameRule, ...]:
    """Returns the rules of GPT-2's Conv1D, whose weight is [inputs, outputs]."""
    inputs = "".join(axis for axis in ours if axis not in outputs)
    return (
        NameRule(f"{path}.kernel", f"{name}.weight", f"{ours}->{inputs},{outputs}", part),
        NameRule(f"{path}.bias", f"{name}.bias", f"{outputs}->{outputs}", part),
    )


def norm(path: str, name: str) -> tuple[NameRule, ...]:
    """Returns the rules of a layer norm, or of an RMS norm, which has no bias."""
    return NameRule(f"{path}.scale", f"{name}.weight", "d->d"), NameRule(
        f"{path}.bias", f"{name}.bias", "d->d"
    )


def table(path: str, name: str) -> tuple[NameRule, ...]:
    """Returns the rule of an embedding."""
    return (NameRule(f"{path}.table", f"{name}.weight", "vd->v,d"),)


# Axes: d embed, g kv_heads, r q_per_kv, k head dim, f mlp, v vocab, p pooled, c class or channel.
LLAMA = (
    *table("embed.tokens", "model.embed_tokens"),
    *norm("layers.attention_norm", "model.layers.{}.input_layernorm"),
    *linear("layers.attention.q", "model.layers.{}.self_attn.q_proj", "dgrk", "grk"),
    *linear("layers.attention.k", "model.layers.{}.self_attn.k_proj", "dgk", "gk"),
    *linear("layers.attention.v", "model.layers.{}.self_attn.v_proj", "dgk", "gk"),
    *linear("layers.attention.o", "model.layers.{}.self_attn.o_proj", "grkd", "d"),
    *norm("layers.mlp_norm", "model.layers.{}.post_attention_layernorm"),
    *linear("layers.mlp.gate", "model.layers.{}.mlp.gate_proj", "df", "f"),
    *linear("layers.mlp.up", "model.layers.{}.mlp.up_proj", "df", "f"),
    *linear("layers.mlp.down", "model.layers.{}.mlp.down_proj", "fd", "d"),
    *norm("head.norm", "model.norm"),
    *linear("head.out", "lm_head", "dv", "v"),
    *linear("head.score", "score", "dc", "c"),
)

GPT2 = (
    *table("embed.tokens", "transformer.wte"),
    *table("embed.positions", "transformer.wpe"),
    *norm("layers.attention_norm", "transformer.h.{}.ln_1"),
    *conv1d("layers.attention.q", "transformer.h.{}.attn.c_attn", "dgrk", "grk", part=0),
    *conv1d("layers.attention.k", "transformer.h.{}.attn.c_attn", "dgk", "gk", part=1),
    *conv1d("layers.attention.v", "transformer.h.{}.attn.c_attn", "dgk", "gk", part=2),
    *conv1d("layers.attention.o", "transformer.h.{}.attn.c_proj", "grkd", "d"),
    *norm("layers.mlp_norm", "transformer.h.{}.ln_2"),
    *conv1d("layers.mlp.up", "transformer.h.{}.mlp.c_fc", "df", "f"),
    *conv1d("layers.mlp.down", "transformer.h.{}.mlp.c_proj", "fd", "d"),
    *norm("head.norm", "transformer.ln_f"),
    *linear("head.out", "lm_head", "dv", "v"),
    *linear("head.score", "score", "dc", "c"),
)


def _encoder(base: str, *head: NameRule) -> tuple[NameRule, ...]:
    layer = f"{base}.encoder.layer.{{}}"
    return (
        *table("embed.tokens", f"{base}.embeddings.word_embeddings"),
        *table("embed.positions", f"{base}.embeddings.position_embeddings"),
        *table("embed.types", f"{base}.embeddings.token_type_embeddings"),
        *norm("embed.norm", f"{base}.embeddings.LayerNorm"),
        *linear("layers.attention.q", f"{layer}.attention.self.query", "dgrk", "grk"),
        *linear("layers.attention.k", f"{layer}.attention.self.key", "dgk", "gk"),
        *linear("layers.attention.v", f"{layer}.attention.self.value", "dgk", "gk"),
        *linear("layers.attention.o", f"{layer}.attention.output.dense", "grkd", "d"),
        *norm("layers.attention_norm", f"{layer}.attention.output.LayerNorm"),
        *linear("layers.mlp.up", f"{layer}.intermediate.dense", "df", "f"),
        *linear("layers.mlp.down", f"{layer}.output.dense", "fd", "d"),
        *norm("layers.mlp_norm", f"{layer}.output.LayerNorm"),
        *head,
    )


_BERT_POOLER = linear("head.pooler", "bert.pooler.dense", "dp", "p")
# The transform's two axes are both "embed"; its letters only tell input (d) from output (e).
BERT = {
    "none": _encoder("bert"),
    "pooler": _encoder("bert", *_BERT_POOLER),
    "masked_lm": _encoder(
        "bert",
        *linear("head.transform", "cls.predictions.transform.dense", "de", "e"),
        *norm("head.norm", "cls.predictions.transform.LayerNorm"),
        NameRule("head.bias", "cls.predictions.bias", "v->v"),
    ),
    "classify": _encoder(
        "bert", *_BERT_POOLER, *linear("head.classifier", "classifier", "pc", "c")
    ),
    "tag": _encoder("bert", *linear("head.classifier", "classifier", "dc", "c")),
}
ROBERTA = {
    "none": _encoder("roberta"),
    "pooler": _encoder("roberta", *linear("head.pooler", "roberta.pooler.dense", "dp", "p")),
    "masked_lm": _encoder(
        "roberta",
        *linear("head.transform", "lm_head.dense", "de", "e"),
        *norm("head.norm", "lm_head.layer_norm"),
        NameRule("head.bias", "lm_head.bias", "v->v"),
    ),
    "classify": _encoder(
        "roberta",
        *linear("head.pooler", "classifier.dense", "dp", "p"),
        *linear("head.classifier", "classifier.out_proj", "pc", "c"),
    ),
    "tag": _encoder("roberta", *linear("head.classifier", "classifier", "dc", "c")),
}

VIT = (
    NameRule("embed.class_token", "vit.embeddings.cls_token", "d->,,d"),
    NameRule("embed.positions", "vit.embeddings.position_embeddings", "nd->,n,d"),
    NameRule(
        "embed.patches.kernel", "vit.embeddings.patch_embeddings.projection.weight", "hwcd->d,c,h,w"
    ),
    NameRule("embed.patches.bias", "vit.embeddings.patch_embeddings.projection.bias", "d->d"),
    *norm("layers.attention_norm", "vit.encoder.layer.{}.layernorm_before"),
    *linear("layers.attention.q", "vit.encoder.layer.{}.attention.attention.query", "dgrk", "grk"),
    *linear("layers.attention.k", "vit.encoder.layer.{}.attention.attention.key", "dgk", "gk"),
    *linear("layers.attention.v", "vit.encoder.layer.{}.attention.attention.value", "dgk", "gk"),
    *linear("layers.attention.o", "vit.encoder.layer.{}.attention.output.dense", "grkd", "d"),
    *norm("layers.mlp_norm", "vit.encoder.layer.{}.layernorm_after"),
    *linear("layers.mlp.up", "vit.encoder.layer.{}.intermediate.dense", "df", "f"),
    *linear("layers.mlp.down", "vit.encoder.layer.{}.output.dense", "fd", "d"),
    *norm("head.norm", "vit.layernorm"),
    *linear("head.pooler", "vit.pooler.dense", "dp", "p"),
    *linear("head.classifier", "classifier", "dc", "c"),
)

# Modules of transformers 5 that its files know by the older name: (part of a name, what it became).
MODULES = {
    "vit": (
        ("encoder.layer.", "layers."),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ),
}

# Tensors that files hold besides the parameters. Buffers follow from the config, whatever their
# dtype; copies of tied weights must equal the original; heads of other tasks have no use here.
_BUFFERS = re.compile(
    r"rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$|\.attn\.(masked_)?bias$"
    r"|position_ids$|token_type_ids$"
)
COPIES = {
    "lm_head.weight": ("embed_tokens.weight", "wte.weight"),
    "lm_head.decoder.weight": ("embeddings.word_embeddings.weight",),
    "lm_head.decoder.bias": ("lm_head.bias",),
    "cls.predictions.decoder.weight": ("embeddings.word_embeddings.weight",),
    "cls.predictions.decoder.bias": ("cls.predictions.bias",),
}
_UNUSED = re.compile(r"^cls\.seq_relationship\.|^pooler\.dense\.|^embeddings\.mask_token$")


def is_buffer(short: str) -> bool:
    """Returns whether a tensor, by its name without prefix, follows from the config."""
    return bool(_BUFFERS.search(short))


def is_unused(short: str) -> bool:
    """Returns whether a tensor, by its name without prefix, belongs to a head of another task."""
    return bool(_UNUSED.search(short))


class Placement(NamedTuple):
    """Where one leaf, or one layer of it, lies.

    Attributes:
      path, layer: our leaf, and which row of its axis of layers; None where it has none.
      layout: of the rule.
      leaf_shape, shape: ours (of one layer), and what it takes up in the file.
      part: its place among the placements of one tensor.
    """

    path: str
    layer: int | None
    layout: str
    leaf_shape: tuple[int, ...]
    shape: tuple[int, ...]
    part: int


def placements(
    rules: tuple[NameRule, ...], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Placement, ...]]:
    """Returns the tensors of a file by name, each with the leaves that it holds side by side."""
    found: dict[str, list[Placement]] = {}
    for rule in rules:
        if rule.path not in shapes:
            continue
        shape = shapes[rule.path]
        layered = rule.path.startswith("layers.")
        for layer in range(shape[0]) if layered else (None,):
            own = shape[1:] if layered else shape
            placement = Placement(
                path=rule.path,
                layer=layer,
                layout=rule.layout,
                leaf_shape=own,
                shape=_file_shape(rule.layout, own),
                part=rule.part,
            )
            found.setdefault(rule.name.format(layer), []).append(placement)
    return {name: tuple(sorted(some, key=lambda p: p.part)) for name, some in found.items()}


def tensor_shape(some: tuple[Placement, ...]) -> tuple[int, ...]:
    """Returns the shape of a tensor of these placements; a number stands alone."""
    if not some[0].shape:
        return ()
    return *some[0].shape[:-1], sum(placement.shape[-1] for placement in some)


def to_file(placement: Placement, leaf: np.ndarray) -> np.ndarray:
    """Returns our leaf (of one layer) in the layout of the file."""
    ours, groups = axes_of(placement.layout)
    order = [ours.index(axis) for group in groups for axis in group]
    return leaf.transpose(order).reshape(placement.shape)


def from_file(placement: Placement, some: tuple[Placement, ...], tensor: np.ndarray) -> np.ndarray:
    """Returns our leaf (of one layer) out of the tensor that holds `some` placements."""
    if not placement.shape:
        return tensor
    start = sum(other.shape[-1] for other in some if other.part < placement.part)
    own = tensor[..., start : start + placement.shape[-1]]
    ours, groups = axes_of(placement.layout)
    order = [ours.index(axis) for group in groups for axis in group]
    return own.reshape([placement.leaf_shape[i] for i in order]).transpose(np.argsort(order))


def axes_of(layout: str) -> tuple[str, list[str]]:
    """Returns our axes, and those of ours that each axis of the file is a product of."""
    ours, theirs = layout.split("->")
    return ours, theirs.split(",") if theirs else []


def _file_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    ours, groups = axes_of(layout)
    return tuple(math.prod(shape[ours.index(axis)] for axis in group) for group in groups)
