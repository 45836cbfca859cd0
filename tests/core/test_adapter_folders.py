"""Folders of adapters: what is written is read again, to PEFT's formula; bad files are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from jaxfm import hub
from jaxfm.adapters import (
    attach,
    bitfit,
    bottleneck,
    dora,
    head_only,
    lora,
    merge,
    prefix_tuning,
    quantized,
    soft_prompt,
)
from jaxfm.testing import (
    random_variables,
    tiny_cnn,
    tiny_decoder,
    tiny_encoder,
    tiny_gpt2,
    tiny_vit,
)

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def trained(adapted, base, seed=1):
    """Variables of an adapted model after some training: random numbers in `params`."""
    variables = attach(adapted, base, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    draw = lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)
    return variables._replace(params=jax.tree.map(draw, variables.params))


def kernels(model, variables):
    return flatten_dict(merge(model, variables)[1].params, sep=".")


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], err_msg=name, **tolerance)


def round_trip(tmp_path, adapted, base_model, base):
    variables = trained(adapted, base)
    hub.save_adapter(adapted, variables, tmp_path / "a", base="some/model")
    again, same = hub.load_adapter(tmp_path / "a", base_model, base)
    return variables, again, same


# fmt: off
CASES = {
    "lora": (tiny_decoder, lambda m: lora(m, 3, targets="attention,mlp.down", alpha=5)),
    "dora, ranks": (tiny_decoder, lambda m: dora(m, 3, targets="q,up", ranks={"up": 2})),
    "stabilised, dropout, a head": (
        tiny_encoder,
        lambda m: lora(m, 2, targets="mlp.down", rank_stabilized=True, dropout=0.1,
                       trained=("head.transform", "head.norm")),
    ),
    "biases": (tiny_gpt2, lambda m: lora(m, 2, targets="o", trained="*.bias")),
    "vit": (tiny_vit, lambda m: lora(m, 2, targets="qv", trained="head.classifier")),
    "bottleneck": (tiny_decoder, lambda m: bottleneck(m, 3, targets="mlp.down,o")),
    "prompt": (tiny_encoder, lambda m: soft_prompt(m, 2, init=(3, 5), trained="head.norm")),
    "prefix": (tiny_decoder, lambda m: prefix_tuning(m, 2, hidden=3)),
    "parts": (tiny_encoder, lambda m: bitfit(m, trained="embed.norm")),
    "another network": (tiny_cnn, lambda m: lora(m, 2, targets="dense", trained="classifier")),
    "a head": (tiny_cnn, head_only),
}
# fmt: on


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_loaded_again(case, tmp_path):
    make, adapt = CASES[case]
    base_model = make()
    base = random_variables(base_model)
    adapted = adapt(base_model)
    variables, again, same = round_trip(tmp_path, adapted, base_model, base)
    config, read = adapted.adapter.config, again.adapter.config
    if case in (
        "lora",
        "bottleneck",
        "parts",
        "another network",
    ):  # elsewhere patterns became names
        assert dataclasses.asdict(read) == dataclasses.asdict(config)
    assert_same(
        flatten_dict(same.params, sep="."), flatten_dict(variables.params, sep="."), rtol=1e-6
    )
    frozen = flatten_dict(same.frozen, sep=".")
    for name, leaf in flatten_dict(base.params, sep=".").items():
        assert name not in frozen or frozen[name] is leaf
    text = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert text["base_model_name_or_path"] == "some/model"


def test_each_module_of_the_file_is_the_product_of_its_matrices(tmp_path):
    """W' = W + alpha / r B A, in NumPy, with the axes of the file."""
    model = tiny_decoder()
    base = random_variables(model)
    adapted = lora(model, 3, targets="q", alpha=5)
    variables, _, _ = round_trip(tmp_path, adapted, model, base)
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    a, b = file[f"{Q}.lora_A.weight"], file[f"{Q}.lora_B.weight"]
    assert a.shape == (3, 16) and b.shape == (16, 3) and len(file) == 4
    moved = kernels(adapted, variables)["layers.attention.q.kernel"][0]
    plain = base.params["layers"]["attention"]["q"]["kernel"][0]
    np.testing.assert_allclose((moved - plain).reshape(16, 16).T, 5 / 3 * b @ a, atol=1e-6)


