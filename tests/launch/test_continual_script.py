"""The script of streams: what it writes, that it goes on, what it refuses."""

import dataclasses
import json

import pytest

from jaxfm.launch import continual
from jaxfm.launch.continual import ContinualConfig, stream
from jaxfm.launch.optimizers import OptimizerConfig
from jaxfm.launch.setup import DataConfig, ModelConfig, load_data

CONFIG = ContinualConfig(
    stages=2, rounds=1, cohort_size=3, batch_size=32, protect=("none", "replay", "ewc", "lwf"),
    data=DataConfig(source="digits", num_clients=4), model=ModelConfig(family="mlp"),
    local=OptimizerConfig(name="sgd"),
)  # fmt: skip


def test_a_stream_is_run_in_every_way_and_reported(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path / "run"))
    continual.main(config)
    said = capsys.readouterr().out
    part = json.loads((tmp_path / "run" / "results.json").read_text())["continual"]
    assert list(part["ways"]) == ["none", "replay", "ewc", "lwf"] and part["names"] == ["0", "1"]
    first = [way["accuracy"][0] for way in part["ways"].values()]
    assert first[0] == first[1] == first[2] == first[3]  # the first stage knows no past
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Learning from a stream" in page and "after stage 2" in page
    continual.main(config)  # all is done: the same figures from the checkpoints
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("by", ["labels", "clients"])
def test_stages_bring_classes_or_clients(by):
    config = dataclasses.replace(CONFIG, by=by)
    data = load_data(config.data, 0)
    stages = stream(config, data)
    total = sum(int(stage.federation.count.sum()) for stage in stages)
    assert total == int(data.train.count.sum())
    with_rows = [stage.federation.count > 0 for stage in stages]
    if by == "clients":
        assert [x.tolist() for x in with_rows] == [
            [True] * 2 + [False] * 2,
            [False] * 2 + [True] * 2,
        ]
    else:
        labels = [set(stage.test["label"]) for stage in stages]
        assert labels == [set(range(5)), set(range(5, 10))]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="protect='replya': give one or several of none, replay"):
        dataclasses.replace(CONFIG, protect=("replya",))
    with pytest.raises(ValueError, match="protect=adapters gives each stage an adapter of its own"):
        dataclasses.replace(CONFIG, protect=("adapters",))
    with pytest.raises(ValueError, match="stages=11: there are only 10 classes"):
        stream(dataclasses.replace(CONFIG, stages=11), load_data(CONFIG.data, 0))
    with pytest.raises(ValueError, match="stages=1: give at least 2"):
        dataclasses.replace(CONFIG, stages=1)
