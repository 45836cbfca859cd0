"""Programs of clients in one process, compiled once for all of them."""

import functools

import jax
import pytest

from jaxfm.federated.remote import standalone


@functools.lru_cache
def _program(exported: bytes):
    return jax.jit(jax.export.deserialize(bytearray(exported)).call)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Clients whose steps are equal share the compiled one."""
    monkeypatch.setattr(standalone, "_program", lambda path: _program(path.read_bytes()))