def test_q_k_and_v_of_gpt2_become_one_module_whatever_their_factors(tmp_path):
    model = tiny_gpt2()
    base = random_variables(model)
    for targets, rank in (("q,k,v", 6), ("q,v", 4), ("k", 2)):
        adapted = lora(model, 2, targets=targets, alpha=3)
        variables, again, same = round_trip(tmp_path / targets, adapted, model, base)
        a = load_file(tmp_path / targets / "a" / "adapter_model.safetensors")
        assert {x.shape[0] for name, x in a.items() if "lora_A" in name} == {rank}
        assert_same(kernels(again, same), kernels(adapted, variables), atol=1e-6)


def test_parts_of_a_fused_dora_module_without_an_adapter_keep_their_norms(tmp_path):
    model = tiny_gpt2()
    base = random_variables(model)
    adapted = dora(model, 2, targets="v")
    variables, again, same = round_trip(tmp_path, adapted, model, base)
    assert_same(kernels(again, same), kernels(adapted, variables), atol=1e-6)


def edited(folder, change=None, **fields):
    """Writes tensors or fields of a folder anew; a field None is left out."""
    file = folder / "adapter_model.safetensors"
    if change is not None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    path = folder / "adapter_config.json"
    text = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: x for name, x in text.items() if x is not None}))
    return folder


@pytest.fixture
def saved(tmp_path):
    """(folder of a LoRA of rank 2 at q and down, base model, its variables)."""
    model = tiny_decoder(tied=False)
    base = random_variables(model)
    adapted = lora(model, 2, targets="q,mlp.down", alpha=3)
    round_trip(tmp_path, adapted, model, base)
    return tmp_path / "a", model, base


