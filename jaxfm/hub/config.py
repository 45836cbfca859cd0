"""Our configs in Hugging Face's words and back.

Fields that only differ in name stand in one table a family; what differs more (rope scaling,
sliding windows, biases) has a reader and a writer side by side. A feature that our models lack
raises an error that names it. Both spellings of rope are read: `rope_parameters` of transformers
5, `rope_scaling` and `rope_theta` of 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxfm.hub import clip as hub_clip
from jaxfm.models import ClipConfig, DecoderConfig, EncoderConfig, VitConfig
from jaxfm.models.families.decoder import gpt2_config
from jaxfm.rotary import RopeScaling

Config = DecoderConfig | EncoderConfig | VitConfig | ClipConfig

# Architecture -> model type and head.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", "causal"),
    "MistralForCausalLM": ("mistral", "causal"),
    "Qwen2ForCausalLM": ("qwen2", "causal"),
    "GPT2LMHeadModel": ("gpt2", "causal"),
    "LlamaForSequenceClassification": ("llama", "classify"),
    "MistralForSequenceClassification": ("mistral", "classify"),
    "Qwen2ForSequenceClassification": ("qwen2", "classify"),
    "GPT2ForSequenceClassification": ("gpt2", "classify"),
    "BertModel": ("bert", "pooler"),
    "BertForMaskedLM": ("bert", "masked_lm"),
    "BertForSequenceClassification": ("bert", "classify"),
    "BertForTokenClassification": ("bert", "tag"),
    "RobertaModel": ("roberta", "pooler"),
    "RobertaForMaskedLM": ("roberta", "masked_lm"),
    "RobertaForSequenceClassification": ("roberta", "classify"),
    "RobertaForTokenClassification": ("roberta", "tag"),
    "ViTModel": ("vit", "pooler"),
    "ViTForImageClassification": ("vit", "classify"),
    "CLIPModel": ("clip", "contrastive"),
}

_LAYERS = {
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}
_ROTARY = _LAYERS | {
    "vocab_size": "vocab_size",
    "num_kv_heads": "num_key_value_heads",
    "max_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
_ENCODER = _LAYERS | {
    "vocab_size": "vocab_size",
    "num_types": "type_vocab_size",
    "max_len": "max_position_embeddings",
    "pad_id": "pad_token_id",
    "norm_eps": "layer_norm_eps",
    "num_classes": "num_labels",
}
FIELDS = {
    "llama": _ROTARY | {"mlp_bias": "mlp_bias"},
    "mistral": _ROTARY,
    "qwen2": _ROTARY,
    "gpt2": {
        "vocab_size": "vocab_size",
        "embed_dim": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "max_len": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "tied": "tie_word_embeddings",
    },
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "vit": _LAYERS
    | {
        "num_channels": "num_channels",
        "norm_eps": "layer_norm_eps",
        "qkv_bias": "qkv_bias",
        "num_classes": "num_labels",
    },
}
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu",
}  # fmt: skip
# Fields that change the function, and the values for which they do not.
_FIXED: dict[str, tuple] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "num_experts": (0, 1, None),
    "num_local_experts": (0, 1, None),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "position_embedding_type": ("absolute", None),
    "pooler_act": ("tanh",),
    "pruned_heads": ({}, None),
}
_SIDES = ("image_size", "patch_size")
_SCORE = {"num_classes": "num_labels", "pad_id": "pad_token_id"}  # of decoders that classify


def from_hf(fields: Mapping[str, Any], architecture: str) -> Config:
    """Returns our config of a Hugging Face config's fields.

    Raises:
      ValueError: the architecture, or a feature of it, is not one of ours.
    """
    require_known(architecture)
    family, head = ARCHITECTURES[architecture]
    for name, allowed in _FIXED.items():
        if fields.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{architecture} with {name}={fields[name]!r} is not supported.")
    if family == "clip":
        return hub_clip.from_hf(fields, _ACTIVATIONS)
    own: dict[str, Any] = {
        ours: fields.get(theirs) if theirs == "pad_token_id" else fields[theirs]
        for ours, theirs in _field_names(family, head).items()
    }
    own["head"] = head
    if family not in ("gpt2", "vit"):
        own["family"] = family
    own["activation"] = _activation(fields)
    if family == "gpt2":
        return gpt2_config(**own, mlp_dim=fields.get("n_inner") or 4 * fields["n_embd"])
    if family == "vit":
        own["image_size"], own["patch_size"] = (_pair(fields[name]) for name in _SIDES)
        if head == "pooler" and fields.get("pooler_output_size") not in (None, own["embed_dim"]):
            raise ValueError(
                f"{architecture} with pooler_output_size={fields['pooler_output_size']} other than "
                f"hidden_size={own['embed_dim']} is not supported."
            )
        return VitConfig(**own)
    if family in ("bert", "roberta"):
        if head == "masked_lm" and not fields.get("tie_word_embeddings", True):
            raise ValueError(f"{architecture} with tie_word_embeddings=False is not supported.")
        return EncoderConfig(**own)
    own["head_dim"] = fields.get("head_dim")
    biased = family == "qwen2" or bool(fields.get("attention_bias", False))
    return DecoderConfig(
        **own,
        qkv_bias=biased,
        out_bias=biased and family != "qwen2",
        sliding_window=_window(fields, family),
        rope_theta=_rope(fields).get("rope_theta", fields.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(fields),
    )


def require_known(architecture: str) -> None:
    """Raises ValueError where the architecture is not one of ours."""
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"The architecture {architecture!r} is not supported; known are {known}.")


def architecture_of(family: str, head: str) -> str:
    """Returns the architecture of a family with a certain head.

    Raises:
      ValueError: the family is not one of ours, or has no such head.
    """
    found = [name for name, kind in ARCHITECTURES.items() if kind == (family, head)]
    if not found:
        known = sorted(kind for kind, own in ARCHITECTURES.values() if own == head)
        raise ValueError(
            f"A model of type {family!r} cannot have the head {head!r}; {', '.join(known)} can."
        )
    return found[0]


def to_hf(config: Config) -> dict[str, Any]:
    """Returns the fields of a Hugging Face config, with `model_type` and `architectures`.

    Raises:
      ValueError: the format cannot express this config.
    """
    if isinstance(config, ClipConfig):
        return hub_clip.to_hf(config, _ACTIVATIONS)
    family = "vit" if isinstance(config, VitConfig) else config.family
    head = config.head
    as_bare = "pooler" if head == "none" else head
    architecture = architecture_of(family, as_bare)
    names = _field_names(family, head)
    fields = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    activation = next(name for name, own in _ACTIVATIONS.items() if own == config.activation)
    fields["activation_function" if family == "gpt2" else "hidden_act"] = activation
    if isinstance(config, VitConfig):
        sides = {name: getattr(config, name) for name in _SIDES}
        fields |= {name: a if a == b else [a, b] for name, (a, b) in sides.items()}
    elif family == "gpt2":
        fields["n_inner"] = config.mlp_dim
    elif isinstance(config, DecoderConfig):
        fields |= _rotary_fields(config)
    _require_widths(config, family)
    _require_same(config, from_hf(fields, architecture), architecture)
    return fields | {"model_type": family, "architectures": [architecture], "dtype": config.dtype}


def _field_names(family: str, head: str) -> dict[str, str]:
    """Returns the fields that only differ in name, ours and theirs."""
    scores = head == "classify" and family in ("llama", "mistral", "qwen2", "gpt2")
    return FIELDS[family] | (_SCORE if scores else {})


def _require_widths(config: DecoderConfig | EncoderConfig | VitConfig, family: str) -> None:
    """Raises where the widths of attention are none that the family's classes can have."""
    if family == "llama" and config.embed_dim % config.num_heads:
        raise ValueError(
            f"A llama file needs embed_dim to be a multiple of num_heads; they are "
            f"{config.embed_dim} and {config.num_heads}. A model without biases can be saved with "
            "family='mistral'."
        )
    explicit = family in ("llama", "mistral", "qwen2")
    if not explicit and config.embed_dim != config.num_heads * config.head_dim:
        raise ValueError(
            f"A {family} file needs embed_dim = num_heads * head_dim; they are {config.embed_dim}, "
            f"{config.num_heads} and {config.head_dim}. Cut them together."
        )


