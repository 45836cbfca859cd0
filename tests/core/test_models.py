"""The model families: sizes as published, what may see what, and inputs that are refused."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.model import count_parameters
from jaxfm.models import CnnConfig, DecoderConfig, EncoderConfig, VitConfig, build
from jaxfm.models.families.cnn import cnn, mlp
from jaxfm.models.families.decoder import gpt2_config
from jaxfm.testing import (
    random_variables,
    tiny_cnn,
    tiny_decoder,
    tiny_encoder,
    tiny_gpt2,
    tiny_vit,
)

TOKENS = np.random.default_rng(0).integers(2, 64, (2, 6)).astype(np.int32)
IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
FAMILIES = {
    "decoder": (tiny_decoder, TOKENS),
    "gpt2": (tiny_gpt2, TOKENS),
    "encoder": (tiny_encoder, {"tokens": TOKENS, "mask": TOKENS > 8}),
    "vit": (tiny_vit, IMAGES),
    "cnn": (tiny_cnn, IMAGES[..., :1]),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize(
    "model, published",
    [
        # SmolLM-135M, Llama 2 7B, Mistral 7B v0.1, Qwen2-0.5B, GPT-2: their model cards.
        (DecoderConfig(vocab_size=49152, embed_dim=576, num_layers=30, num_heads=9, num_kv_heads=3,
                       mlp_dim=1536), 134_515_008),
        (DecoderConfig(vocab_size=32000, embed_dim=4096, num_layers=32, num_heads=32,
                       mlp_dim=11008, tied=False), 6_738_415_616),
        (DecoderConfig(family="mistral", vocab_size=32000, embed_dim=4096, num_layers=32,
                       num_heads=32, num_kv_heads=8, mlp_dim=14336, tied=False), 7_241_732_096),
        (DecoderConfig(family="qwen2", vocab_size=151936, embed_dim=896, num_layers=24,
                       num_heads=14, num_kv_heads=2, mlp_dim=4864, qkv_bias=True), 494_032_768),
        (gpt2_config(vocab_size=50257, embed_dim=768, num_layers=12, num_heads=12, mlp_dim=3072,
                     max_len=1024), 124_439_808),
        # BERT base with its masked-language head, MiniLM-L6 with its pooler, RoBERTa base.
        (EncoderConfig(vocab_size=30522, embed_dim=768, num_layers=12, num_heads=12, mlp_dim=3072),
         109_514_298),
        (EncoderConfig(vocab_size=30522, embed_dim=384, num_layers=6, num_heads=12, mlp_dim=1536,
                       head="pooler"), 22_713_216),
        (EncoderConfig(family="roberta", vocab_size=50265, num_types=1, max_len=514, embed_dim=768,
                       num_layers=12, num_heads=12, mlp_dim=3072, pad_id=1), 124_697_433),
        # ViT-B/16 on ImageNet; the network of McMahan et al. 2017, section 3.
        (VitConfig(embed_dim=768, num_layers=12, num_heads=12, mlp_dim=3072, num_classes=1000),
         86_567_656),
        (CnnConfig(), 1_663_370),
    ],
)  # fmt: skip
def test_published_models_have_their_published_size(model, published):
    shapes = jax.eval_shape(build(model).init, jax.random.key(0))
    assert count_parameters(shapes.params) == published


def test_the_mlp_of_the_federated_papers_has_its_published_size():
    shapes = jax.eval_shape(mlp((784, 200, 200, 10)).init, jax.random.key(0))
    assert count_parameters(shapes.params) == 199_210


@each_family
def test_every_parameter_has_a_gradient_and_recomputing_layers_changes_none(family):
    make, inputs = FAMILIES[family]
    variables = random_variables(make())

    def gradients(model):
        def loss(params):
            outputs, _ = model.apply(variables._replace(params=params), inputs)
            return jnp.square(outputs - 1).mean()

        return jax.jit(jax.grad(loss))(variables.params)

    grads = gradients(make())
    silent = jax.tree.map(lambda g: not np.isfinite(g).all() or not np.any(g), grads)
    silent = {jax.tree_util.keystr(path) for path, s in jax.tree.leaves_with_path(silent) if s}
    # Softmax does not see what is added to the keys of all positions alike.
    assert silent <= {"['layers']['attention']['k']['bias']"}
    if family in ("encoder", "vit"):  # the decoder's has a test of its own
        chex.assert_trees_all_close(grads, gradients(make(remat=True)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["decoder", "vit"])
def test_bfloat16_models_keep_bfloat16_and_give_float32_logits(family):
    make, inputs = FAMILIES[family]
    model, exact = make(dtype="bfloat16"), make()
    variables = jax.eval_shape(model.init, jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables.params)} == {"bfloat16"}
    values = random_variables(exact)
    halves = jax.tree.map(lambda x, like: x.astype(like.dtype), values, variables)
    logits, _ = jax.jit(model.apply)(halves, inputs)
    assert logits.dtype == jnp.float32
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), halves)
    expected, _ = jax.jit(exact.apply)(rounded, inputs)
    # bfloat16 keeps 8 bits: a relative error of 2^-8 at each of about 20 steps.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.08 * np.abs(expected).max())


@pytest.mark.parametrize("family, pad", [("bert", 0), ("roberta", 1)])
def test_padding_changes_nothing_for_real_tokens(family, pad):
    model = tiny_encoder(family=family, pad_id=pad, head="none")
    variables = random_variables(model)
    apply = jax.jit(model.apply)
    alone, _ = apply(variables, {"tokens": TOKENS})
    padded = np.pad(TOKENS, ((0, 0), (0, 3)), constant_values=pad)
    real = np.pad(np.ones_like(TOKENS), ((0, 0), (0, 3)))
    together, _ = apply(variables, {"tokens": padded, "mask": real})
    np.testing.assert_allclose(together[:, :6], alone, rtol=1e-5, atol=1e-5)
    unmasked, _ = apply(variables, {"tokens": padded})
    assert not np.allclose(unmasked[:, :6], alone, rtol=1e-3, atol=1e-3)


def test_robertas_positions_start_after_its_padding_token():
    model = tiny_encoder(family="roberta", pad_id=1, head="none", max_len=8)
    variables = random_variables(model)
    apply = jax.jit(model.apply)
    expected, _ = apply(variables, {"tokens": TOKENS})
    table = variables.params["embed"]["positions"]["table"]
    params = {**variables.params, "embed": {**variables.params["embed"]}}
    params["embed"]["positions"] = {"table": table.at[:2].set(jnp.nan)}
    same, _ = apply(variables._replace(params=params), {"tokens": TOKENS})
    chex.assert_trees_all_equal(same, expected)  # rows 0 and 1 are never read
    with pytest.raises(ValueError, match="have 7 tokens, but the model has 6 positions"):
        apply(variables, {"tokens": np.full((1, 7), 3, np.int32)})


def test_segments_matter_and_default_to_zero():
    model = tiny_encoder()
    variables = random_variables(model)
    apply = jax.jit(model.apply)
    plain, _ = apply(variables, {"tokens": TOKENS})
    zeros, _ = apply(variables, {"tokens": TOKENS, "types": np.zeros_like(TOKENS)})
    ones, _ = apply(variables, {"tokens": TOKENS, "types": np.ones_like(TOKENS)})
    chex.assert_trees_all_equal(plain, zeros)
    assert not np.allclose(plain, ones, atol=1e-4)


def test_pixels_beyond_the_last_whole_patch_are_dropped():
    model = tiny_vit(image_size=(9, 11))
    variables = random_variables(model)
    images = np.random.default_rng(2).normal(size=(1, 9, 11, 3)).astype(np.float32)
    expected, _ = jax.jit(model.apply)(variables, images)
    images[:, 8:], images[:, :, 8:] = 9.0, 9.0
    same, _ = jax.jit(model.apply)(variables, images)
    chex.assert_trees_all_equal(same, expected)
    assert variables.params["embed"]["positions"].shape == (1 + 4, 16)


def test_an_mlp_learns_a_pattern():
    model = mlp((4, 16, 2))
    variables = model.init(jax.random.key(0))
    points = np.random.default_rng(0).normal(size=(256, 2, 2)).astype(np.float32)
    labels = (points[:, 0, 0] * points[:, 1, 1] > 0).astype(np.int32)  # not linear

    def loss(params):
        logits, _ = model.apply(variables._replace(params=params), points)
        chosen = jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, 2)
        return -chosen.sum(-1).mean()

    def step(params, _):
        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda x, g: x - 0.5 * g, params, grads), value

    values = jax.jit(lambda params: jax.lax.scan(step, params, None, 400)[1])(variables.params)
    assert values[0] > 0.6
    assert values[-1] < 0.15


def test_each_config_builds_its_own_family():
    for make, _ in FAMILIES.values():
        config = make().config
        assert build(config).config == config
    with pytest.raises(TypeError, match=r"Expected one of DecoderConfig, .*; got dict"):
        build({})


def test_an_encoder_takes_the_names_that_tokenizers_give():
    model = tiny_encoder()
    variables = random_variables(model)
    mask, types = (TOKENS > 9).astype(np.int64), TOKENS % 2
    ours = {"tokens": TOKENS, "mask": mask, "types": types}
    theirs = {"input_ids": TOKENS.astype(np.int64), "attention_mask": mask, "token_type_ids": types}
    chex.assert_trees_all_equal(*(model.apply(variables, x)[0] for x in (ours, theirs)))


@pytest.mark.parametrize(
    "inputs, message",
    [
        (TOKENS, "takes a dict of 'tokens'.*; got ndarray"),
        ({"mask": TOKENS}, r"got \['mask'\]"),
        ({"tokens": TOKENS, "segments": TOKENS}, r"got \['segments', 'tokens'\]"),
        ({"tokens": TOKENS, "input_ids": TOKENS}, r"got \['input_ids', 'tokens'\]"),
        ({"tokens": TOKENS.tolist()}, r"arrays of one shape \[B, T\]; got {'tokens': 'list'}"),
        ({"tokens": TOKENS, "mask": TOKENS[:, :2]}, r"one shape \[B, T\]; got"),
        ({"tokens": TOKENS[0]}, r"one shape \[B, T\]; got {'tokens': \(6,\)}"),
        ({"tokens": np.zeros((1, 65), np.int32)}, "have 65 tokens, but the model has 64"),
    ],
)
def test_inputs_that_an_encoder_cannot_read_are_refused(inputs, message):
    model = tiny_encoder()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda v: model.apply(v, inputs), jax.eval_shape(model.init, KEY))


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "model, inputs, message",
    [
        (tiny_vit(), IMAGES[:, :4], r"shape \(2, 4, 8, 3\); this model takes .*\[B, 8, 8, 3\]"),
        (tiny_cnn(), IMAGES, r"shape \(2, 8, 8, 3\); this model takes .*\[B, 8, 8, 1\]"),
        (tiny_gpt2(), np.zeros((1, 65), np.int32), "have 65 tokens, but the model has 64"),
    ],
)
def test_inputs_of_the_wrong_size_are_refused(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda v: model.apply(v, inputs), jax.eval_shape(model.init, KEY))


@pytest.mark.parametrize(
    "make, changes, message",
    [
        (tiny_decoder, {"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        (tiny_decoder, {"head_dim": 3}, "Rotary positions need an even head_dim, got 3"),
        (tiny_decoder, {"mlp_dim": 0}, "mlp_dim must be at least 1, got 0"),
        (tiny_decoder, {"activation": "tanh"}, r"activation must be one of \('silu', .*'tanh'"),
        (tiny_decoder, {"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        (tiny_encoder, {"family": "albert"}, "family must be one of .*got 'albert'"),
        (tiny_encoder, {"head": "qa"}, "head must be one of .*got 'qa'"),
        (tiny_vit, {"patch_size": 9}, r"\(8, 8\) pixels holds no patch of \(9, 9\)"),
        (tiny_vit, {"image_size": (8, 8, 3)}, r"one number or \(height, width\), got \(8, 8, 3\)"),
        (tiny_cnn, {"image_size": (3, 8)}, r"must be \(height, width\) >= 4, got \(3, 8\)"),
        (tiny_cnn, {"conv_channels": (4,)}, r"conv_channels must be two counts, got \(4,\)"),
    ],
)
def test_configs_that_make_no_sense_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_mlps_of_no_layers_are_refused():
    with pytest.raises(ValueError, match=r"sizes must be counts .*; got \(4,\)"):
        mlp((4,))


def test_the_default_cnn_is_the_papers():
    assert cnn().config == CnnConfig(image_size=(28, 28), conv_channels=(32, 64), dense_dim=512)
    assert dataclasses.asdict(CnnConfig())["num_classes"] == 10
