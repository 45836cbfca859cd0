"""Schedules and masked language models on the command line."""

import json
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm import hub, tasks
from jaxfm.config import override
from jaxfm.data.loading import DataSet
from jaxfm.data.standard_library import stdlib
from jaxfm.launch import federate
from jaxfm.launch.federate_config import FederateConfig
from jaxfm.launch.setup import DataConfig, ModelConfig, load_data, make_model
from jaxfm.tokenizer import ByteTokenizer

NAMES = (
    "abc", "bisect", "keyword", "secrets", "colorsys", "stat", "heapq", "copy", "queue", "sched",
    "this", "token",
)  # fmt: skip
SIZE = ModelConfig(embed_dim=16, num_heads=2, mlp_dim=16, num_layers=2)


@pytest.fixture
def texts(tmp_path) -> DataConfig:
    folder, root = tmp_path / "texts", pathlib.Path(sysconfig.get_path("stdlib"))
    for number, name in enumerate(NAMES):
        (folder / "ba"[number % 2]).mkdir(parents=True, exist_ok=True)
        text = (root / f"{name}.py").read_text()[:4000]
        (folder / "ba"[number % 2] / f"{name}.py.txt").write_text(text)
    return DataConfig(
        source="text", folder=str(folder), num_clients=2, length=32, partition="iid", public=0.3,
        masked=True,
    )  # fmt: skip


@pytest.mark.slow
def test_an_encoder_is_pretrained_in_phases_and_begins_another_run(texts, tmp_path, capsys):
    settings = {
        "cohort_size": 2, "max_steps": 2, "eval_examples": 16, "data": texts, "algorithm": "diloco",
    }  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    federate.run(FederateConfig(
        run_dir=str(first), phases=("central:3", "federated:1"), model=SIZE, **settings
    ))  # fmt: skip
    part = json.loads((first / "results.json").read_text())["federate"]
    assert part["targets"]["central"] > 0 < part["targets"]["federated"]
    assert part["phases"] == ["central:3", "federated:1"]
    page = (first / "report.html").read_text()
    assert "Phases: central:3, federated:1; losses were taken over" in page
    federate.run(FederateConfig(
        run_dir=str(second), phases=("federated:1",), init=str(first / "model"), **settings
    ))  # fmt: skip
    assert "Losses were taken over 0 targets in central phases" in capsys.readouterr().out


def test_a_masked_model_is_an_encoder_and_comes_back_from_a_folder(texts, tmp_path):
    data = load_data(texts, seed=0)
    assert data.task.draws
    model = make_model(SIZE, data)
    assert model.config.head == "masked_lm"
    variables = model.init(jax.random.key(0))
    inputs, targets, _ = data.task.prepare({"tokens": data.validation["tokens"][:2]},
                                           jax.random.key(1))  # fmt: skip
    assert jax.eval_shape(model.apply, variables, inputs)[0].shape == (*targets.shape, 260)
    hub.save(model, variables, tmp_path / "model", data.tokenizer)
    again = make_model(ModelConfig(family=str(tmp_path / "model")), data)
    loaded = again.init(jax.random.key(5))
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="family=decoder does not fit text with hidden tokens"):
        make_model(ModelConfig(family="decoder"), data)


def test_padding_is_neither_read_nor_hidden():
    task = tasks.masked_lm(259, 260, (256, 257, 258, 259), pad_id=258)
    tokens = jnp.array([[65, 66, 67, 258, 258]] * 50)
    inputs, _, weight = task.prepare({"tokens": tokens}, jax.random.key(0))
    np.testing.assert_array_equal(inputs["mask"], tokens != 258)
    assert weight[:, :3].sum() > 0 == weight[:, 3:].sum()


def test_only_text_without_labels_is_masked():
    with pytest.raises(ValueError, match="Tokens are hidden in text without labels"):
        load_data(DataConfig(source="digits", masked=True), 0)
    splits = stdlib(length=16, tiny=True)
    tokenizer = ByteTokenizer()
    tokenizer.mask_id = None
    with pytest.raises(ValueError, match="has no token that stands for hidden ones"):
        tasks.task_for(DataSet(splits, tokenizer), masked=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["phases=central:5,federated:2"], "public rows; give --data.public=0.2"),
        (["phases=central:5", "data.public=0.2"], "have no federated phase; jaxfm.launch.pretrain"),
        (["phases=federated:5", "rounds=7"], "rounds=7 with phases=federated:5, which have 5"),
        (["phases=global:5"], "phases='global:5' is no phase"),
        (["central_batch=5"], "central_batch=5 requires --phases"),
        (["quorum=9"], "quorum=9: a round has only cohort_size=8 clients"),
        (["byte_budget=-1"], "byte_budget=-1"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        override(FederateConfig(), *flags)


def test_rounds_are_those_of_the_phases():
    config = override(FederateConfig(), "phases=federated:5,federated:2")
    assert config.rounds == 7 == override(config, "seed=3").rounds
