"""Files of pretrained models: what is written is read back, and what does not fit is named."""

import dataclasses
import json
import os
import pathlib
import struct
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxfm import hub
from jaxfm.hub.metadata import stop_tokens
from jaxfm.model import from_nnx, layers_of, unstack, with_layers
from jaxfm.models import build, mlp
from jaxfm.rotary import RopeScaling
from jaxfm.subnet import Subnet, axis_sizes, extract, mask, width
from jaxfm.testing import (
    random_variables,
    tiny_cnn,
    tiny_decoder,
    tiny_encoder,
    tiny_gpt2,
    tiny_mobilenet,
    tiny_resnet,
    tiny_shufflenet,
    tiny_vgg,
    tiny_vit,
)
from jaxfm.tokenizer import ByteTokenizer

OWN = {
    "mlp": mlp((5, 4, 3)), "cnn": tiny_cnn(), "resnet": tiny_resnet(), "vgg": tiny_vgg(),
    "mobilenet": tiny_mobilenet(), "shufflenet": tiny_shufflenet(),
}  # fmt: skip
MODELS = {
    "llama": tiny_decoder(),
    "llama untied, biases, explicit head_dim": tiny_decoder(
        tied=False, qkv_bias=True, out_bias=True, mlp_bias=True, head_dim=6
    ),
    "llama3 rope": tiny_decoder(
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_len=32), rope_theta=5e5
    ),
    "yarn rope": tiny_decoder(
        rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_len=16, truncate=False)
    ),
    "linear rope": tiny_decoder(rope_scaling=RopeScaling(kind="linear", factor=2.0)),
    "mistral": tiny_decoder(family="mistral", sliding_window=3),
    "qwen2": tiny_decoder(family="qwen2", qkv_bias=True, sliding_window=5),
    "gpt2": tiny_gpt2(),
    "bert": tiny_encoder(),
    "bert without a head": tiny_encoder(head="none"),
    "roberta": tiny_encoder(family="roberta", pad_id=1, num_types=1),
    "classifier": tiny_encoder(head="classify", num_classes=7),
    "vit": tiny_vit(),
    "vit pooler": tiny_vit(head="pooler", image_size=(8, 12), num_classes=2),
}


@pytest.fixture
def saved(tmp_path) -> pathlib.Path:
    model = tiny_decoder()
    hub.save(model, random_variables(model), tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: pathlib.Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: pathlib.Path, drop=(), **changes) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    tensors = {name: x for name, x in tensors.items() if name not in drop}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", MODELS)
def test_what_is_saved_is_loaded(case, tmp_path):
    model = MODELS[case]
    variables = random_variables(model)
    hub.save(model, variables, tmp_path / "model")
    loaded, same = hub.load(tmp_path / "model")
    config = model.config
    scale = config.attention_scale or config.head_dim**-0.5
    assert loaded.config.attention_scale in (None, scale)
    assert loaded.config == config
    chex.assert_trees_all_equal(same, variables)
    assert os.listdir(tmp_path) == ["model"]  # no work folder is left behind


@pytest.mark.parametrize("family", OWN)
def test_our_own_networks_are_saved_and_loaded(family, tmp_path):
    model = OWN[family]
    variables = random_variables(model)
    hub.save(model, variables, tmp_path / "model", classes=("a", "b"))
    loaded, same = hub.load(tmp_path / "model")
    assert loaded.config == model.config
    chex.assert_trees_all_equal(same, variables)
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (about["family"], about["classes"]) == (family, ["a", "b"])
    half = width(axis_sizes(variables, model.axes), {"dense": 0.5}) if family == "cnn" else None
    if half is not None:
        small = extract(variables, model.axes, half)
        hub.save(model, small, tmp_path / "model")
        chex.assert_trees_all_equal(hub.load(tmp_path / "model")[1], small)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "lenet"}, "says family='lenet'; it must be one of mlp, cnn"),
        ({"fields": {"sizes": [5]}}, "is no config of a mlp: sizes must be counts"),
        ({"fields": {"size": [5, 2]}}, "MlpConfig has no 'size'. Did you mean sizes"),
        ({"fields": {"sizes": [5, 3]}}, "dense1.bias has shape .4,. in the file; the config asks"),
        ({"fields": {"sizes": [5, 4, 4, 3]}}, "lacks the tensor params.dense3.bias"),
    ],
)
def test_damaged_folders_of_our_own_networks_are_named(changes, message, tmp_path):
    hub.save(OWN["mlp"], random_variables(OWN["mlp"]), tmp_path / "model")
    edit_config(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=message):
        hub.load(tmp_path / "model")


