"""Adapters compute what the `peft` package computes with them, whoever wrote the files.

Tolerance: as in test_parity.py.
"""

import warnings

import jax
import numpy as np
import pytest
from test_parity import TOKENS, TOLERANCE, opened_by_torch, torch_logits, torch_model

from jaxfm import hub
from jaxfm.adapters import merge

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

LLAMA = {"num_key_value_heads": 2}
MASK = np.arange(12)[None] < np.array([[12], [7]])
TEXT = (
    {"tokens": TOKENS, "mask": MASK},
    {"input_ids": TOKENS, "attention_mask": MASK.astype("i4")},
)
IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
PIXELS = (IMAGES, {"pixel_values": IMAGES.transpose(0, 3, 1, 2)})

# name -> (model type, class, changes, options of LoraConfig)
CASES = {
    "llama": ("llama", "LlamaForCausalLM", LLAMA, {"target_modules": ["q_proj", "v_proj"]}),
    "mistral, dora, all linear maps": (
        "mistral", "MistralForCausalLM", LLAMA | {"sliding_window": 4},
        {"target_modules": "all-linear", "use_dora": True, "lora_alpha": 5},
    ),
    "qwen2, stabilised, biases of targets": (
        "qwen2", "Qwen2ForCausalLM", LLAMA,
        {"target_modules": r".*\.(q|o)_proj", "use_rslora": True, "lora_alpha": 3,
         "bias": "lora_only"},
    ),
    "llama, ranks by layer, some layers": (
        "llama", "LlamaForCausalLM", LLAMA | {"num_hidden_layers": 3},
        {"target_modules": ["q_proj", "down_proj", "o_proj"], "layers_to_transform": [0, 2],
         "r": 4, "lora_alpha": 6, "rank_pattern": {"layers.2.self_attn.q_proj": 7, "o_proj": 2},
         "alpha_pattern": {"down_proj": 12, "model.layers.0.self_attn.o_proj": 1}},
    ),
    "llama, dora, one layer, tables": (
        "llama", "LlamaForCausalLM", LLAMA,
        {"target_modules": ["up_proj"], "layers_to_transform": 1, "use_dora": True,
         "modules_to_save": ["embed_tokens", "lm_head", "norm"], "task_type": "CAUSAL_LM"},
    ),
    "llama, tied": (
        "llama", "LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
         "ensure_weight_tying": True},
    ),
    "gpt2": (
        "gpt2", "GPT2LMHeadModel", {},
        {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "bias": "lora_only"},
    ),
    "gpt2, dora": (
        "gpt2", "GPT2LMHeadModel", {},
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True,
         "rank_pattern": {"h.1.attn.c_attn": 3}},
    ),
    "bert, a head, all biases": (
        "bert", "BertForSequenceClassification", {"pad_token_id": 0, "num_labels": 3},
        {"target_modules": ["query", "value", "output.dense"], "bias": "all",
         "task_type": "SEQ_CLS"},
    ),
    "bert, masked": (
        "bert", "BertForMaskedLM", {"pad_token_id": 0},
        {"target_modules": "all-linear", "exclude_modules": ["key"], "bias": "all"},
    ),
    "roberta, a head": (
        "roberta", "RobertaForSequenceClassification", {"pad_token_id": 1, "num_labels": 3},
        {"target_modules": ["key", "intermediate.dense"], "task_type": "SEQ_CLS"},
    ),
    "vit, a head": (
        "vit", "ViTForImageClassification",
        {"image_size": 8, "patch_size": 4, "num_labels": 5},
        {"target_modules": ["q_proj", "o_proj", "fc2"], "modules_to_save": ["classifier"],
         "use_dora": True},
    ),
}  # fmt: skip


def randomised(model, seed=0):
    """The model with random numbers wherever something is trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for leaf in model.parameters():
            if leaf.requires_grad:
                leaf.add_(0.2 * torch.randn_like(leaf))
    return model.eval()


def inputs_of(model_type):
    if model_type == "vit":
        return PIXELS
    if model_type in ("bert", "roberta"):
        return TEXT
    return TOKENS, {"input_ids": TOKENS}


def logits(model, variables, inputs):
    output = jax.jit(model.apply)(variables, inputs)[0]
    return np.asarray(output["tokens"] if isinstance(output, dict) else output)


def adapted_by_peft(model, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomised(peft.get_peft_model(model, peft.LoraConfig(**{"r": 4} | options)))


def opened_by_peft(base, class_name, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(opened_by_torch(base, class_name), folder).eval()
    said = [str(warning.message) for warning in caught]
    assert not [text for text in said if "missing" in text or "unexpected" in text], said
    return model


@pytest.mark.parametrize("case", CASES)
def test_adapters_agree_both_ways(case, tmp_path):
    model_type, class_name, changes, options = CASES[case]
    theirs = torch_model(model_type, class_name, changes)
    theirs.save_pretrained(tmp_path / "base")
    inputs, torch_inputs = inputs_of(model_type)
    rows = MASK if class_name.endswith("MaskedLM") else ...
    plain = torch_logits(theirs, **torch_inputs)[rows]
    theirs = adapted_by_peft(theirs, options)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs, **torch_inputs)[rows]
    assert np.abs(expected - plain).max() > 0.1  # the adapter is of weight

    base = hub.load(tmp_path / "base")
    model, variables = hub.load_adapter(tmp_path / "theirs", *base)
    np.testing.assert_allclose(
        logits(model, variables, inputs)[rows], expected, rtol=0, atol=TOLERANCE
    )
    if case == "gpt2, dora":
        merged, whole = merge(model, variables)
        np.testing.assert_allclose(logits(merged, whole, inputs)[rows], expected, atol=TOLERANCE)

    hub.save_adapter(model, variables, tmp_path / "ours")
    again = opened_by_peft(tmp_path / "base", class_name, tmp_path / "ours")
    np.testing.assert_allclose(
        torch_logits(again, **torch_inputs)[rows], expected, rtol=0, atol=TOLERANCE
    )
