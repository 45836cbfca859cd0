"""Scripts in several real processes: the results of one process, and an end for all when one ends.

What one process does is done in this one.
"""

import json
import signal

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from jobs import start
from safetensors.numpy import load_file

from jaxfm import hub
from jaxfm.config import define_flags, read_command
from jaxfm.launch import continual, federate, generate, pretrain
from jaxfm.launch.federate_config import FederateConfig
from jaxfm.log import read_metrics
from jaxfm.testing import random_variables, tiny_decoder
from jaxfm.tokenizer import ByteTokenizer

pytestmark = pytest.mark.slow

# A killed process reads the compilation cache and never writes it: an entry is not atomic.
KILLED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags of six clients, which hold rows of three numbers."""
    rng = np.random.default_rng(0)
    label = np.arange(180) % 3
    points = np.eye(3)[label] + rng.normal(size=(180, 3)) / 3
    path = tmp_path_factory.mktemp("data") / "points.csv"
    rows = [",".join([*map(str, point), "abc"[c]]) for point, c in zip(points, label)]
    path.write_text("\n".join(["x,y,z,class", *rows]) + "\n")
    return [
        f"--data={path}", "--data.num_clients=6", "--local=sgd", "--local.learning_rate=0.1"
    ]  # fmt: skip


def run_here(main, cls, flags):
    values = absl_flags.FlagValues()
    define_flags(cls, values)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        main(read_command(cls, ["script", *map(str, flags)], values))


def run_job(count, script, *flags):
    """What so many processes said that ended well."""
    job = start(count, script, *flags)
    try:
        ends = [process.end() for process in job]
        assert ends == [0] * count, "".join(process.said for process in job)
    finally:
        for process in job:
            process.kill()
    return [process.said for process in job]


def assert_same_run(one, two):
    """Equal figures in every line and result, and equal models."""
    lines = [read_metrics(folder) for folder in (one, two)]
    results = [json.loads((f / "results.json").read_text()) for f in (one, two)]
    part = "federate" if "federate" in results[0] else "pretrain"
    for kind in (*zip(*lines, strict=True), [r[part]["test"] for r in results]):
        assert kind[0].keys() == kind[1].keys()
        for name in kind[0].keys() - {"time_s"}:
            np.testing.assert_allclose(kind[1][name], kind[0][name], 1e-5, 1e-5, err_msg=name)
    models = [load_file(folder / "model" / "model.safetensors") for folder in (one, two)]
    for name, leaf in models[0].items():
        np.testing.assert_allclose(models[1][name], leaf, 1e-5, 1e-5, err_msg=name)


def test_stopped_killed_and_gone_on_with_by_other_numbers_of_processes(data, tmp_path):
    flags = [*data, "--cohort_size=4", "--rounds=60", "--eval_every=4", "--algorithm=scaffold"]
    run_here(federate.main, FederateConfig, [*flags, f"--run_dir={tmp_path / 'alone'}"])
    flags.append(f"--run_dir={tmp_path / 'run'}")
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
    assert_same_run(tmp_path / "alone", tmp_path / "run")


@pytest.mark.parametrize("count", [2, 4])
def test_a_model_that_two_processes_hold_together(tmp_path, count):
    """Of four, two hold one client's and two another's."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text("".join(f"{i} times {number}. " for i in range(150)))
    flags = [
        f"--data={texts}", "--data.length=24", "--data.num_clients=4", "--cohort_size=2",
        "--rounds=2", "--eval_every=1", "--max_steps=2", "--batch_size=2", "--local=sgd",
        "--local.momentum=0.5", "--model.embed_dim=16", "--model.num_layers=1",
        "--model.num_heads=2", "--model.mlp_dim=16",
    ]  # fmt: skip
    run_here(federate.main, FederateConfig, [*flags, f"--run_dir={tmp_path / 'alone'}"])
    run_job(count, "federate", *flags, "--tensor=2", f"--run_dir={tmp_path / 'run'}")
    assert_same_run(tmp_path / "alone", tmp_path / "run")


@pytest.mark.parametrize("split", [(), ("--fsdp",)])
def test_training_in_one_place(data, tmp_path, split):
    flags = [*data, "--steps=12", "--eval_every=4", "--batch_size=6"]
    run_here(pretrain.main, pretrain.PretrainConfig, [*flags, f"--run_dir={tmp_path / 'alone'}"])
    first, second = run_job(2, "pretrain", *flags, *split, f"--run_dir={tmp_path / 'run'}")
    assert "test accuracy" in first and "test accuracy" not in second
    assert_same_run(tmp_path / "alone", tmp_path / "run")


def test_a_stream(data, tmp_path):
    flags = [*data, "--stages=3", "--rounds=2", "--cohort_size=4", "--protect=none,ewc"]
    run_here(continual.main, continual.ContinualConfig, [*flags, f"--run_dir={tmp_path / 'alone'}"])
    run_job(2, "continual", *flags, f"--run_dir={tmp_path / 'run'}")
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text())["continual"]["ways"]
        for name in ("alone", "run")
    )
    for way in ("none", "ewc"):
        np.testing.assert_allclose(two[way]["accuracy"], one[way]["accuracy"], atol=1e-5)


def test_decoding_through_a_pipe(tmp_path, capsys):
    folder = tmp_path / "model"
    tokenizer = ByteTokenizer()
    model = tiny_decoder(vocab_size=tokenizer.vocab_size)
    hub.save(model, random_variables(model), folder, tokenizer)
    flags = [f"--model={folder}", "--prompt=abc", "--max_new_tokens=12", "--ignore_end"]
    run_here(generate.main, generate.GenerateConfig, flags)
    text = capsys.readouterr().out
    first, second = run_job(
        2, "generate", *flags, "--decoder=pipeinfer", "--pipeinfer.stages=2", "--draft=lookup"
    )
    assert text in first and text not in second
    (alone,) = [p for p in start(2, "generate", *flags) if p.end() == 2][:1]
    assert "decoder=plain runs in one process, and this job has 2" in alone.said
