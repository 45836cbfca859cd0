"""Data of one's own from the command line: a file or folder of each kind federates."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from jaxfm import hub
from jaxfm.config import define_flags, from_flags
from jaxfm.data.scaling import Scale, save_scale
from jaxfm.launch import federate
from jaxfm.launch.federate_config import FederateConfig
from jaxfm.launch.setup import DataConfig, ModelConfig, load_data, make_model
from jaxfm.models import mlp

NAMES = ("ant", "bee", "cat")
ROWS = 96
LABELS = [NAMES[n % 3] for n in range(ROWS)]
POINTS = np.eye(3)[np.arange(ROWS) % 3] + np.random.default_rng(0).normal(size=(ROWS, 3)) / 9
TEXTS = [10 * name[0] for name in LABELS]


def write_csv(folder):
    with (folder / "points.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "c", "class"])
        writer.writerows([*point, name] for point, name in zip(POINTS.tolist(), LABELS))
    return folder / "points.csv"


def write_jsonl(folder):
    rows = [{"point": point, "label": name} for point, name in zip(POINTS.tolist(), LABELS)]
    (folder / "points.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "points.jsonl"


def write_npz(folder):
    np.savez(folder / "points.npz", x=POINTS, y=np.array(LABELS))
    return folder / "points.npz"


def write_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = {"a": POINTS[:, 0], "b": POINTS[:, 1], "c": POINTS[:, 2], "label": LABELS}
    parquet.write_table(pyarrow.table(table), folder / "points.parquet")
    return folder / "points.parquet"


def write_images(folder):
    for number, name in enumerate(LABELS):
        (folder / name).mkdir(exist_ok=True)
        image = np.zeros((3, 4, 5), np.uint8)  # channels first
        image[number % 3] = 255
        np.save(folder / name / f"{number}.npy", image)
    return folder


def write_texts(folder):
    for number, (name, text) in enumerate(zip(LABELS, TEXTS)):
        (folder / "train" / name).mkdir(parents=True, exist_ok=True)
        (folder / "train" / name / f"{number}.txt").write_text(text)
    return folder


def command(path, *words):
    """The config of a command line."""
    values = flags.FlagValues()
    define_flags(FederateConfig, values)
    short = ["--rounds=3", "--eval_every=3", "--cohort_size=3", "--data.num_clients=3"]
    small = ["--data.partition=iid", "--batch_size=8", "--max_steps=0", "--epochs=3"]
    values(["federate", f"--data.source={path}", *short, *small, *words])
    return from_flags(FederateConfig, values)


SMALL = (
    *("--model.embed_dim=16", "--model.num_layers=1", "--model.num_heads=2"),
    *("--model.mlp_dim=16", "--local.learning_rate=0.02"),
)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (write_csv, ("--data.standardize",)),
        (write_jsonl, ()),
        (write_npz, ()),
        (write_parquet, ()),
        (write_images, ("--model=mlp",)),
        (write_texts, SMALL),
    ],
)
def test_a_file_of_each_kind_federates(write, words, tmp_path, capsys):
    run = tmp_path / "run"
    (tmp_path / "data").mkdir()
    federate.main(
        command(write(tmp_path / "data"), f"--run_dir={run}", "--local.learning_rate=0.02", *words)
    )
    results = json.loads((run / "results.json").read_text())
    assert results["data"]["classes"] == list(NAMES)
    assert results["federate"]["test"]["global/accuracy"] > 0.9
    assert "test global/accuracy" in capsys.readouterr().out
    assert (run / "model" / "columns.json").exists() == ("--data.standardize" in words)


def test_clients_of_a_column_hold_their_own_rows(tmp_path):
    rows = [
        {"text": text, "label": name, "client": f"user {number % 4}"}
        for number, (text, name) in enumerate(zip(TEXTS, LABELS))
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(DataConfig(source=str(path), num_clients=4), seed=0)
    assert sorted(data.names) == [f"user {number}" for number in range(4)]
    model = make_model(ModelConfig(embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8), data)
    assert model.config.num_classes == 3 and model.config.head == "classify"


def test_heads_follow_the_labels_of_mnists_files(tmp_path):
    for prefix, size in (("train", 240), ("t10k", 120)):
        for name, array in (
            ("images-idx3", np.zeros((size, 6, 7), np.uint8)),
            ("labels-idx1", (np.arange(size) % 60).astype(np.uint8)),
        ):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (tmp_path / f"{prefix}-{name}-ubyte").write_bytes(header + array.tobytes())
    data = load_data(DataConfig(source=str(tmp_path), partition="iid"), seed=0)
    assert len(data.classes) == 60
    for family in ("cnn", "mlp", "vit", "resnet8"):
        model = make_model(ModelConfig(family=family, embed_dim=8, num_layers=1), data)
        variables = jax.eval_shape(model.init, jax.random.key(0))
        logits, _ = jax.eval_shape(model.apply, variables, jnp.ones((2, 6, 7, 1)))
        assert logits.shape == (2, 60)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"source": "digit"}, "'digit' is not a choice, file or folder. Did you mean digits?"),
        ({"source": "digits", "folder": "x"}, "data.folder='x' is read for data.source=text, m"),
        ({"source": "digits", "label": "y"}, "data.label='y': data.source=digits has its own"),
        ({"source": "owner/name", "image_size": (3,)}, "give height and width, as 32,32."),
    ],
)
def test_sources_that_cannot_be_are_refused(config, message):
    with pytest.raises(ValueError) as caught:
        DataConfig(**config)
    assert message in str(caught.value)


def test_a_run_that_starts_from_a_model_scales_columns_as_that_model_was_trained(tmp_path):
    file = write_csv(tmp_path)
    scale = Scale(np.array([7.0, -1.0, 0.5]), np.array([2.0, 1.0, 0.25]))
    model = mlp((3, 4, 3))
    hub.save(model, model.init(jax.random.key(0)), tmp_path / "model", scale=scale)
    config = command(file, f"--init={tmp_path / 'model'}")
    data = load_data(config.data, config.seed, config.model)
    plain = load_data(dataclasses.replace(config.data), config.seed)
    expected = (plain.test["features"] - scale.mean) / scale.deviation
    np.testing.assert_allclose(data.test["features"], expected, rtol=1e-5)
    (tmp_path / "model" / "columns.json").write_text("{}")
    with pytest.raises(ValueError, match=r"columns\.json is not a scale of columns"):
        load_data(config.data, config.seed, config.model)
    save_scale(Scale(np.zeros(2), np.ones(2)), tmp_path / "model")
    with pytest.raises(ValueError, match="The rows have 3 columns of numbers, where the scale"):
        load_data(config.data, config.seed, config.model)
