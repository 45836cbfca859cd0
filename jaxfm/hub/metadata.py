"""What a Hugging Face folder says beside the function: token ids, names of labels, sampling.

A config of ours holds what changes the function. All else in config.json and the whole of
generation_config.json and of preprocessor_config.json are kept beside it, in `config.metadata`, so
that a model that is loaded and saved (cut or trained in between) loses nothing of them.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxfm.hub import config as hub_config

GENERATION = "generation_config.json"
PREPROCESSOR = "preprocessor_config.json"
_FILES = {"generation": GENERATION, "preprocessor": PREPROCESSOR}
# Fields of config.json that follow from ours, whatever they were before.
_OURS = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "num_labels",
    "hidden_act", "activation_function", "head_dim", "n_inner", "rope_theta", "rope_scaling",
    "rope_parameters", "original_max_position_embeddings", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "attention_bias", "image_size", "patch_size",
    "pooler_output_size", "quantization_config",
}  # fmt: skip


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      ValueError: the file holds no JSON object; the message names it.
    """
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; a JSON object is wanted.")
    return values


def read(folder: pathlib.Path, raw: Mapping[str, Any]) -> dict[str, dict]:
    """Returns what is kept of a folder whose config.json says `raw`."""
    ours = _OURS.union(*(fields.values() for fields in hub_config.FIELDS.values()))
    ours -= {"pad_token_id"}  # only encoders read it, and they say it again
    kept = {"config": {name: value for name, value in raw.items() if name not in ours}}
    return kept | {
        part: read_json(folder / file) for part, file in _FILES.items() if (folder / file).exists()
    }


def write(
    folder: pathlib.Path, fields: Mapping[str, Any], metadata: Mapping[str, dict], tokenizer: Any
) -> None:
    """Writes config.json, and the files that the metadata are of.

    Args:
      folder: an existing folder.
      fields: of the function.
      metadata: what `read` gave; may be empty.
      tokenizer: its special tokens are named where the metadata names none, or others.
    """
    from transformers import AutoConfig

    kept = dict(metadata.get("config", {}))
    if len(kept.get("id2label", ())) != fields.get("num_labels", 0):
        for name in ("id2label", "label2id"):
            kept.pop(name, None)
    merged = {**kept, **fields}
    for name in ("bos", "eos") if fields["model_type"] != "vit" else ():
        own, old = getattr(tokenizer, f"{name}_id", None), kept.get(f"{name}_token_id")
        merged[f"{name}_token_id"] = old if own is None or own in _listed(old) else own
    AutoConfig.for_model(**merged).save_pretrained(folder)
    for part, file in _FILES.items():
        if part in metadata:
            text = json.dumps(metadata[part], indent=2, sort_keys=True)
            (folder / file).write_text(text + "\n")


def named(metadata: Mapping[str, dict], classes: Sequence[str]) -> dict[str, dict]:
    """Returns the metadata with names for the classes, in the order of the logits."""
    names = {
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
    }
    return {**metadata, "config": {**metadata.get("config", {}), **names}}


def class_names(metadata: Mapping[str, dict]) -> tuple[str, ...]:
    """Returns the classes that a folder names, in the order of its logits; () where it has none."""
    names = metadata.get("config", {}).get("id2label") or {}
    known = {int(number): str(name) for number, name in names.items()}
    given = tuple(known[number] for number in sorted(known))
    return () if given == tuple(f"LABEL_{i}" for i in range(len(given))) else given


def pixel_scale(metadata: Mapping[str, dict]) -> tuple[list[float], list[float]] | None:
    """Returns mean and standard deviation of each channel of images in 0..1 that a model takes.

    None where the folder does not say that images are normalised.
    """
    own = metadata.get("preprocessor", {})
    if not own.get("do_normalize", True) or not {"image_mean", "image_std"} <= own.keys():
        return None
    return list(own["image_mean"]), list(own["image_std"])


def stop_tokens(config: Any) -> list[int]:
    """Returns the ids that end a text, by both files of the folder that a config came from."""
    kept = getattr(config, "metadata", {})
    parts = [_listed(kept.get(part, {}).get("eos_token_id")) for part in ("generation", "config")]
    tokens = [token for part in parts for token in part]
    if not all(isinstance(token, int) for token in tokens):
        raise ValueError(f"The model's files name eos_token_id {tokens}; ids are whole numbers.")
    return sorted(set(tokens))


def _listed(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