def test_shards_and_their_index_are_read_back(tmp_path):
    model = tiny_decoder()
    variables = random_variables(model)
    hub.save(model, variables, tmp_path / "a", max_shard_bytes=4000)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    biggest = max(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors"))
    assert biggest < 4000 + 3000  # and the header
    chex.assert_trees_all_equal(hub.load(tmp_path / "a")[1], variables)
    (tmp_path / "a" / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {files[1]}, which its index names"):
        hub.load(tmp_path / "a")
    hub.save(model, variables, tmp_path / "a")  # one file now: nothing of the old ones stays
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "config.json", "model.safetensors",
    }  # fmt: skip
    chex.assert_trees_all_equal(hub.load(tmp_path / "a")[1], variables)


def test_bfloat16_is_read_without_a_detour(tmp_path):
    model = tiny_decoder(dtype="bfloat16", vocab_size=50_000, embed_dim=64, mlp_dim=128)
    variables = random_variables(model)
    hub.save(model, variables, tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    hub.load(tmp_path / "model")  # imports and caches
    tracemalloc.start()
    loaded, same = hub.load(tmp_path / "model")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    chex.assert_trees_all_equal(same.params, variables.params)
    assert loaded.config.dtype == "bfloat16"
    # The stacked leaf and one tensor read from the file, both bfloat16; float32 would be twice.
    assert peak < 2.5 * size


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_dtype_may_be_asked_for(saved, dtype):
    model, variables = hub.load(saved, dtype=dtype)
    assert model.config.dtype == dtype
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables.params)} == {dtype}
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16"):
        hub.load(saved, dtype="int8")


