"""`jaxfm.launch.supernet`, end to end on a small case: budgets, files, going on, its page."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxfm import hub
from jaxfm.checkpoint import Checkpointer
from jaxfm.launch import supernet as script
from jaxfm.launch.setup import DataConfig, ModelConfig, load_data, make_model


def config(folder, **changes) -> script.SupernetConfig:
    base = script.SupernetConfig(
        run_dir=str(folder), dense_steps=60, steps=40, save_every=40, scored=12,
        score_examples=64, calibration_batches=2, shares=(0.3, 1.0),
        data=DataConfig(source="digits", partition="iid", num_clients=2),
        network=ModelConfig(family="mlp"),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def results_of(folder) -> dict:
    return json.loads((folder / "results.json").read_text())["supernet"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supernet")
    script.main(config(folder))
    return folder


def test_every_budget_gets_a_member_within_it(finished):
    found = results_of(finished)
    small, whole = found["members"]
    assert small["kept"] <= 0.3 and whole["kept"] == 1
    for member in found["members"]:
        scores = member["validation"]
        assert scores[member["chosen"]] == max(scores.values())
    assert whole["test"]["uniform"] == found["largest"]
    assert found["dense"]["accuracy"] > 0.7 and found["smallest"]["accuracy"] > 0.5
    page = (finished / "report.html").read_text()
    assert "A network for every device" in page and "same share of everything" in page


def test_a_member_is_what_its_file_says(finished):
    kept = json.loads((finished / "members" / "0.3" / "member.json").read_text())
    data = load_data(config(finished).data, 0)
    model = make_model(ModelConfig(family="mlp"), data)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    width = kept[0]["kept"]
    small = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            tuple(width if n == kept[0]["of"] else n for n in x.shape), x.dtype
        ),
        shapes,
    )
    with Checkpointer(finished / "members" / "0.3" / "variables") as checkpoints:
        step, variables = checkpoints.restore(like=small)
    assert step == 40
    logits, _ = model.apply(variables, data.test["image"][:4].astype(np.float32))
    assert logits.shape == (4, 10)


def test_a_finished_run_trains_no_more_and_a_longer_one_goes_on(finished, capsys):
    before = results_of(finished)
    capsys.readouterr()
    script.main(config(finished))
    assert results_of(finished) == before and "\nstep " not in capsys.readouterr().out
    script.main(config(finished, steps=80))
    assert "step 80" in capsys.readouterr().out
    assert results_of(finished)["members"] != before["members"]


@pytest.mark.slow  # a minute of compiling
def test_equal_layers_of_a_decoder_are_a_hugging_face_model(tmp_path):
    for i in range(40):  # enough documents for all splits
        folder = tmp_path / "text" / f"owner{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.txt").write_text("def f(x):\n    return x + 1\n" * 15)
    network = ModelConfig(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24)
    data = DataConfig(source="text", folder=str(tmp_path / "text"), num_clients=2, length=32)
    run = tmp_path / "run"
    script.main(
        config(run, alike=True, axes=("mlp", "kv_heads"), network=network, data=data, shares=(0.8,))
    )
    model, variables = hub.load(run / "members" / "0.8")
    assert model.config.mlp_dim <= 24
    assert (
        sum(x.size for x in jax.tree.leaves(variables.params))
        == (results_of(run)["members"][0]["parameters"])
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shares": ()}, "shares above 0"),
        ({"shares": (0.5, 1.5)}, "shares above 0"),
        ({"scored": 3}, "scored=3"),
        ({"steps": 0}, "steps=0"),
        ({"cost": "macs", "axes": ("layer",)}, "elastic depth"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"shares": (0.01, 0.5)}, "the smallest member has"), ({"axes": ("wide",)}, "wide")],
)
def test_what_the_model_cannot_have_is_refused_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        script.main(config(tmp_path, **changes))
    assert not (tmp_path / "dense").exists()
