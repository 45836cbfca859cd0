"""`jaxfm.launch.search`, end to end on a small case: what it writes, that it goes on, its page."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from jaxfm import hub
from jaxfm.data.federation import merge
from jaxfm.launch import search as script
from jaxfm.launch.optimizers import OptimizerConfig
from jaxfm.launch.setup import DataConfig, ModelConfig
from jaxfm.search import load_pruned, model_network
from jaxfm.search.trace.cost import counts_of


def config(folder, **changes) -> script.SearchConfig:
    base = script.SearchConfig(
        run_dir=str(folder), train_steps=120, strategy="random", evaluations=32, macs=0.5,
        reward_examples=64, calibration_examples=128, finetune_epochs=2, finalists=4,
        data=DataConfig(source="digits", partition="iid", num_clients=2),
        network=ModelConfig(family="mlp"),
        finetune=OptimizerConfig(name="adam", learning_rate=2e-3),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    script.main(config(folder))
    return folder


def test_the_cut_model_meets_its_budget_and_says_what_it_lost(finished):
    results = json.loads((finished / "results.json").read_text())["search"]
    dense, now = results["costs"]["macs"]
    assert 0.45 * dense < now <= 0.5 * dense
    stages = results["stages"]
    assert list(stages) == [
        "before calibration", "after calibration", "after repair", "after fine-tuning", "kept",
    ]  # fmt: skip
    assert results["dense"]["accuracy"] > 0.8
    assert stages["kept"]["accuracy"] > 0.7
    assert set(results["latency_s"]) == {"batch 1", "batch 32"}
    assert len(results["scores"]) == 32 and np.all(np.diff(results["curve"]) >= 0)


def test_the_folder_holds_a_model_that_goes_on(finished):
    setting = script.prepare(config(finished))
    inputs = setting.task.prepare(
        {name: leaf[:8] for name, leaf in merge(setting.data.train).items()}, None
    )[0]
    network = model_network(setting.model, setting.variables, inputs)
    model = load_pruned(finished / "pruned", network, setting.variables)
    assert (counts_of(network, model.kept) <= network.sizes).all()
    logits = jax.jit(model.apply)(model.params, inputs)
    assert logits.shape == (8, 10) and np.isfinite(np.asarray(logits)).all()


def test_the_report_shows_the_search(finished):
    page = (finished / "report.html").read_text()
    for word in ("after fine-tuning", "multiply-adds", "dense1", "<svg"):
        assert re.search(word, page), word


def test_a_finished_search_is_not_searched_again(finished, capsys):
    before = json.loads((finished / "results.json").read_text())["search"]
    script.main(config(finished))
    after = json.loads((finished / "results.json").read_text())["search"]
    assert after["scores"] == before["scores"] and after["stages"] == before["stages"]


def test_a_cut_decoder_is_a_draft_in_hugging_face_format(tmp_path):
    (tmp_path / "text").mkdir()
    for name in range(40):  # documents, of which some are set aside
        lines = [f"def f{i}(x):\n    return x + {name}\n" for i in range(12)]
        (tmp_path / "text" / f"{name}.txt").write_text("".join(lines))
    script.main(
        script.SearchConfig(
            run_dir=str(tmp_path / "run"), train_steps=2, strategy="uniform", macs=0.6,
            reward_examples=4, calibration_examples=16, batch_size=32, finetune_epochs=0,
            repair=False,
            data=DataConfig(
                source="text", folder=str(tmp_path / "text"), partition="iid", num_clients=2,
                length=16,
            ),
            network=ModelConfig(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24),
        )
    )  # fmt: skip
    model, variables = hub.load(tmp_path / "run" / "draft")
    assert model.config.head_dim == 8 and model.config.embed_dim < 16
    logits = model.apply(variables, np.zeros((1, 4), np.int32))[0]
    assert np.isfinite(np.asarray(logits)).all()
    results = json.loads((tmp_path / "run" / "results.json").read_text())["search"]
    dense, now = results["costs"]["macs"]
    assert now <= 0.6 * dense and results["unknown"] == {}
    assert np.isfinite(results["stages"]["kept"]["loss"])


@pytest.mark.slow
def test_a_vision_transformer_that_its_format_cannot_say_is_still_saved(tmp_path, capsys):
    setting = config(
        tmp_path, train_steps=2, strategy="uniform", finetune_epochs=0, repair=False, finalists=1,
        network=ModelConfig(family="vit", embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24),
    )  # fmt: skip
    script.main(setting)
    assert "huggingface: not written. A vit file needs embed_dim" in capsys.readouterr().out
    assert (tmp_path / "pruned" / "params.safetensors").exists()


def test_wrong_settings_are_refused(tmp_path):
    for changes, message in (
        ({"macs": 0.0}, "--macs=0.5"),
        ({"macs": 1.5}, "share from 0 to 1"),
        ({"strategy": "gnn_rl_published", "macs": 0.0, "parameters": 0.5}, "gnn_rl_published"),
        ({"evaluations": 0}, "evaluations=0"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **changes)
    with pytest.raises(ValueError, match="resnet20"):
        script.prepare(config(tmp_path, model="resnext"))
