"""Hugging Face folders and PyTorch checkpoints, read and written."""

from jaxfm.hub.folders import has_format, load, load_llama2c, save
from jaxfm.hub.torch_vision import load_torch, save_torch, to_torch

__all__ = [
    "has_format",
    "load",
    "load_llama2c",
    "load_torch",
    "save",
    "save_torch",
    "to_torch",
]
