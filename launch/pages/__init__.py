"""The sections of reports; importing this registers them all."""

from jaxfm.launch.pages import decoding, federated, search

__all__ = ["decoding", "federated", "search"]
