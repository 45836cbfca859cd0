"""Scripts in several real processes: the results of one process, and an end for all when one ends.

Each run is the same: 60 rounds of six clients, which hold rows of three numbers.
"""

import json
import signal

import numpy as np
import pytest
from jobs import start
from safetensors.numpy import load_file

from jaxfm.log import read_metrics

pytestmark = pytest.mark.slow

# A killed process reads the compilation cache and never writes it: an entry is not atomic.
KILLED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    rng = np.random.default_rng(0)
    label = np.arange(90) % 3
    points = np.eye(3)[label] + rng.normal(size=(90, 3)) / 3
    path = tmp_path_factory.mktemp("data") / "points.csv"
    rows = [",".join([*map(str, point), "abc"[c]]) for point, c in zip(points, label)]
    path.write_text("\n".join(["x,y,z,class", *rows]) + "\n")
    return [
        f"--data={path}", "--data.num_clients=6", "--local=sgd", "--local.learning_rate=0.1",
        "--cohort_size=4", "--rounds=60", "--eval_every=4", "--algorithm=scaffold",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """The folder of an uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    (process,) = start(1, "federate", *flags, f"--run_dir={folder}")
    assert process.end() == 0, process.said
    return folder


def assert_same_run(one, two):
    """Equal figures in every line and result, and equal models."""
    lines = [read_metrics(folder) for folder in (one, two)]
    results = [json.loads((f / "results.json").read_text())["federate"] for f in (one, two)]
    for kind in (*zip(*lines, strict=True), [r["test"] for r in results]):
        assert kind[0].keys() == kind[1].keys()
        for name in kind[0].keys() - {"time_s"}:
            np.testing.assert_allclose(kind[1][name], kind[0][name], 1e-5, 1e-5, err_msg=name)
    models = [load_file(folder / "model" / "model.safetensors") for folder in (one, two)]
    for name, leaf in models[0].items():
        np.testing.assert_allclose(models[1][name], leaf, 1e-5, 1e-5, err_msg=name)


def test_stopped_killed_and_gone_on_with_by_other_numbers_of_processes(flags, alone, tmp_path):
    flags = [*flags, f"--run_dir={tmp_path / 'run'}"]
    jobs = []
    try:
        jobs += (pair := start(2, "federate", *flags, "--heartbeat_s=10"))
        pair[0].wait_for("clients")  # both have met
        pair[1].signal(signal.SIGTERM)
        assert [process.end() for process in pair] == [75, 75], pair[0].said + pair[1].said
        for process in pair:
            assert "as SIGTERM asked; the same command goes on" in process.said
        assert "parameters on 2 devices" in pair[0].said
        assert "parameters" not in pair[1].said  # the first one speaks

        jobs += (single := start(1, "federate", *flags))
        single[0].wait_for("Round")
        single[0].signal(signal.SIGTERM)
        assert single[0].end() == 75, single[0].said

        jobs += (pair := start(2, "federate", *flags, "--heartbeat_s=10", **KILLED))
        pair[0].wait_for("Going on after round")
        pair[0].wait_for("Round")
        pair[1].signal(signal.SIGKILL)
        assert pair[1].end() == -signal.SIGKILL
        assert pair[0].end() != 0
        assert "Another process of this job has ended" in pair[0].said or (
            "another task died" in pair[0].said  # JAX's own sentence came first
        )

        jobs += (single := start(1, "federate", *flags))
        assert single[0].end() == 0, single[0].said
        assert "Going on after round" in single[0].said
    finally:
        for process in jobs:
            process.kill()
    assert_same_run(alone, tmp_path / "run")
