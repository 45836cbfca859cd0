"""A pipe whose stages are processes of their own, joined by `jax.distributed` on loopback."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from jaxfm.parallel import generate, plain
from jaxfm.testing import random_variables, tiny_decoder

WORKER = pathlib.Path(__file__).with_name("pipe_worker.py")


def start(*options):
    """The two stages, each with its output in a pipe."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), coordinator, str(process), *options],
            env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in (0, 1)
    ]  # fmt: skip


def finish(processes, timeout_s=240):
    try:
        return [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_a_stage_a_process_gives_plain_decodings_tokens():
    model = tiny_decoder(num_layers=3)
    variables = random_variables(model)
    expected = generate(plain(model, variables), [[1, 2, 3, 4, 5]], max_new_tokens=24).tokens[0]
    for printed in finish(start()):
        assert f"tokens {expected.tolist()} ticks" in printed, printed[-3000:]


@pytest.mark.slow
def test_a_stage_that_dies_ends_the_others_within_seconds():
    survivor, dying = start("--die")
    # It ends itself after its first piece; compiling comes before that.
    assert dying.wait(timeout=240) == 7
    died = time.monotonic()
    (printed,) = finish([survivor], timeout_s=60)
    assert survivor.returncode != 0
    assert time.monotonic() - died < 60
    assert "tokens" not in printed.splitlines()[-1]
    assert any(word in printed for word in ("heartbeat", "Connection", "peer", "coordinat")), (
        printed
    )
