"""A run that is killed and started again ends where an uninterrupted one ends."""

import random
import time

import numpy as np
import pytest
from federated_worker import finish, launch


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_bits(tmp_path, uninterrupted):
    moments = random.Random(4)
    out, options = tmp_path / "out.npz", ("--folder", tmp_path / "checkpoints")
    # A killed process reads the compilation cache and never writes it: an entry is not atomic.
    cautious = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    for life in range(3):
        process = launch(out, *options, **cautious)
        # While it saves for the second time (the first save is whole by then); at last anywhere.
        wanted, times = ("rounds on", 1) if life == 2 else ("saved", 2)
        while times:
            line = process.stdout.readline()
            assert line, "it ended before it was to be killed"
            times -= line.startswith(wanted)
        time.sleep(moments.uniform(0, 1.0 if life == 2 else 0.1))
        process.kill()
        process.communicate()
        assert not out.exists(), "it had ended before it was killed"
    assert "resumed at round" in finish(launch(out, *options, **cautious))
    ended = np.load(out)
    for name in ended.files:
        np.testing.assert_array_equal(ended[name], uninterrupted[name], err_msg=name)


@pytest.mark.slow
def test_what_two_devices_saved_one_device_goes_on_with(tmp_path, uninterrupted):
    out, folder = tmp_path / "out.npz", tmp_path / "checkpoints"
    finish(launch(out, "--folder", folder, "--calls", 2, "--devices", 2))
    printed = finish(launch(out, "--folder", folder, "--devices", 1))
    assert "resumed at round 4" in printed
    ended = np.load(out)
    for name in ended.files:
        np.testing.assert_allclose(
            ended[name], uninterrupted[name], rtol=1e-5, atol=1e-5, err_msg=name
        )