def test_leaves_go_where_they_are_told(saved):
    mesh = jax.make_mesh((2,), ("tensor",))
    spread = jax.sharding.PartitionSpec("tensor")
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shardings(model):
        place = lambda x: jax.sharding.NamedSharding(mesh, spread) if x.shape[0] == 64 else whole
        return jax.tree.map(place, jax.eval_shape(model.init, jax.random.key(0)))

    _, variables = hub.load(saved, shardings=shardings)
    assert variables.params["embed"]["tokens"]["table"].sharding.spec == spread
    assert variables.live["head"]["norm"]["live"].sharding == whole
    _, variables = hub.load(saved, shardings=whole)
    assert all(leaf.sharding == whole for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("form", ["missing", "extra", "misshapen", "quantised"])
def test_a_tensor_that_does_not_fit_is_named(saved, form):
    name = "model.layers.1.mlp.up_proj.weight"
    if form == "missing":
        edit_tensors(saved, drop=[name])
        message = (
            rf"lacks the tensor {name} of shape \(24, 16\), for layers.mlp.up.kernel \(16, 24\)"
        )
    elif form == "extra":
        edit_tensors(saved, **{"model.layers.2.mlp.up_proj.weight": np.zeros((24, 16))})
        message = r"model.layers.2.mlp.up_proj.weight is stored as F64"
    elif form == "misshapen":
        edit_tensors(saved, **{name: np.zeros((24, 17), np.float32)})
        message = rf"{name} has shape \(24, 17\) in the file; the config asks for \(24, 16\)"
    else:
        edit_tensors(saved, **{name: np.zeros((24, 16), np.int8)})
        message = rf"{name} is stored as I8; quantised weights are not supported"
    with pytest.raises(ValueError, match=message):
        hub.load(saved)


def test_a_tensor_without_a_place_is_named(saved):
    edit_tensors(saved, **{"model.layers.2.mlp.up_proj.weight": np.zeros((24, 16), np.float32)})
    message = r"tensor model.layers.2.mlp.up_proj.weight of shape \(24, 16\), for which this"
    with pytest.raises(ValueError, match=message):
        hub.load(saved)


def test_buffers_copies_and_old_names_are_accepted(tmp_path):
    """Buffers of any dtype and shape; copies of what the config ties, if they are copies."""
    buffer = np.arange(3)
    cases = [
        (tiny_decoder(), ["model.layers.0.self_attn.rotary_emb.inv_freq"],
         {"lm_head.weight": "model.embed_tokens.weight"}),
        (tiny_gpt2(), ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
         {"lm_head.weight": "transformer.wte.weight"}),
        (tiny_encoder(), ["bert.embeddings.position_ids"],
         {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
          "cls.predictions.decoder.bias": "cls.predictions.bias"}),
    ]  # fmt: skip
    for i, (model, buffers, copies) in enumerate(cases):
        variables, folder = random_variables(model), tmp_path / str(i)
        hub.save(model, variables, folder)
        tensors = load_file(folder / "model.safetensors")
        same = {name: tensors[original] for name, original in copies.items()}
        edit_tensors(folder, **dict.fromkeys(buffers, buffer), **same)
        tensors = load_file(folder / "model.safetensors")
        old = {  # names of the first years: no prefix of the model, gamma and beta
            name.removeprefix("transformer.")
            .replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta"): x
            for name, x in tensors.items()
        }
        save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
        chex.assert_trees_all_equal(hub.load(folder)[1], variables)
        name = next(iter(same))
        edit_tensors(folder, **{name: same[name] + 1})
        with pytest.raises(ValueError, match=f"ties {name} to .*, but the file holds other numb"):
            hub.load(folder)
    untied = tiny_decoder(tied=False)
    hub.save(untied, random_variables(untied), tmp_path / "untied")
    edit_tensors(tmp_path / "untied", drop=["lm_head.weight"])
    with pytest.raises(ValueError, match=r"lacks the tensor lm_head\.weight"):
        hub.load(tmp_path / "untied")


def test_heads_without_a_use_are_named(tmp_path):
    model = tiny_encoder()
    variables = random_variables(model)
    hub.save(model, variables, tmp_path / "model")
    heads = ["cls.seq_relationship.bias", "bert.pooler.dense.weight"]
    edit_tensors(tmp_path / "model", **dict.fromkeys(heads, np.zeros(3, np.float32)))
    with pytest.warns(UserWarning, match=r"passed over.*pooler\.dense\.weight, cls\.seq_rel"):
        chex.assert_trees_all_equal(hub.load(tmp_path / "model")[1], variables)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", '{"a": ', "config.json is not JSON: Expecting value"),
        ("config.json", "[1]", "config.json holds a list; a JSON object is wanted"),
        ("config.json", '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", '
         '"hidden_size": "wide"}', "config.json is no config of a llama: "),
        ("generation_config.json", "{", "generation_config.json is not JSON"),
        ("model.safetensors", None, "model.safetensors cannot be read as safetensors; it may be"),
        ("model.safetensors", "text", "model.safetensors cannot be read as safetensors"),
        ("model.safetensors.index.json", "{", "index.json is no index of safetensors files"),
        ("model.safetensors.index.json", "{}", "index.json is no index .* .KeyError"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(saved, name, content, message):
    path = saved / name
    if content is None:
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_text(content)
    if "index" in name:
        (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        hub.load(saved)


def test_metadata_goes_through_a_save(saved, tmp_path):
    """Also after a cut; a file of transformers reads it all."""
    from transformers import AutoConfig, GenerationConfig

    generation = {"eos_token_id": [3, 7], "temperature": 0.6, "do_sample": True, "_from": "x"}
    edit_config(saved, eos_token_id=[3, 5], bos_token_id=1, pad_token_id=9, own_note="kept")
    (saved / "generation_config.json").write_text(json.dumps(generation))
    model, variables = hub.load(saved)
    assert stop_tokens(model.config) == [3, 5, 7]
    cut = extract(variables, model.axes, Subnet({"mlp": np.arange(8)}))
    hub.save(model, cut, tmp_path / "cut")
    fields = AutoConfig.from_pretrained(tmp_path / "cut").to_dict()
    assert fields["intermediate_size"] == 8 and fields["own_note"] == "kept"
    assert [fields[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, [3, 5], 9]
    assert GenerationConfig.from_pretrained(tmp_path / "cut").eos_token_id == [3, 7]
    assert json.loads((tmp_path / "cut" / "generation_config.json").read_text()) == generation
    assert hub.load(tmp_path / "cut")[0].config.metadata["generation"] == generation
    # Another model in the same folder does not inherit it; a tokenizer names its own tokens.
    small = tiny_decoder(vocab_size=300)
    hub.save(small, random_variables(small), tmp_path / "cut", ByteTokenizer())
    assert stop_tokens(hub.load(tmp_path / "cut")[0].config) == [ByteTokenizer.eos_id]


def test_names_of_labels_go_through_a_save_unless_their_number_changes(tmp_path):
    model = tiny_encoder(head="classify", num_classes=3)
    hub.save(model, random_variables(model), tmp_path / "a")
    names = {"0": "bad", "1": "so", "2": "good"}
    edit_config(tmp_path / "a", id2label=names, label2id={v: int(k) for k, v in names.items()})
    loaded, variables = hub.load(tmp_path / "a")
    hub.save(loaded, variables, tmp_path / "b")
    read = lambda name: json.loads((tmp_path / name / "config.json").read_text()).get("id2label")
    assert read("b") == names
    other = tiny_encoder(head="classify", num_classes=2)
    config = dataclasses.replace(other.config, metadata=loaded.config.metadata)
    hub.save(build(config), random_variables(other), tmp_path / "c")
    assert read("c") in (None, {"0": "LABEL_0", "1": "LABEL_1"})


def test_the_original_length_of_yarn_may_stand_at_the_top(saved):
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    edit_config(saved, rope_parameters=rope, original_max_position_embeddings=16)
    assert hub.load(saved)[0].config.rope_scaling.original_max_len == 16


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM' is not supported; known"),
        ({"hidden_act": "xielu"}, "activation 'xielu' is not supported; known are silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
         "Rope of type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                              "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"num_local_experts": 8}, "num_local_experts=8 is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config=.*not supported"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        hub.load(saved)


def test_masked_and_unequal_models_are_refused(tmp_path):
    model = tiny_decoder()
    variables = random_variables(model)
    masked = mask(variables, model.axes, Subnet({"embed": np.arange(8)}))
    with pytest.raises(ValueError, match="Some channels are masked; save the result of"):
        hub.save(model, masked, tmp_path / "model")
    ragged = extract(variables, model.axes, Subnet({"mlp": [np.arange(3), np.arange(4)]}))
    with pytest.raises(ValueError, match="The layers have unequal widths"):
        hub.save(model, ragged, tmp_path / "model")
    users = from_nnx(lambda rngs: nnx.Linear(2, 2, rngs=rngs))
    with pytest.raises(TypeError, match="A model of NoneType has no format of a folder"):
        hub.save(users, random_variables(users), tmp_path / "model")
    pooled = tiny_encoder(head="classify")
    narrow = extract(random_variables(pooled), pooled.axes, Subnet({"embed": np.arange(8)}))
    with pytest.raises(ValueError, match=r"head[.]classifier[.]kernel has shape \(16, 2\)"):
        hub.save(pooled, narrow, tmp_path / "model")


def test_unstacked_layers_are_saved_as_stacked_ones(tmp_path):
    model = tiny_decoder()
    variables = random_variables(model)
    apart = with_layers(variables, unstack(layers_of(variables)))
    hub.save(model, apart, tmp_path / "model")
    chex.assert_trees_all_equal(hub.load(tmp_path / "model")[1], variables)


def test_a_tokenizer_is_saved_beside_the_model(tmp_path):
    from jaxfm.tokenizer import load_tokenizer

    model = tiny_decoder(vocab_size=300)
    hub.save(model, random_variables(model), tmp_path / "model", ByteTokenizer())
    text = "naïve → \x00"
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    assert fields["eos_token_id"] == ByteTokenizer().eos_id


@pytest.mark.parametrize(
    "name, message",
    [
        ("/nowhere/at/all", "There is no folder /nowhere/at/all"),
        ("./here", "There is no folder ./here"),
        (
            "nobody/such-a-model",
            "No model 'nobody/such-a-model': there is no such folder, the local",
        ),
    ],
)
def test_a_model_that_is_nowhere_gives_one_sentence(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        hub.load(name)


def test_a_folder_without_the_files_says_which(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        hub.load(tmp_path)
    hub.save(tiny_decoder(), random_variables(tiny_decoder()), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetens"):
        hub.load(tmp_path / "model")


def write_llama2c(path: pathlib.Path, model, variables, theta=10000.0) -> None:
    """The inverse of the loader, written out by hand: neighbours as rotary pairs."""
    c, params, layers = model.config, variables.params, variables.params["layers"]
    dim, depth, half = c.embed_dim, c.num_layers, c.head_dim // 2
    attention, mlp = layers["attention"], layers["mlp"]

    def rotary(kernel):  # [L, D, heads..., K] -> rows (head, pair, half) of [L, heads * K, D]
        rows = np.asarray(kernel).reshape(depth, dim, -1, 2, half)
        return rows.transpose(0, 2, 4, 3, 1)

    matrix = lambda kernel: np.asarray(kernel).reshape(depth, kernel.shape[1], -1).swapaxes(1, 2)
    parts = [
        params["embed"]["tokens"]["table"], layers["attention_norm"]["scale"],
        rotary(attention["q"]["kernel"]), rotary(attention["k"]["kernel"]),
        matrix(attention["v"]["kernel"]),
        np.asarray(attention["o"]["kernel"]).reshape(depth, -1, dim).swapaxes(1, 2),
        layers["mlp_norm"]["scale"], matrix(mlp["gate"]["kernel"]), matrix(mlp["down"]["kernel"]),
        matrix(mlp["up"]["kernel"]), params["head"]["norm"]["scale"],
        np.zeros((2, c.max_len, half)),
    ]  # fmt: skip
    vocab = c.vocab_size
    if not c.tied:
        parts.append(np.asarray(params["head"]["out"]["kernel"]).T)
        vocab = -vocab
    header = (dim, c.mlp_dim, depth, c.num_heads, c.num_kv_heads, vocab, c.max_len)
    values = b"".join(np.asarray(part, "<f4").tobytes() for part in parts)
    path.write_bytes(struct.pack("<7i", *header) + values)


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama2c_file_is_read_as_it_was_written(tied, tmp_path):
    model = tiny_decoder(tied=tied)
    variables = random_variables(model)
    write_llama2c(tmp_path / "model.bin", model, variables)
    loaded, same = hub.load_llama2c(tmp_path / "model.bin")
    assert loaded.config == model.config
    chex.assert_trees_all_equal(same, variables)


def test_a_llama2c_file_of_the_wrong_length_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    write_llama2c(path, tiny_decoder(), random_variables(tiny_decoder()))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"holds \d+ numbers, but its header .* asks for \d+"):
        hub.load_llama2c(path)
    path.write_bytes(b"text, not numbers: a folder was meant")
    with pytest.raises(ValueError, match=r"asks for \d+"):
        hub.load_llama2c(path)


@pytest.mark.skipif("JAXFM_DATA_DIR" not in os.environ, reason="needs the data folder")
def test_a_published_checkpoint_tells_its_story():
    from jaxfm.tokenizer import load_tokenizer

    pytest.importorskip("sentencepiece")
    folder = pathlib.Path(os.environ["JAXFM_DATA_DIR"], "stories260k")
    model, variables = hub.load_llama2c(folder / "stories260K.bin")
    length = 201

    @jax.jit
    def complete(variables):
        def step(i, tokens):
            logits, _ = model.apply(variables, tokens)
            return tokens.at[0, i + 1].set(logits[0, i].argmax().astype(jnp.int32))

        return jax.lax.fori_loop(0, length - 1, step, jnp.ones((1, length), jnp.int32))

    tokens = np.asarray(complete(variables))[0].tolist()
    text = load_tokenizer(folder / "tok512.model").decode(tokens[1:])
    assert text.strip() == (folder / "greedy_200_steps.txt").read_text().strip()
