"""Settings of the federated tests."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """The programs here run for milliseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
