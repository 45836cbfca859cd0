"""Folders of prompts and prefixes: what is written is read again, as PEFT reads and writes it."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxfm import hub
from jaxfm.adapters import attach, prefix_tuning, prompt_pool, settled, soft_prompt
from jaxfm.testing import random_variables, tiny_decoder, tiny_encoder, tiny_gpt2, tiny_vit

TOKENS = np.arange(1, 13, dtype=np.int32).reshape(2, 6)
TOLERANCE = 1e-4

CASES = {
    "prompt": (tiny_decoder, lambda m: soft_prompt(m, 3), "PROMPT_TUNING"),
    "prefix": (tiny_decoder, lambda m: prefix_tuning(m, 3), "PREFIX_TUNING"),
    "prefix, gpt2": (tiny_gpt2, lambda m: prefix_tuning(m, 2), "PREFIX_TUNING"),
    "prompt, a norm": (tiny_decoder, lambda m: soft_prompt(m, 3, trained="head.norm"), "JAXFM"),
    "prompt, encoder": (tiny_encoder, lambda m: soft_prompt(m, 3, name="own"), "JAXFM"),
    "prefix, encoder": (tiny_encoder, lambda m: prefix_tuning(m, 3), "JAXFM"),
    "pool": (tiny_vit, lambda m: prompt_pool(m, 4, 2, 2, pull=0.25), "JAXFM"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_again(case, tmp_path):
    make, wrap, kind = CASES[case]
    model = make()
    base, adapted = random_variables(model), wrap(model)
    variables = attach(adapted, base, jax.random.key(0))
    variables = variables._replace(params=random_variables(adapted).params)
    hub.save_adapter(adapted, variables, tmp_path / "a", base="some/model")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["base_model_name_or_path"]) == (kind, "some/model")
    again, same = hub.load_adapter(tmp_path / "a", model, base)
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    assert again.adapter.config.num_tokens == adapted.adapter.config.num_tokens


def test_rows_lie_as_peft_views_them(tmp_path):
    """PEFT: view(P, 2 L, G, K), permuted to layers first, split in pairs of keys and values."""
    model = tiny_decoder()
    adapted = prefix_tuning(model, 3)
    variables = random_variables(adapted)
    hub.save_adapter(adapted, variables, tmp_path / "a")
    flat = load_file(tmp_path / "a" / "adapter_model.safetensors")["prompt_embeddings"]
    pairs = flat.reshape(3, 2 * 2, 2, 4).transpose(1, 2, 0, 3)  # [2 L, G, P, K]
    rows = variables.params["layers"]["prefix"]
    for layer in range(2):
        for place, name in enumerate("kv"):
            ours = np.asarray(rows[name][layer]).transpose(1, 0, 2)
            np.testing.assert_array_equal(pairs[2 * layer + place], ours)


def test_a_network_is_kept_until_its_prefix_is_settled(tmp_path):
    model = tiny_decoder()
    adapted, base = prefix_tuning(model, 3, hidden=4), random_variables(model)
    variables = random_variables(adapted)
    hub.save_adapter(adapted, variables, tmp_path / "network")
    _, same = hub.load_adapter(tmp_path / "network", model, base)
    jax.tree.map(np.testing.assert_array_equal, same.params, variables.params)
    plain, rows = settled(adapted, variables)
    hub.save_adapter(plain, rows, tmp_path / "rows")
    _, same = hub.load_adapter(tmp_path / "rows", model, base)
    jax.tree.map(np.testing.assert_array_equal, same.params, rows.params)


REFUSED = {
    "num_virtual_tokens=0; it should be a whole": ({"num_virtual_tokens": 0}, None),
    "num_virtual_tokens='3'": ({"num_virtual_tokens": "3"}, None),
    "num_transformer_submodules=2": ({"num_transformer_submodules": 2}, None),
    "should have shape \\(4, 16\\) for this base; in the file it has \\(3, 16\\)": (
        {"num_virtual_tokens": 4}, None,
    ),
    "should have shape \\(3, 32\\)": ({"peft_type": "PREFIX_TUNING"}, None),
    "has more; it should": ({}, {"more": np.zeros(1, np.float32)}),
    "NaN or infinity": ({}, {"prompt_embeddings": np.full((3, 16), np.nan, np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_bad_folders_are_told_in_one_sentence(message, tmp_path):
    model = tiny_decoder()
    adapted, base = soft_prompt(model, 3), random_variables(model)
    folder = tmp_path / "a"
    hub.save_adapter(adapted, random_variables(adapted), folder)
    fields, tensors = REFUSED[message]
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    stored = load_file(folder / "adapter_model.safetensors")
    save_file(stored | (tensors or {}), folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        hub.load_adapter(folder, model, base)
    if not fields:
        return
    with pytest.raises(ValueError, match="for causal language models only"):
        hub.load_adapter(folder, tiny_encoder(), random_variables(tiny_encoder()))


@pytest.mark.parametrize("make", [tiny_decoder, tiny_gpt2])
@pytest.mark.parametrize("wrap", [soft_prompt, prefix_tuning])
def test_peft_computes_the_same_and_writes_the_same(make, wrap, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = make()
    base, adapted = random_variables(model), wrap(model, 3)
    variables = attach(adapted, base, jax.random.key(0))
    variables = variables._replace(params=random_variables(adapted).params)
    hub.save(model, base, tmp_path / "base")
    hub.save_adapter(adapted, variables, tmp_path / "ours", base=tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
        theirs.save_pretrained(tmp_path / "theirs")
    ours = jax.jit(adapted.apply)(variables, jnp.asarray(TOKENS))[0]
    # Of a soft prompt PEFT gives logits at its places, too.
    np.testing.assert_allclose(ours, logits[:, -TOKENS.shape[1] :], atol=TOLERANCE)
    _, again = hub.load_adapter(tmp_path / "theirs", model, base)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
