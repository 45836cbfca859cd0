"""What each tier has trained, as folders and programs."""

import json

import numpy as np
from jax import export as jax_export
from safetensors.numpy import load_file
from transformers import AutoConfig

from jaxfm import federated, hub
from jaxfm.launch.federate import ready
from jaxfm.launch.flower.app import read_flags
from jaxfm.launch.saving import bucket_names, export
from jaxfm.parallel.mesh import make_mesh

TEXT = [
    *("--algorithm=hetero_fl", "--tiers=1.0,0.5", "--data.num_clients=2", "--cohort_size=2"),
    *("--rounds=1", "--local=sgd", "--max_steps=1", "--batch_size=4", "--data.length=8"),
    *("--model.embed_dim=16", "--model.num_layers=1", "--model.num_heads=2"),
    *("--model.mlp_dim=16", "--data.partition=iid"),
]
DIGITS = [
    *("--data=digits", "--model=mlp", "--local=sgd", "--rounds=1", "--max_steps=1"),
    *("--data.num_clients=2", "--cohort_size=2", "--data.partition=iid"),
]


def trained(words):
    config = read_flags(words)
    data, _, prepared = ready(config)
    result = federated.train(
        prepared, data, num_rounds=1, cohort_size=2, eval_every=1, test_examples=8,
        mesh=make_mesh(clients=1),
    )  # fmt: skip
    return config, prepared, result, data


def test_each_tier_opens_at_its_own_size_with_its_own_outputs(tmp_path):
    rows = [{"text": word, "label": word[0]} for word in ("aaa", "bbbb", "cc") * 20]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, prepared, result, data = trained([f"--data.source={path}", *TEXT])
    export(config, prepared, result, data, tmp_path)
    some = {name: leaf[:1] for name, leaf in data.test.items()}
    inputs = data.task.prepare(some, None)[0]
    for b, (name, width) in enumerate({"tier-1": 16, "tier-0.5": 8}.items()):
        folder, bucket = tmp_path / "export" / name, prepared.algorithm.buckets[b]
        expected = bucket.model.apply(bucket.shared(result.state.server), inputs)[0]
        model, variables = hub.load(folder)
        outputs = [model.apply(variables, inputs)[0]]
        about = AutoConfig.from_pretrained(folder)
        assert about.intermediate_size == width and about.id2label[0] == "a"
        program = jax_export.deserialize(
            bytearray((folder / "device" / "model.stablehlo").read_bytes())
        )
        outputs.append(program.call(load_file(folder / "device/params.safetensors"), inputs))
        for found in outputs:
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_network_that_a_folder_cannot_express_is_left_to_its_program(tmp_path, capsys):
    """HeteroFL's scaler multiplies what slices read; the folder would give other outputs."""
    config, prepared, result, data = trained(
        ["--algorithm=hetero_fl", "--tiers=1.0,0.5", "--hetero_fl.scaler=true", *DIGITS]
    )
    export(config, prepared, result, data, tmp_path)
    assert "more to it than the format can say" in capsys.readouterr().out
    folders = {path.parent.name for path in (tmp_path / "export").rglob("model.safetensors")}
    programs = {path.parts[-3] for path in (tmp_path / "export").rglob("model.stablehlo")}
    assert (folders, programs) == ({"tier-1"}, {"tier-1", "tier-0.5"})


def test_models_of_clients_own_stay_with_them(tmp_path, capsys):
    config, prepared, result, data = trained(["--algorithm=fed_per", *DIGITS])
    assert bucket_names(config, prepared) == ["bucket-0"]
    export(config, prepared, result, data, tmp_path)
    assert "Its clients keep models of their own" in capsys.readouterr().out
    assert not (tmp_path / "export").exists()
