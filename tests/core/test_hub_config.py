"""Configs in Hugging Face's words: read in every spelling, refused if a format lacks them."""

import pytest

from jaxfm import hub
from jaxfm.hub import config as hub_config
from jaxfm.models.families.decoder import DecoderConfig
from jaxfm.rotary import RopeScaling
from jaxfm.testing import random_variables, tiny_decoder

QWEN = {
    "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 2e4},
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, window",
    [
        ({"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, 4),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 9}, None),
    ],
)
def test_qwen2_slides_in_all_layers_or_in_none(changes, window):
    config = hub_config.from_hf(QWEN | changes, "Qwen2ForCausalLM")
    assert config.sliding_window == window
    assert (config.qkv_bias, config.out_bias, config.rope_theta) == (True, False, 2e4)


def test_a_mixture_of_sliding_and_full_layers_is_refused():
    mixed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    with pytest.raises(ValueError, match="Layers of different attention"):
        hub_config.from_hf(QWEN | mixed, "Qwen2ForCausalLM")


def test_both_spellings_of_rope_are_read():
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 16}  # fmt: skip
    plain = {name: value for name, value in QWEN.items() if name != "rope_parameters"}
    old = plain | {"rope_theta": 3e4, "rope_scaling": llama3 | {"rope_type": "llama3"}}
    new = plain | {"rope_parameters": llama3 | {"rope_type": "llama3", "rope_theta": 3e4}}
    configs = [hub_config.from_hf(fields | {"mlp_bias": False}, "LlamaForCausalLM")
               for fields in (old, new)]  # fmt: skip
    assert configs[0] == configs[1]
    assert configs[0].rope_theta == 3e4
    assert configs[0].rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_max_len=16)
    older = plain | {"rope_scaling": {"type": "linear", "factor": 2.0}, "mlp_bias": False}
    read = hub_config.from_hf(older, "LlamaForCausalLM")
    assert read.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert read.rope_theta == 10000.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"qkv_bias": True}, r"LlamaForCausalLM cannot express out_bias=False \(it means True\)"),
        ({"sliding_window": 4}, "cannot express sliding_window=4"),
        ({"norm": "layer"}, "cannot express norm='layer'"),
        ({"family": "mistral", "qkv_bias": True}, "MistralForCausalLM cannot express qkv_bias"),
        ({"embed_dim": 18, "head_dim": 4}, "embed_dim to be a multiple of num_heads; they are 18"),
        ({"family": "gpt2", "num_kv_heads": 4, "head_dim": 6}, "needs embed_dim = num_heads"),
    ],
)
def test_what_a_format_cannot_say_is_refused(changes, message, tmp_path):
    model = tiny_decoder(**changes)
    with pytest.raises(ValueError, match=message):
        hub.save(model, random_variables(model), tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_every_field_of_a_decoder_config_is_said_by_some_format():
    """A field that no format carries would be lost without a word."""
    carried = {"head_dim", "activation", "rope_theta", "rope_scaling", "sliding_window", "qkv_bias",
               "out_bias", "gated", "norm", "positions", "family", "dtype", "metadata",
               "head"}  # fmt: skip
    for fields in hub_config.FIELDS.values():
        carried |= set(fields)
    ours = set(DecoderConfig.__dataclass_fields__)
    assert ours - carried == {"attention_scale", "remat"}