def test_ranks_and_scales_by_layer_are_padded_exactly_and_come_back(saved, tmp_path):
    folder, model, base = saved
    other = Q.replace(".0.", ".1.")

    def change(tensors):
        rng = np.random.default_rng(0)
        tensors[f"{other}.lora_A.weight"] = rng.normal(size=(4, 16)).astype(np.float32)
        tensors[f"{other}.lora_B.weight"] = rng.normal(size=(16, 4)).astype(np.float32)

    edited(folder, change, rank_pattern={"1.self_attn.q_proj": 4}, alpha_pattern={"q_proj": 7})
    adapted, variables = hub.load_adapter(folder, model, base)
    q = variables.params["layers"]["attention"]["q"]["lora"]
    assert q["a"].shape == (2, 16, 4) and not q["a"][0, :, 2:].any() and not q["b"][0, 2:].any()
    file = load_file(folder / "adapter_model.safetensors")
    moved = kernels(adapted, variables)["layers.attention.q.kernel"]
    for layer, (name, rank) in enumerate(((Q, 2), (other, 4))):
        plain = base.params["layers"]["attention"]["q"]["kernel"][layer]
        step = 7 / rank * file[f"{name}.lora_B.weight"] @ file[f"{name}.lora_A.weight"]
        np.testing.assert_allclose((moved[layer] - plain).reshape(16, 16).T, step, atol=1e-5)

    loss = lambda p: jnp.square(adapted.apply(variables._replace(params=p), tokens)[0]).mean()
    tokens = jnp.arange(6)[None]
    grads = jax.grad(loss)(variables.params)["layers"]["attention"]["q"]["lora"]
    assert not grads["a"][0, :, 2:].any() and not grads["b"][0, 2:].any() and grads["a"][0].any()

    hub.save_adapter(adapted, variables, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert {name: x.shape for name, x in again.items()} == {n: x.shape for n, x in file.items()}


def test_layers_without_an_adapter_stay_without(saved, tmp_path):
    folder, model, base = saved
    drop = lambda t: [t.pop(name) for name in list(t) if ".layers.0." in name]
    edited(folder, drop, layers_to_transform=[1])
    adapted, variables = hub.load_adapter(folder, model, base)
    plain, moved = flatten_dict(base.params, sep="."), kernels(adapted, variables)
    name = "layers.mlp.down.kernel"
    np.testing.assert_array_equal(plain[name][0], moved[name][0])
    assert not np.allclose(plain[name][1], moved[name][1])
    hub.save_adapter(adapted, variables, tmp_path / "again")
    assert len(load_file(tmp_path / "again" / "adapter_model.safetensors")) == 4
    again = hub.load_adapter(tmp_path / "again", model, base)
    assert_same(kernels(*again), moved, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_files_dtype_is_kept_unless_b_takes_a_quotient(saved, dtype, tmp_path):
    folder, model, base = saved
    narrow = lambda t: t.update({name: x.astype(jnp.dtype(dtype)) for name, x in t.items()})
    adapted, variables = hub.load_adapter(edited(folder, narrow), model, base)
    assert {x.dtype for x in jax.tree.leaves(variables.params)} == {jnp.dtype(dtype)}
    hub.save_adapter(adapted, variables, tmp_path / "again")
    first, second = (
        load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "again")
    )
    assert_same(first, second, rtol=0)
    edited(folder, alpha_pattern={"q_proj": 7})
    _, folded = hub.load_adapter(folder, model, base)
    assert folded.params["layers"]["attention"]["q"]["lora"]["b"].dtype == jnp.float32


def test_a_narrow_or_quantized_base_takes_the_same_adapter(saved, tmp_path):
    folder, _, base = saved
    narrow = tiny_decoder(tied=False, dtype="bfloat16")
    half = base._replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params))
    rounded = quantized(narrow, "int8", group=4)
    few_bits = attach(rounded, half, jax.random.key(0))
    outputs = []
    for name, model, variables in (("half", narrow, half), ("bits", rounded, few_bits)):
        adapted, own = hub.load_adapter(folder, model, variables)
        assert {x.dtype for x in jax.tree.leaves(own.params)} == {jnp.dtype(jnp.float32)}
        hub.save_adapter(adapted, own, tmp_path / name)
        first, second = (
            load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / name)
        )
        assert_same(first, second, rtol=0)
        outputs.append(adapted.apply(own, jnp.arange(6)[None])[0])
    assert np.abs(outputs[0] - outputs[1]).max() < 0.2 * np.abs(outputs[0]).max()


def test_names_of_older_transformers_are_read(tmp_path):
    model = tiny_vit()
    base = random_variables(model)
    adapted = lora(model, 2, targets="q,mlp.down", trained="head.classifier")
    variables, _, _ = round_trip(tmp_path, adapted, model, base)
    older = {"layers.": "encoder.layer.", "attention.q_proj": "attention.attention.query"}
    older["mlp.fc2"] = "output.dense"

    def change(tensors):
        for name in list(tensors):
            new = name
            for now, then in older.items():
                new = new.replace(now, then)
            tensors[new] = tensors.pop(name)

    names = [f"vit.encoder.layer.{i}.output.dense" for i in (0, 1)]
    folder = edited(tmp_path / "a", change, target_modules=["query", *names])
    again = hub.load_adapter(folder, model, base)
    assert_same(kernels(*again), kernels(adapted, variables), rtol=1e-6)


def test_an_adapter_beside_a_model_leaves_the_model(saved, tmp_path):
    _, model, base = saved
    hub.save(model, base, tmp_path / "both")
    adapted = lora(model, 2)
    hub.save_adapter(adapted, trained(adapted, base), tmp_path / "both")
    loaded, _ = hub.load(tmp_path / "both")
    assert loaded.config == dataclasses.replace(model.config, metadata=loaded.config.metadata)
    hub.load_adapter(tmp_path / "both", model, base)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: np.asarray(value, np.float32)})


