"""Settings of the federated tests."""

import jax
import numpy as np
import pytest
from federated_worker import finish, launch


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """The programs here run for milliseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """What a run of `federated_worker` ends with in one process on one device."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out.npz"
    finish(launch(out))
    return np.load(out)
