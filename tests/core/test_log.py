"""Laws of run logs: each step once, valid JSON whatever the values, silence without a terminal."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm import log
from jaxfm.log import RunLog, progress, read_metrics


def write_steps(folder, steps, **options):
    with RunLog(folder, tensorboard=False, **options) as run:
        for step in steps:
            run.write(step, {"loss": step / 2})


@pytest.mark.smoke
def test_written_is_read(tmp_path):
    with RunLog(tmp_path) as run:
        run.write(1, {"loss": jnp.float32(0.5), "tier/full": np.ones((1,)), "count": jnp.int32(3)})
        run.write(2, {"loss": jnp.bfloat16(0.25), "done": True})
    first, second = read_metrics(tmp_path)
    assert first.pop("time_s") <= second.pop("time_s")
    assert first == {"step": 1, "loss": 0.5, "tier/full": 1.0, "count": 3}
    assert second == {"step": 2, "loss": 0.25, "done": 1}


def test_a_resumed_curve_has_each_step_once(tmp_path):
    write_steps(tmp_path, range(6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    write_steps(tmp_path, range(4, 8), resume_step=3)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["loss"] for line in lines] == [step / 2 for step in range(8)]


def test_a_new_run_starts_an_empty_curve(tmp_path):
    write_steps(tmp_path, range(3))
    write_steps(tmp_path, [0])
    assert [line["step"] for line in read_metrics(tmp_path)] == [0]
    assert read_metrics(tmp_path / "nowhere") == []


def test_what_is_not_finite_is_valid_json(tmp_path):
    with RunLog(tmp_path) as run:
        run.write(0, {"a": math.nan, "b": jnp.inf, "c": -np.inf})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=refuse)
    assert (line["a"], line["b"], line["c"]) == ("nan", "inf", "-inf")
    values = read_metrics(tmp_path)[0]
    assert math.isnan(values["a"]) and values["b"] == math.inf and values["c"] == -math.inf


@pytest.mark.parametrize("value", ["high", jnp.zeros((2,)), None])
def test_what_is_not_a_number_is_refused(tmp_path, value):
    with RunLog(tmp_path) as run, pytest.raises(TypeError, match="metric 'loss' is"):
        run.write(0, {"loss": value})
    assert read_metrics(tmp_path) == []


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with RunLog(tmp_path) as run:
        run.write(3, {"loss": 0.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(log.jax, "process_index", lambda: 1)
    write_steps(tmp_path / "run", range(3))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_quiet_where_nobody_looks(monkeypatch, terminal):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", screen)
    assert list(progress(range(3), "rounds")) == [0, 1, 2]
    assert ("rounds" in screen.getvalue()) == terminal
