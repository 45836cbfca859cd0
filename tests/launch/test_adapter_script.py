"""A run that trains an adapter: what it writes, who reads it, what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxfm import hub
from jaxfm.adapters import attach, lora, merge, soft_prompt
from jaxfm.launch import federate, generate
from jaxfm.launch.adapters import AdapterConfig
from jaxfm.launch.federate_config import FederateConfig
from jaxfm.launch.setup import DataConfig
from jaxfm.parallel.loading import load_decoder
from jaxfm.testing import tiny_decoder
from jaxfm.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    model = tiny_decoder(vocab_size=260, max_len=64)
    hub.save(model, model.init(jax.random.key(0)), folder, ByteTokenizer())
    return folder


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    texts = folder.parent / "texts"
    texts.mkdir()
    for name in "abcdefghijklmnopqrst":
        (texts / f"{name}.txt").write_text(f"the {name} is {name * 7}. " * 40)
    config = FederateConfig(
        run_dir=str(folder), init=str(base), rounds=2, cohort_size=2, max_steps=3, eval_every=2,
        data=DataConfig(source="text", folder=str(texts), num_clients=4, length=16),
        adapter=AdapterConfig(kind="lora", rank=2, targets=("linear",)),
    )  # fmt: skip
    federate.main(config)
    return folder


def test_the_backbone_is_sent_once_and_adapters_travel(finished):
    part = json.loads((finished / "results.json").read_text())["federate"]
    tier = part["tiers"][0]
    assert tier["parameters"] * 4 == tier["bytes_down"]
    assert tier["bytes_once"] > tier["bytes_down"]
    assert part["full_model"]["parameters"] > tier["parameters"]


def test_the_adapter_and_the_merged_model_say_the_same(base, finished):
    model, variables = hub.load(base)
    adapted, trained = hub.load_adapter(finished / "adapter", model, variables)
    whole, merged = hub.load(finished / "model")
    tokens = np.arange(12, dtype=np.int32)[None] * 7
    a = adapted.apply(trained, tokens)[0]
    np.testing.assert_allclose(a, whole.apply(merged, tokens)[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        a, model.apply(merge(adapted, trained)[1], tokens)[0], rtol=1e-4, atol=1e-4
    )
    assert np.abs(a - model.apply(variables, tokens)[0]).max() > 1e-4
    made = load_decoder(str(base), adapter=str(finished / "adapter")).decoder
    assert "lora" in str(jax.tree_util.tree_structure(made.variables))


def test_generate_takes_an_adapter(base, finished, capsys):
    config = generate.GenerateConfig(
        model=str(base), adapter=(str(finished / "adapter"),), prompt=("the a",), max_new_tokens=4
    )
    generate.main(config)
    with_it = capsys.readouterr().out
    generate.main(dataclasses.replace(config, model=str(finished / "model"), adapter=()))
    assert capsys.readouterr().out == with_it


def test_each_request_has_an_adapter_of_its_own(base, finished, tmp_path, capsys):
    """What several adapters say in one batch is what each says alone, low-rank ones and prompts."""
    model, variables = hub.load(base)
    first = str(finished / "adapter")
    second, other, *prompts = (str(tmp_path / name) for name in ("second", "other", "p0", "p1"))
    adapted, trained = hub.load_adapter(first, model, variables)
    shaken = jax.tree.map(lambda x: -30 * x, trained.params)
    hub.save_adapter(adapted, trained._replace(params=shaken), second)
    for number, folder in enumerate(prompts):
        prompted = soft_prompt(model, 3)
        hub.save_adapter(prompted, attach(prompted, variables, jax.random.key(number)), folder)
    narrow = lora(model, 2, targets="qv")
    hub.save_adapter(narrow, attach(narrow, variables, jax.random.key(0)), other)
    config = generate.GenerateConfig(
        model=str(base), adapter=(first,), prompt=("the a",), max_new_tokens=8, grammar="[a-z]{8}"
    )
    said = {}
    for folder in (first, second, *prompts):
        generate.main(dataclasses.replace(config, adapter=(folder,)))
        said[folder] = capsys.readouterr().out
    assert said[first] != said[second] and said[prompts[0]] != said[prompts[1]]
    for folders in ((second, first, second), tuple(prompts)):
        generate.main(dataclasses.replace(config, adapter=folders))
        assert capsys.readouterr().out == "\n".join(said[folder] for folder in folders)
    for wrong in ((first, other), (first, prompts[0])):
        with pytest.raises(ValueError, match=r"Adapter 1 has .*, and adapter 0 has lora with"):
            load_decoder(str(base), adapter=wrong)
    with pytest.raises(ValueError, match="2 adapters and 3 prompts: give one prompt, or one for"):
        dataclasses.replace(config, adapter=(first, second), prompt=("a", "b", "c"))
    with pytest.raises(ValueError, match="pipeinfer takes one adapter, and 2 were given"):
        dataclasses.replace(config, adapter=(first, second), decoder="pipeinfer")
    with pytest.raises(ValueError, match="An empty --prompt"):
        dataclasses.replace(config, prompt=("a", ""))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"rank": 4}, "adapter.rank=4 changes nothing with --adapter=none"),
        ({"kind": "bitfit", "alpha": 2.0}, "adapter.alpha=2.0 changes nothing"),
        ({"kind": "head", "trained": ("head",)}, "adapter.trained=head changes nothing"),
        ({"kind": "lora", "rank": 0}, "adapter.rank=0: give at least 1"),
    ],
)
def test_settings_that_change_nothing_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        AdapterConfig(**options)
