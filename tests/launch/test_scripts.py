"""The scripts, end to end on small cases: what they write, that they go on, what they refuse."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxfm import hub
from jaxfm.config import describe, override
from jaxfm.data.federation import merge
from jaxfm.launch import (
    continual,
    cores,
    demo,
    federate,
    generate,
    pretrain,
    prompts,
    report,
    simulate,
)
from jaxfm.launch import search as search_script
from jaxfm.launch.federate_config import FederateConfig
from jaxfm.launch.optimizers import OptimizerConfig, make_optimizer
from jaxfm.launch.setup import FAMILIES, DataConfig, ModelConfig, load_data, make_model
from jaxfm.log import read_metrics
from jaxfm.parallel.generation import generate as decode
from jaxfm.parallel.loading import DECODERS, load_decoder, load_drafter
from jaxfm.parallel.mesh import make_mesh
from jaxfm.testing import tiny_decoder
from jaxfm.tokenizer import ByteTokenizer

CONFIGS = [
    FederateConfig,
    pretrain.PretrainConfig,
    prompts.PromptsConfig,
    generate.GenerateConfig,
    demo.DemoConfig,
    search_script.SearchConfig,
    report.ReportConfig,
    continual.ContinualConfig,
]

DIGITS = DataConfig(source="digits", partition="dirichlet", num_clients=6)
SGD = OptimizerConfig(name="sgd", learning_rate=0.3)


def small_run(folder, **changes) -> FederateConfig:
    base = FederateConfig(
        run_dir=str(folder), algorithm="hetero_fl", tiers=(1.0, 0.5), rounds=4, cohort_size=4,
        batch_size=16, max_steps=0, eval_every=2, data=DIGITS, model=ModelConfig(family="mlp"),
        local=SGD,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federate")
    federate.main(small_run(folder))
    return folder


@pytest.mark.parametrize("config", CONFIGS)
def test_help_describes_every_field(config):
    text = describe(config)
    for field in dataclasses.fields(config):
        assert f"--{field.name}" in text


def test_help_and_mistakes_on_the_command_line():
    start = lambda flag: subprocess.Popen(
        [sys.executable, "-m", "jaxfm.launch.federate", flag],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    helping, wrong = start("--help"), start("--cohrt=3")
    assert "--data.partition" in helping.communicate()[0]
    _, error = wrong.communicate()
    assert wrong.returncode == 2
    assert "did you mean" in error.lower() and "cohort" in error


def test_alpha_may_be_either():
    for name in ("fed_dyn.alpha", "data.beta"):
        with pytest.raises(ValueError, match=rf"no 'alpha'. Did you mean .*\b{name}\b"):
            override(FederateConfig(), "alpha=0.1")


def test_a_run_learns_and_tells_of_it(finished):
    lines = read_metrics(finished)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[-1]["validation/accuracy"] > lines[0]["validation/accuracy"] + 0.3
    assert "validation/bucket1/accuracy" in lines[-1]
    results = json.loads((finished / "results.json").read_text())["federate"]
    assert results["totals"]["bytes_up"] < results["full_model"]["bytes_up"]
    assert results["totals"]["bytes_up"] == lines[-1]["total/bytes_up"]
    assert {"global/accuracy", "personal/accuracy", "worst_decile/accuracy"} <= set(results["test"])
    page = (finished / "report.html").read_text()
    assert "validation accuracy" in page and "of what full models would be" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_run_that_was_stopped_ends_as_one_that_was_not(finished, tmp_path):
    federate.main(small_run(tmp_path, rounds=2))
    federate.main(small_run(tmp_path))
    read = lambda folder: json.loads((folder / "results.json").read_text())["federate"]
    assert read(tmp_path)["test"] == read(finished)["test"]
    assert read(tmp_path)["totals"] == read(finished)["totals"]
    shown = lambda folder: [{**line, "time_s": 0} for line in read_metrics(folder)]
    assert shown(tmp_path) == shown(finished)


def test_the_report_is_made_again_from_the_folder_alone(finished):
    path = finished / "report.html"
    before = path.read_text()
    path.unlink()
    report.main(report.ReportConfig(run_dir=str(finished)))
    assert path.read_text() == before


def test_a_report_needs_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        report.write_report(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort_size": 7}, "there are only data.num_clients=6"),
        ({"rounds": 0}, "rounds=0: give at least 1"),
        ({"tiers": (1.0, 0.0)}, "above 0 and up to 1"),
        ({"algorithm": "fed_sgd"}, "algorithm"),
        ({"drop_rate": 1.0}, r"drop_rate=1\.0: give a probability from 0 and below 1"),
    ],
)
def test_configs_refuse_what_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small_run(tmp_path, **changes)


@pytest.mark.parametrize("value", [float("nan"), -0.1])
@pytest.mark.parametrize(
    ("config", "name"),
    [
        *((FederateConfig, name) for name in ("drop_rate", "top_k", "deadline_s")),
        *((OptimizerConfig, name) for name in ("learning_rate", "momentum", "clip_norm")),
        *((DataConfig, name) for name in ("beta", "local_test", "local_validation", "public")),
        *((simulate.SimulateConfig, name) for name in ("stage_s", "jitter")),
    ],
)  # fmt: skip
def test_no_rate_or_share_is_negative_or_nan(config, name, value):
    with pytest.raises(ValueError, match=rf"\b{name}={value}: give "):
        config(**{name: value})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DataConfig(source="digits", partition="natural"),
            "digits: These rows have no natural owners",
        ),
        (
            DataConfig(partition="dirichlet"),
            "stdlib: The partition dirichlet deals rows out by",
        ),
    ],
)
def test_partitions_that_do_not_fit_say_so(config, message):
    with pytest.raises(ValueError, match=message):
        load_data(config, seed=0)


def test_noise_for_public_images():
    data = load_data(DataConfig(source="digits", synthetic=5), seed=0)
    noise, real = data.public["image"], data.train.examples["image"]
    assert set(data.public) == {"image"} and noise.shape == (5, *real.shape[1:])
    assert noise.dtype == real.dtype and noise.max() <= real.max() and not noise.min()
    assert noise.std((1, 2, 3)).min() > 0
    other = load_data(DataConfig(source="digits", synthetic=5), seed=1).public["image"]
    assert (noise != other).any()
    with pytest.raises(ValueError, match=r"synthetic=5 with data\.public=0\.1: give a number"):
        DataConfig(source="digits", synthetic=5, public=0.1)
    with pytest.raises(ValueError, match="makes images"):
        DataConfig(source="stdlib", synthetic=5)


def test_data_need_a_folder():
    with pytest.raises(ValueError, match=r"give --data\.folder"):
        DataConfig(source="mnist")
    with pytest.raises(ValueError, match=r"QMNIST's writers; give --data\.writers"):
        DataConfig(source="mnist", folder="x", partition="natural")


def test_families_fit_their_data():
    data = load_data(DIGITS, seed=0)
    with pytest.raises(ValueError, match="decoder does not fit images"):
        make_model(ModelConfig(family="decoder"), data)
    with pytest.raises(ValueError, match=r"vgg11 .* squares of 32x32 or more, and these are 8x8"):
        make_model(ModelConfig(family="vgg11"), data)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Few images in CIFAR-10's form; a class is a brightness."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 200)
    images = rng.integers(0, 60, (200, 32, 32, 3)) + 18 * labels[:, None, None, None]
    path = tmp_path_factory.mktemp("data") / "cifar.npz"
    arrays = {"images": images.astype(np.uint8), "labels": labels}
    np.savez(path, **{f"{s}_{name}": x for s in ("train", "test") for name, x in arrays.items()})
    return DataConfig(source="cifar10", folder=str(path), partition="iid", num_clients=4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("decoder", "encoder", "clip")])
def test_every_family_makes_ten_classes_of_coloured_images(colours, family):
    data = load_data(colours, seed=0)
    model = make_model(ModelConfig(family=family), data)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    logits, _ = jax.eval_shape(model.apply, variables, jnp.ones((2, 32, 32, 3)))
    assert logits.shape == (2, 10)


def test_tiers_of_a_resnet_cut_its_blocks(colours, tmp_path):
    config = small_run(
        tmp_path, data=colours, model=ModelConfig(family="resnet8"), rounds=1, max_steps=1
    )
    large, small = (cost.parameters for cost in federate.ready(config)[2].placement.costs)
    assert 0.4 * large < small < 0.6 * large  # streams stay whole: zeros pad them


def test_tiers_go_to_those_who_can_carry_them(tmp_path):
    placement = federate.ready(small_run(tmp_path))[2].placement
    needs = np.array([cost.memory_bytes for cost in placement.costs])
    assert needs[1] < needs[0]
    carried = needs[placement.bucket]
    assert (carried <= np.asarray(placement.profiles.memory_bytes)).all()
    assert set(placement.bucket.tolist()) == {0, 1}


def test_pretraining_learns_and_goes_on(tmp_path, capsys):
    config = lambda name, steps: pretrain.PretrainConfig(
        run_dir=str(tmp_path / name), steps=steps, eval_every=20, batch_size=32, data=DIGITS,
        model=ModelConfig(family="mlp"), local=SGD,
    )  # fmt: skip
    pretrain.main(config("whole", 60))
    pretrain.main(config("parts", 20))
    capsys.readouterr()
    pretrain.main(config("parts", 60))
    assert "Step 60 of 60, train/loss" in capsys.readouterr().err
    read = lambda name: json.loads((tmp_path / name / "results.json").read_text())["pretrain"]
    assert read("parts") == read("whole")
    assert read("whole")["test"]["accuracy"] > 0.8


def test_each_optimizer_has_a_learning_rate_of_its_own():
    def step(**settings) -> float:
        optimizer = make_optimizer(OptimizerConfig(**settings))
        with jax.numpy_dtype_promotion("standard"):
            return float(optimizer.update(jnp.float32(0.5), optimizer.init(jnp.float32(0)))[0])

    assert step(name="sgd") == pytest.approx(-0.05)
    assert step(name="sgd", learning_rate=1.0) == pytest.approx(-0.5)
    assert step(name="adam") == pytest.approx(-2e-3, rel=1e-3)


def test_pretraining_takes_all_its_steps(tmp_path):
    pretrain.main(
        pretrain.PretrainConfig(
            run_dir=str(tmp_path), steps=25, eval_every=10, batch_size=32, data=DIGITS,
            model=ModelConfig(family="mlp"), local=SGD,
        )
    )  # fmt: skip
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 25]


def test_pretraining_splits_a_batch_over_devices():
    data = load_data(DIGITS, seed=0)
    model = make_model(ModelConfig(family="mlp"), data)
    variables = model.init(jax.random.key(0))
    state = pretrain.TrainState(variables, (), jnp.zeros((), jnp.int32), jax.random.key(0))
    examples = merge(data.train)

    def reduces(devices: int) -> bool:
        mesh = make_mesh(data=devices)
        run = pretrain.train_steps(model, data.task, optax.identity(), 8, 1, mesh)
        place = NamedSharding(mesh, PartitionSpec())
        compiled = run.lower(*jax.device_put((state, examples), place)).compile()
        return "all-reduce" in compiled.as_text()

    assert reduces(2)
    assert not reduces(1)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_decoder(vocab_size=ByteTokenizer().vocab_size)
    variables = model.init(jax.random.key(0))
    hub.save(model, variables, folder / "model", tokenizer=ByteTokenizer())
    return folder / "model"


def test_generated_text_is_the_same_by_every_decoder(saved_model, capsys):
    base = generate.GenerateConfig(model=str(saved_model), prompt=("def f(",), max_new_tokens=12)
    outputs = []
    for way in ("plain", "lookup", "speculative"):
        draft = str(saved_model) if way == "speculative" else ""
        generate.main(dataclasses.replace(base, decoder=way, draft=draft))
        out, err = capsys.readouterr()
        assert "12 tokens (length)" in err
        outputs.append(out)
    assert outputs[0].startswith("def f(")
    assert outputs[0] == outputs[1] == outputs[2]


def test_devices_that_share_cores_are_waited_for(monkeypatch):
    made = {}
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(type(jax.config), "update", lambda _, *what: made.update([what]))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_collective_call_warn_stuck_timeout_seconds=7")
    cores.use_cores(8)
    assert made == {"jax_num_cpu_devices": 2}
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[0].endswith("=7") and len(flags) == 2 and "terminate" in flags[1]
    monkeypatch.setenv("XLA_FLAGS", theirs := "--xla_force_host_platform_device_count=3")
    cores.use_cores(8)
    assert os.environ["XLA_FLAGS"] == theirs


def test_biased_tokens_are_chosen(saved_model, capsys):
    base = generate.GenerateConfig(model=str(saved_model), prompt=("def f(",), max_new_tokens=6)
    generate.main(dataclasses.replace(base, logit_bias=("121:-inf", "120:1e4")))
    assert capsys.readouterr().out == "def f(xxxxxx\n"


def test_a_text_ends_where_the_folder_says(saved_model, capsys, tmp_path):
    loaded = load_decoder(str(saved_model))
    free = decode(loaded.decoder, [list(b"def f(")], max_new_tokens=12).tokens[0].tolist()
    folder = shutil.copytree(saved_model, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[3], 9]}))
    base = generate.GenerateConfig(model=str(folder), prompt=("def f(",), max_new_tokens=12)
    generate.main(base)
    assert f"{free.index(free[3]) + 1} tokens (stop token)" in capsys.readouterr().err
    generate.main(dataclasses.replace(base, ignore_end=True))
    assert "12 tokens (length)" in capsys.readouterr().err
    assert load_decoder(str(folder)).stop_tokens == tuple(sorted({free[3], 9, 257}))
    with pytest.raises(ValueError, match="--system requires --chat"):
        dataclasses.replace(base, system="be brief")
    with pytest.raises(ValueError, match="has no chat template"):
        generate.main(dataclasses.replace(base, chat=True))


def test_a_pipe_writes_the_same_text_and_draws_what_it_did(saved_model, capsys, tmp_path):
    base = generate.GenerateConfig(model=str(saved_model), prompt=("def f(",), max_new_tokens=12)
    generate.main(base)
    expected = capsys.readouterr().out
    page = tmp_path / "pipe.html"
    generate.main(
        override(
            dataclasses.replace(base, decoder="pipeinfer", draft="lookup", report=str(page)),
            "pipeinfer.stages=2",
            "pipeinfer.width=2",
            "pipeinfer.adapt=true",
        )
    )
    assert capsys.readouterr().out == expected
    assert "stage 1: computes" in page.read_text()
    with pytest.raises(ValueError, match="exit:two"):
        load_drafter("exit:two", None, None)
    pipe = generate.GenerateConfig(prompt=("x",), decoder="pipeinfer")
    with pytest.raises(ValueError, match=r"--pipeinfer\.adapt requires --draft"):
        override(pipe, "pipeinfer.adapt=true")
    with pytest.raises(ValueError, match=r"decoder plain takes no draft, but draft='folder'"):
        generate.GenerateConfig(prompt=("x",), draft="folder")
    with pytest.raises(ValueError, match="--report requires --decoder=pipeinfer"):
        generate.GenerateConfig(prompt=("x",), report="page.html")


def test_options_belong_to_their_decoder():
    base = generate.GenerateConfig(prompt=("x",))
    sections = {f.name for f in dataclasses.fields(base)} & set(DECODERS)
    assert sections == {"speculative", "lookup", "pipeinfer"}
    for old, new in {
        "stages": "pipeinfer.stages", "split": "pipeinfer.layers",
        "draft_length": r"speculative\.length or lookup\.length",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"^{old} is now {new}"):
            override(base, f"{old}=2")
    text = describe(generate.GenerateConfig, choices=base)
    assert "--pipeinfer.stages" not in text and "pipeinfer, too" in text


def test_generation_says_what_is_missing():
    with pytest.raises(ValueError, match="either --prompt or --prompt_file"):
        generate.GenerateConfig()
    with pytest.raises(ValueError, match="decoder speculative needs a draft"):
        generate.GenerateConfig(prompt=("x",), decoder="speculative")
