"""The sections of reports; importing this registers them all."""

from jaxfm.launch.pages import continual, decoding, federated, prompts, search

__all__ = ["continual", "decoding", "federated", "prompts", "search"]