def _rotary_fields(config: DecoderConfig) -> dict[str, Any]:
    """Returns the fields of the Llama family that differ in more than their name."""
    scaling = config.rope_scaling
    fields: dict[str, Any] = {
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else _scaling_fields(scaling),
    }
    if config.family == "llama":
        fields["attention_bias"] = config.qkv_bias
    if config.family in ("mistral", "qwen2"):
        fields["sliding_window"] = config.sliding_window
    if config.family == "qwen2":
        fields |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return fields


def _require_same(config: Config, read: Config, architecture: str) -> None:
    """Raises where what would be read back from the file differs from what is saved."""
    free = {"dtype", "remat", "attention_scale", "rope_scaling", "metadata"}
    if isinstance(config, EncoderConfig | VitConfig) and config.head == "none":
        free.add("head")  # a bare model without its pooler
    fields = [field.name for field in dataclasses.fields(config) if field.name not in free]
    pairs = {name: (getattr(config, name), getattr(read, name)) for name in fields}
    wrong = [f"{name}={own!r} (it means {theirs!r})" for name, (own, theirs) in pairs.items()
             if own != theirs]  # fmt: skip
    if wrong:
        raise ValueError(f"The format of {architecture} cannot express {', '.join(wrong)}.")


def _activation(fields: Mapping[str, Any]) -> str:
    name = fields.get("hidden_act", fields.get("activation_function"))
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"The activation {name!r} is not supported; known are {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def _pair(size: int | list[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _window(fields: Mapping[str, Any], family: str) -> int | None:
    """Returns how many positions each layer sees; Qwen2 states it for each layer."""
    if family == "llama":
        return None
    window = fields.get("sliding_window")
    if family == "mistral" or window is None or not fields.get("use_sliding_window", False):
        return window if family == "mistral" else None
    full = min(fields["max_window_layers"], fields["num_hidden_layers"])
    kinds = fields.get("layer_types") or (
        ["full_attention"] * full + ["sliding_attention"] * (fields["num_hidden_layers"] - full)
    )
    if len(set(kinds)) > 1:
        raise ValueError(
            f"Layers of different attention (layer_types={list(kinds)}) are not supported; all "
            "must slide, or none."
        )
    return window if kinds[0] == "sliding_attention" else None


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    return fields.get("rope_parameters") or fields.get("rope_scaling") or {}


