"""Hugging Face and PEFT folders and PyTorch checkpoints, read and written."""

from jaxfm.hub.adapter_folders import load_adapter, save_adapter
from jaxfm.hub.fitting import Fitted, load_for, pretrained, reads_text
from jaxfm.hub.folders import has_format, load, load_llama2c, save
from jaxfm.hub.torch_vision import load_torch, save_torch, to_torch

__all__ = [
    "Fitted",
    "has_format",
    "load",
    "load_adapter",
    "load_for",
    "load_llama2c",
    "load_torch",
    "pretrained",
    "reads_text",
    "save",
    "save_adapter",
    "save_torch",
    "to_torch",
]
