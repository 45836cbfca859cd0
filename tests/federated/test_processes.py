"""The same run in two processes, joined by `jax.distributed`, and in one."""

import socket
import time

import numpy as np
import pytest
from federated_worker import finish, launch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("--home",)], ids=["all have all", "each has only its own clients"]
)
def test_two_processes_agree_with_one(tmp_path, uninterrupted, options):
    joined = tmp_path / "joined.npz"
    coordinator = f"localhost:{free_port()}"
    pair = [launch(joined, "--coordinator", coordinator, "--process", p, *options) for p in (0, 1)]
    try:
        while all(process.poll() is None for process in pair):
            time.sleep(0.05)
        for process in sorted(pair, key=lambda p: p.poll() is None):  # first to end, first to tell
            assert "rounds on 2 devices of 2 processes" in finish(process)
    finally:
        for process in pair:
            process.kill()
            process.wait()
    one, two = uninterrupted, np.load(joined)
    assert one.files == two.files and "own accuracy" in one.files
    for name in one.files:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)