def _rope_scaling(fields: Mapping[str, Any]) -> RopeScaling | None:
    rope = _rope(fields)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise ValueError(
            f"Rotary positions on a part of each head (partial_rotary_factor="
            f"{rope['partial_rotary_factor']}) are not supported."
        )
    if kind == "default":
        return None
    for name, value in rope.items():
        if name.endswith(("factor", "beta_fast", "beta_slow")) and isinstance(value, str):
            raise ValueError(f"The rope's {name}={value!r} should be a number.")
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"Rope of type {kind!r} is not supported; linear, llama3 and yarn are.")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(rope["factor"]))
    name = "original_max_position_embeddings"
    # The top level comes first: transformers puts a default in the inner place.
    original = fields.get(name) or rope.get(name) or fields["max_position_embeddings"]
    shared: dict[str, Any] = {
        "kind": kind,
        "factor": float(rope["factor"]),
        "original_max_len": original,
    }
    if kind == "llama3":
        shared |= {name: float(rope[name]) for name in ("low_freq_factor", "high_freq_factor")}
        return RopeScaling(**shared)
    attention_factor = rope.get("attention_factor")
    if attention_factor is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        grow = lambda scale: 0.1 * scale * math.log(max(shared["factor"], 1.0)) + 1.0
        attention_factor = grow(rope["mscale"]) / grow(rope["mscale_all_dim"])
    return RopeScaling(
        **shared,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        attention_factor=attention_factor,
        truncate=rope.get("truncate", True),
    )


def _scaling_fields(scaling: RopeScaling) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        fields["original_max_position_embeddings"] = scaling.original_max_len
    if scaling.kind == "llama3":
        names = ["low_freq_factor", "high_freq_factor"]
        fields |= {name: getattr(scaling, name) for name in names}
    if scaling.kind == "yarn":
        names = ["beta_fast", "beta_slow", "truncate"]
        fields |= {name: getattr(scaling, name) for name in names}
        if scaling.attention_factor is not None:
            fields["attention_factor"] = float(scaling.attention_factor)
    return fields