# message -> (change of the tensors, fields)
REFUSED = {
    "is of an adapter of type 'IA3'; those that can be read": (None, {"peft_type": "IA3"}),
    "type None": (None, {"peft_type": None}),
    "type \\['LORA'\\]": (None, {"peft_type": ["LORA"]}),
    "r='8'; it should be a whole number": (None, {"r": "8"}),
    "r=True; it should be a whole": (None, {"r": True}),
    "r=0; it should be a whole": (None, {"r": 0}),
    "lora_alpha=inf; it should be a finite": (None, {"lora_alpha": float("inf")}),
    "alpha=-1.0: give": (None, {"lora_alpha": -1}),
    "lora_dropout=\\[\\]; it should": (None, {"lora_dropout": []}),
    "dropout=1.5: give": (None, {"lora_dropout": 1.5}),
    "use_dora=1; it should be true": (None, {"use_dora": 1}),
    "bias='some'; it is none, all": (None, {"bias": "some"}),
    "target_modules=\\[1\\]; it should": (None, {"target_modules": [1]}),
    "names no target_modules": (None, {"target_modules": None}),
    "which means no linear module of this model; it has": (None, {"target_modules": ["query"]}),
    "'\\(' *, which is no pattern": (None, {"target_modules": "("}),
    "rank_pattern={'q_proj': 2.5}; it": (None, {"rank_pattern": {"q_proj": 2.5}}),
    "alpha_pattern=\\['q'\\]; it": (None, {"alpha_pattern": ["q"]}),
    "modules_to_save='head'; it": (None, {"modules_to_save": "head"}),
    "layers_to_transform=\\['0'\\]; it": (None, {"layers_to_transform": ["0"]}),
    "sets lora_bias=True, which is not supported": (None, {"lora_bias": True}),
    "sets layer_replication=\\[\\[0, 1\\]\\], which": (None, {"layer_replication": [[0, 1]]}),
    "init_lora_weights='pissa': its base is not": (None, {"init_lora_weights": "pissa"}),
    "adapter of a GPT2LMHeadModel; this base": (
        None, {"auto_mapping": {"base_model_class": "GPT2LMHeadModel"}},
    ),
    f"lacks the tensor {Q}.lora_A.weight of shape": (drop(f"{Q}.lora_A.weight"), {}),
    f"lacks the tensor {Q}.lora_magnitude_vector": (None, {"use_dora": True}),
    "lacks the tensor base_model.model.lm_head.weight": (None, {"modules_to_save": ["lm_head"]}),
    "q_proj.lora_A.weight has shape \\(2, 16\\) in the file; its config and this base ask for "
    "\\(3, 16\\)": (None, {"r": 3}),
    f"{Q}.lora_B.weight has shape \\(8, 2\\)": (put(f"{Q}.lora_B.weight", np.ones((8, 2))), {}),
    "has a tensor base_model.model.model.layers.7.x.lora_A.weight, but this model has no such "
    "linear module": (put("base_model.model.model.layers.7.x.lora_A.weight", [[1]]), {}),
    "has a tensor base_model.model.q, but this model has no such parameter": (
        put("base_model.model.q", [1]), {},
    ),
    "adapters of tables are not supported": (
        put("base_model.model.model.embed_tokens.lora_embedding_A", [[1]]), {},
    ),
    "lora_A.weight holds NaN": (put(f"{Q}.lora_A.weight", np.full((2, 16), np.nan)), {}),
    "is stored as I32; an adapter's are": (
        lambda tensors: tensors.update({"x": np.zeros(2, np.int32)}), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_poisoned_folders_are_refused_in_one_sentence(saved, message):
    folder, model, base = saved
    change, fields = REFUSED[message]
    with pytest.raises(ValueError, match=message) as error:
        hub.load_adapter(edited(folder, change, **fields), model, base)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_missing_and_broken_files_are_refused(saved, tmp_path):
    folder, model, base = saved
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        hub.load_adapter(tmp_path / "nowhere", model, base)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read as safetensors; it may be cut short"):
        hub.load_adapter(folder, model, base)
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list; a JSON object is wanted"):
        hub.load_adapter(folder, model, base)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        hub.load_adapter(folder, model, base)


def test_an_adapter_of_another_base_is_refused(saved):
    folder, model, base = saved
    wide, deep = tiny_decoder(embed_dim=32), tiny_decoder(num_layers=3)
    with pytest.raises(ValueError, match=r"has shape \(2, 16\) in the file; .* \(2, 32\)"):
        hub.load_adapter(folder, wide, random_variables(wide))
    with pytest.raises(ValueError, match=r"lacks the tensor .*layers\.2\."):
        hub.load_adapter(folder, deep, random_variables(deep))
    with pytest.raises(ValueError, match="this base is a model of type 'bert'"):
        hub.load_adapter(folder, tiny_encoder(), random_variables(tiny_encoder()))
    with pytest.raises(ValueError, match="models that Hugging Face has a format for"):
        hub.load_adapter(folder, tiny_cnn(), random_variables(tiny_cnn()))
    adapted = lora(model, 2)
    with pytest.raises(ValueError, match="has an adapter already; merge it"):
        hub.load_adapter(folder, adapted, attach(adapted, base, jax.random.key(0)))


def test_a_table_that_is_tied_to_the_output_is_trained_only_where_peft_ties_it(saved, tmp_path):
    folder, model, base = saved
    tied = tiny_decoder()
    table = np.ones((64, 16), np.float32)
    edited(folder, put("base_model.model.model.embed_tokens.weight", table))
    _, untied = hub.load_adapter(folder, model, base)
    np.testing.assert_array_equal(untied.params["embed"]["tokens"]["table"], table)
    with pytest.raises(ValueError, match="only with ensure_weight_tying"):
        hub.load_adapter(folder, tied, random_variables(tied))
    edited(folder, ensure_weight_tying=True)
    hub.load_adapter(folder, tied, random_variables(tied))
    edited(folder, put("base_model.model.lm_head.weight", table + 1))
    with pytest.raises(ValueError, match=r"numbers of its own for .*lm_head\.weight"):
        hub.load_adapter(folder, tied, random_variables(tied))
    gpt2 = lora(tiny_gpt2(), 2, trained="embed.tokens")
    with pytest.raises(ValueError, match="only in llama, mistral and qwen2"):
        hub.save_adapter(gpt2, trained(gpt2, random_variables(tiny_gpt2())), tmp_path / "x")


def test_what_has_no_form_in_a_file_is_refused(tmp_path):
    model = tiny_decoder()
    base = random_variables(model)

    def refused(adapted, message, variables=None):
        with pytest.raises(ValueError, match=message):
            hub.save_adapter(adapted, variables or trained(adapted, base), tmp_path / "x")
        assert not (tmp_path / "x").exists()

    refused(model, "has no adapter", base)
    refused(lora(model, 2, targets="q", trained="layers.attention.q"), "kernel of .* beside its")
    inner = lora(model, 2, targets="q")
    outer = dora(inner, 2, targets="up")
    refused(outer, "around another", attach(outer, trained(inner, base), jax.random.key(0)))
    vit = lora(tiny_vit(), 2, trained="embed.class_token")
    variables = trained(vit, random_variables(tiny_vit()))
    refused(vit, "vit.embeddings is trained, but not", variables)
    vit = lora(tiny_vit(), 2, targets="patches")
    refused(vit, "no linear map there", trained(vit, random_variables(tiny_vit())))
    with pytest.raises(ValueError, match=r"adapter alone by `jaxfm\.hub\.save_adapter`"):
        hub.save(inner, trained(inner, base), tmp_path / "x")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "ladder"}, "kind='ladder'; it should be one of lora, dora"),
        ({"size": -1}, "size=-1; it should be a whole number above 0"),
        ({"size": 5}, r"should have shape .* for this base"),
        ({"targets": "o"}, "targets='o'; it should be a list of texts"),
        ({"targets": ["nothing"]}, "matches no kernel"),
        ({"targets": ["o"]}, "for which this model has no place|should have shape"),
    ],
)
def test_poisoned_folders_of_our_own_form_are_refused(tmp_path, fields, message):
    model = tiny_decoder()
    base = random_variables(model)
    round_trip(tmp_path, bottleneck(model, 3, targets="mlp.down"), model, base)
    with pytest.raises(ValueError, match=message):
        hub.load_adapter(edited(tmp_path / "a", **fields), model, base)
