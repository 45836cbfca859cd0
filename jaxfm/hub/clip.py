"""CLIP in Hugging Face's words and back: its config, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxfm.hub.names import NameRule, Placement, linear, norm, placements, table
from jaxfm.models.families.clip import ClipConfig, Tower

_TOWER = {
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}


def _layers(tower: str) -> tuple[NameRule, ...]:
    layer = f"{tower}.encoder.layers.{{}}"
    return (
        *norm("layers.attention_norm", f"{layer}.layer_norm1"),
        *linear("layers.attention.q", f"{layer}.self_attn.q_proj", "dgrk", "grk"),
        *linear("layers.attention.k", f"{layer}.self_attn.k_proj", "dgk", "gk"),
        *linear("layers.attention.v", f"{layer}.self_attn.v_proj", "dgk", "gk"),
        *linear("layers.attention.o", f"{layer}.self_attn.out_proj", "grkd", "d"),
        *norm("layers.mlp_norm", f"{layer}.layer_norm2"),
        *linear("layers.mlp.up", f"{layer}.mlp.fc1", "df", "f"),
        *linear("layers.mlp.down", f"{layer}.mlp.fc2", "fd", "d"),
    )


# Axes as in `jaxfm.hub.names`; c is the shared vector.
_RULES = {
    "text": (
        *table("embed.tokens", "text_model.embeddings.token_embedding"),
        *table("embed.positions", "text_model.embeddings.position_embedding"),
        *_layers("text_model"),
        *norm("head.norm", "text_model.final_layer_norm"),
        *linear("head.score", "text_projection", "dc", "c"),
    ),
    "image": (
        NameRule("embed.class_token", "vision_model.embeddings.class_embedding", "d->d"),
        NameRule(
            "embed.positions", "vision_model.embeddings.position_embedding.weight", "nd->n,d"
        ),
        NameRule(
            "embed.patches.kernel", "vision_model.embeddings.patch_embedding.weight",
            "hwcd->d,c,h,w",
        ),
        *norm("embed.norm", "vision_model.pre_layrnorm"),
        *_layers("vision_model"),
        *norm("head.norm", "vision_model.post_layernorm"),
        *linear("head.classifier", "visual_projection", "dc", "c"),
    ),
}  # fmt: skip


def tensor_map(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Placement, ...]]:
    """Returns the tensors of a CLIP's file, of the shapes of its leaves by dotted path."""
    found: dict[str, tuple[Placement, ...]] = {
        "logit_scale": (Placement("scale", None, "->", (), (), 0),)
    }
    for tower, rules in _RULES.items():
        start = f"{tower}."
        own = {path[len(start) :]: x for path, x in shapes.items() if path.startswith(start)}
        for name, some in placements(rules, own).items():
            found[name] = tuple(place._replace(path=start + place.path) for place in some)
    return found


def from_hf(fields: Mapping[str, Any], activations: Mapping[str, str]) -> ClipConfig:
    """Returns our config of a Hugging Face config's fields.

    Args:
      fields: with "text_config" and "vision_config".
      activations: their names, and ours.
    Raises:
      ValueError: a feature that ours lacks.
    """
    text, image = fields["text_config"], fields["vision_config"]
    for name in ("hidden_act", "layer_norm_eps"):
        if text[name] != image[name]:
            raise ValueError(
                f"CLIPModel with {name}={text[name]} of the text and {image[name]} of the image "
                "tower is not supported."
            )
    if text["hidden_act"] not in activations:
        raise ValueError(
            f"The activation {text['hidden_act']!r} is not supported; known are "
            f"{', '.join(activations)}."
        )
    tower = lambda own: Tower(**{ours: own[theirs] for ours, theirs in _TOWER.items()})
    sides: dict[str, Any] = {
        name: (image[name], image[name]) if isinstance(image[name], int) else tuple(image[name])
        for name in ("image_size", "patch_size")
    }
    return ClipConfig(
        image=tower(image),
        text=tower(text),
        shared_dim=fields["projection_dim"],
        num_channels=image["num_channels"],
        vocab_size=text["vocab_size"],
        max_len=text["max_position_embeddings"],
        eos_id=text["eos_token_id"],
        activation=activations[text["hidden_act"]],
        norm_eps=text["layer_norm_eps"],
        log_scale=fields["logit_scale_init_value"],
        **sides,
    )


def to_hf(config: ClipConfig, activations: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields of a Hugging Face config, with `model_type` and `architectures`.

    Raises:
      ValueError: images or patches that are no squares, which the format cannot express.
    """
    for name in ("image_size", "patch_size"):
        height, width = getattr(config, name)
        if height != width:
            raise ValueError(f"The format of CLIPModel takes squares; {name} is {height}x{width}.")
    both = {
        "hidden_act": next(
            theirs for theirs, ours in activations.items() if ours == config.activation
        ),
        "layer_norm_eps": config.norm_eps,
        "projection_dim": config.shared_dim,
    }
    tower = lambda own: {theirs: getattr(own, ours) for ours, theirs in _TOWER.items()}
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "dtype": config.dtype,
        "projection_dim": config.shared_dim,
        "logit_scale_init_value": config.log_scale,
        "text_config": {
            **tower(config.text), **both, "model_type": "clip_text_model",
            "vocab_size": config.vocab_size, "max_position_embeddings": config.max_len,
            "eos_token_id": config.eos_id, "bos_token_id": None, "pad_token_id": None,
        },
        "vision_config": {
            **tower(config.image), **both, "model_type": "clip_vision_model",
            "image_size": config.image_size[0], "patch_size": config.patch_size[0],
            "num_channels": config.num_channels,
        },
    }  # fmt: skip
