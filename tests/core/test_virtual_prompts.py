"""Soft prompts and prefixes: what they compute, and what of them is trained and sent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.adapters import (
    attach,
    detach,
    lora,
    merge,
    prefix_tuning,
    quantized,
    read_prompts,
    settled,
    soft_prompt,
)
from jaxfm.cost import num_bytes
from jaxfm.model import layers_of, unstack, with_layers
from jaxfm.models.families.decoder import DecoderConfig, decoder
from jaxfm.models.families.encoder import EncoderConfig, encoder
from jaxfm.subnet import axis_sizes, extract, mask, width
from jaxfm.testing import (
    random_variables,
    tiny_cnn,
    tiny_decoder,
    tiny_encoder,
    tiny_gpt2,
    tiny_vit,
)

PROMPT = (5, 9, 3)
TEXT = jnp.asarray([[1, 2, 3, 4, 5], [7, 8, 9, 9, 1]], jnp.int32)
KEY = jax.random.key(0)
CAUSAL = {
    "llama": tiny_decoder(),
    "window": tiny_decoder(sliding_window=4),
    "gpt2": tiny_gpt2(),
}
ENCODERS = {
    "bert": tiny_encoder(head="tag", num_classes=3),
    "roberta": tiny_encoder(head="none", family="roberta", pad_id=0),
}


def apply(model, variables, inputs):
    """The outputs, compiled: one operation after another takes longer."""
    return jax.jit(model.apply)(variables, inputs)[0]


def close(ours, theirs, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), ours, theirs)


def with_prompt(model, variables, tokens=PROMPT, **more):
    adapted = soft_prompt(model, len(tokens), init=tokens, **more)
    return adapted, attach(adapted, variables, KEY)


def ahead(tokens=PROMPT, text=TEXT):
    first = jnp.broadcast_to(jnp.asarray(tokens, jnp.int32), (text.shape[0], len(tokens)))
    return jnp.concatenate([first, text], axis=1)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prompt_of_real_tokens_is_these_tokens_in_front(name):
    """In a causal model also after it was read: then it is a prefix of their keys and values."""
    model = CAUSAL[name]
    variables = random_variables(model)
    whole = apply(model, variables, ahead())[:, len(PROMPT) :]
    adapted, own = with_prompt(model, variables)
    close(apply(adapted, own, TEXT), whole)

    read, rows = read_prompts(adapted, own)
    assert "prompt" not in rows.params
    assert jax.tree.structure(rows.params) == jax.tree.structure(
        prefix_tuning(model, len(PROMPT)).axes.params, is_leaf=lambda x: type(x) is tuple
    )
    prefix = prefix_tuning(model, len(PROMPT))
    close(apply(prefix, rows, TEXT), whole)
    apart = with_layers(own, unstack(layers_of(own)))
    close(apply(prefix, read_prompts(adapted, apart)[1], TEXT), whole)
    assert read_prompts(read, rows)[1] is rows


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_with_padding_see_a_prompt_as_tokens_in_front(name):
    model = ENCODERS[name]
    variables = random_variables(model)
    seen = jnp.asarray([[1] * 5, [1, 1, 1, 0, 0]], bool)
    text = jnp.where(seen, TEXT, 0)
    front = {"tokens": ahead(text=text), "mask": jnp.pad(seen, ((0, 0), (3, 0)), constant_values=1)}
    adapted, own = with_prompt(model, variables)
    ours = apply(adapted, own, {"tokens": text, "mask": seen})
    whole = apply(model, variables, front)[:, 3:]
    close(ours[0], whole[0])
    close(ours[1, :3], whole[1, :3])


def test_the_class_token_is_the_first_real_one():
    """A classifier of pooled vectors reads the first token of the text, not that of the prompt."""
    body, top = tiny_encoder(head="none"), tiny_encoder(head="classify", num_classes=3)
    variables = random_variables(top)
    adapted, own = with_prompt(top, variables)
    x = apply(body, variables, {"tokens": ahead()})[:, 3]
    head = variables.params["head"]
    pooled = np.tanh(x @ head["pooler"]["kernel"] + head["pooler"]["bias"][None])
    logits = pooled @ head["classifier"]["kernel"] + head["classifier"]["bias"][None]
    close(apply(adapted, own, {"tokens": TEXT}), logits)


@pytest.mark.parametrize("wrap", [soft_prompt, prefix_tuning])
@pytest.mark.parametrize("make", [tiny_decoder, tiny_gpt2])
def test_padding_on_either_side_changes_no_class(make, wrap):
    """Tokens follow the virtual ones wherever padding stands."""
    model = make(head="classify", num_classes=3, pad_id=0)
    adapted = wrap(model, 4)
    variables = random_variables(adapted)
    logits = lambda tokens, mask: apply(adapted, variables, {"tokens": tokens, "mask": mask})
    text, here = TEXT[:1, :3], jnp.ones((1, 3), bool)
    alone = logits(text, here)
    for sides in ((0, 2), (2, 0)):
        pad = lambda x, value, sides=sides: jnp.pad(x, ((0, 0), sides), constant_values=value)
        close(logits(pad(text, 0), pad(here, False)), alone)


def test_a_vit_with_the_other_half_of_a_picture_sees_the_whole():
    """Prompts that are the right half's embedded patches give what a ViT of both halves does."""
    narrow, wide = tiny_vit(), tiny_vit(image_size=(8, 16))
    whole = random_variables(wide)
    embed = whole.params["embed"]
    left, right = np.array([0, 1, 4, 5]), np.array([2, 3, 6, 7])  # of 2 rows of 4 patches
    rows = np.concatenate([[0], 1 + left])
    half = {**embed, "positions": embed["positions"][rows]}
    variables = whole._replace(params={**whole.params, "embed": half})
    pictures = jax.random.normal(KEY, (2, 8, 16, 3))
    patches = pictures.reshape(2, 2, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 8, -1)
    kernel = embed["patches"]["kernel"].reshape(-1, 16)
    vectors = patches[0, right] @ kernel + embed["patches"]["bias"][None]
    vectors += embed["positions"][1 + right]

    adapted = soft_prompt(narrow, 4)
    own = attach(adapted, variables, KEY)
    own = own._replace(params={"prompt": {"vectors": vectors}})
    close(apply(adapted, own, pictures[:1, :, :8]), apply(wide, whole, pictures[:1]))


@pytest.mark.parametrize("make", [tiny_encoder, tiny_vit])
def test_a_prefix_of_one_layer_is_the_keys_and_values_of_a_soft_prompt(make):
    """By hand: in a single layer others see nothing else of the vectors in front."""
    model = make(head="none", num_layers=1)
    inputs = {"tokens": TEXT[:1]} if make is tiny_encoder else jnp.ones((1, 8, 8, 3))
    soft, prefix = soft_prompt(model, 3, init="normal"), prefix_tuning(model, 3)
    variables = random_variables(soft)
    part = jax.tree.map(np.asarray, variables.frozen)
    x = np.asarray(variables.params["prompt"]["vectors"])
    norm, layer = None, jax.tree.map(lambda leaf: leaf[0], part["layers"])
    if make is tiny_encoder:
        embed = part["embed"]
        x = x + embed["positions"]["table"][:3] + embed["types"]["table"][:1]
        norm = embed["norm"]
    else:
        norm = layer["attention_norm"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    x = x * norm["scale"] + norm["bias"]
    heads = lambda part: np.einsum("pd,dgk->pgk", x, part["kernel"]) + part["bias"]
    rows = {name: heads(layer["attention"][name])[None] for name in "kv"}
    own = variables._replace(params={"layers": {"prefix": jax.tree.map(jnp.asarray, rows)}})
    close(apply(prefix, own, inputs), apply(soft, variables, inputs))


def test_a_network_makes_the_prefix_and_is_dropped_in_the_end():
    model = tiny_decoder()
    adapted = prefix_tuning(model, 4, hidden=6)
    variables = random_variables(adapted)
    before = apply(adapted, variables, TEXT)
    plain, kept = settled(adapted, variables)
    assert list(kept.params) == ["layers"]
    close(apply(plain, kept, TEXT), before)  # XLA may fuse the network otherwise: last bits differ
    network = jax.tree.map(np.asarray, variables.params["prefix_network"])
    inner = np.tanh(network["table"] @ network["inner"]["kernel"] + network["inner"]["bias"])
    flat = inner @ network["outer"]["kernel"] + network["outer"]["bias"]
    by_hand = flat[:, : 2 * 2 * 4].reshape(4, 2, 2, 4).transpose(1, 0, 2, 3)
    close(kept.params["layers"]["prefix"]["k"], by_hand)
    close(apply(plain, read_prompts(adapted, variables)[1], TEXT), before)
    with pytest.raises(ValueError, match="no prefix that a network makes"):
        settled(plain, kept)


def test_prompts_stand_with_other_adapters_and_with_each_other():
    """The outermost soft prompt comes first; all of them come after a prefix."""
    model = tiny_decoder()
    variables = random_variables(model)
    inner, own = with_prompt(model, variables, PROMPT[2:], name="personal")
    outer, own = with_prompt(inner, own, PROMPT[:2])
    low = lora(outer, 2)
    own = attach(low, own, KEY)
    whole = apply(model, variables, ahead())[:, 3:]
    close(apply(low, own, TEXT), whole)
    both = prefix_tuning(low, 2)
    own = attach(both, own, KEY)
    expected = apply(both, own, TEXT)
    _, rows = read_prompts(both, own)
    assert rows.params["layers"]["prefix"]["k"].shape == (2, 5, 2, 4)
    close(apply(prefix_tuning(lora(model, 2), 5), rows, TEXT), expected)
    base, back = detach(both, own)
    jax.tree.map(np.testing.assert_array_equal, attach(both, back, KEY), own)
    with pytest.raises(ValueError, match="no part of a plain model"):
        merge(base, back)


@pytest.mark.parametrize("wrap", [soft_prompt, prefix_tuning])
def test_a_gradient_step_moves_the_prompt_and_nothing_else(wrap):
    model = tiny_decoder()
    adapted = wrap(model, 3)
    variables = random_variables(adapted)
    loss = lambda params: apply(adapted, variables._replace(params=params), TEXT)[..., 0].sum()
    gradient = jax.grad(loss)(variables.params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    assert "prompt" in gradient or list(gradient["layers"]) == ["prefix"]
    # A fresh one starts from the base as it was.
    fresh = attach(adapted, random_variables(model), KEY)
    back = detach(adapted, fresh)[1]
    jax.tree.map(np.testing.assert_array_equal, back, random_variables(model))


def test_axes_are_those_of_the_parameters():
    adapted = soft_prompt(prefix_tuning(tiny_decoder(), 3), 4)
    shapes = jax.eval_shape(adapted.init, KEY)
    assert axis_sizes(shapes, adapted.axes)["embed"] == 16


def test_prompts_are_a_five_hundredth_of_the_bytes_of_a_real_model():
    """MiniLM and a Llama of 1B: soft prompts of 20 vectors; the Llama also a prefix."""
    mini = EncoderConfig(
        vocab_size=30522, embed_dim=384, num_layers=6, num_heads=12, mlp_dim=1536, head="none"
    )
    llama = DecoderConfig(
        vocab_size=32000, embed_dim=2048, num_layers=22, num_heads=32, num_kv_heads=4, mlp_dim=5632
    )
    for base, wraps in (
        (encoder(mini), [soft_prompt]),
        (decoder(llama), [soft_prompt, prefix_tuning]),
    ):
        whole = num_bytes(jax.eval_shape(base.init, KEY).params)
        for wrap in wraps:
            sent = jax.eval_shape(wrap(base, 20).init, KEY).params
            assert num_bytes(sent) <= 0.002 * whole


REFUSED = {
    "num_tokens=0: give at least 1": lambda: soft_prompt(tiny_decoder(), 0),
    "num_tokens=64: .* fewer than the model's 64 positions": lambda: prefix_tuning(
        tiny_decoder(), 64
    ),
    "no place for prompts": lambda: soft_prompt(tiny_cnn(), 4),
    "init='best': give 'normal'": lambda: soft_prompt(tiny_decoder(), 4, init="best"),
    "ids of tokens from 0 to 63": lambda: soft_prompt(tiny_decoder(), 4, init=[64]),
    "has no tokens; give 'normal'": lambda: soft_prompt(tiny_vit(), 4, init=[1]),
    "name='prompt' is taken": lambda: soft_prompt(soft_prompt(tiny_decoder(), 4), 4),
    "has a prefix already": lambda: prefix_tuning(prefix_tuning(tiny_decoder(), 4), 4),
    "hidden=-1: give a width": lambda: prefix_tuning(tiny_decoder(), 4, hidden=-1),
    "matches no parameter": lambda: soft_prompt(tiny_decoder(), 4, trained="heads"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_settings_are_told_in_one_sentence(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_inputs_longer_than_what_the_prompt_leaves_are_refused():
    model = dataclasses.replace(tiny_gpt2().config, max_len=8)
    adapted = soft_prompt(decoder(model), 4)
    with pytest.raises(ValueError, match="5 tokens after 4 virtual ones, but the model has 8"):
        jax.eval_shape(adapted.apply, random_variables(adapted), TEXT)


def test_prompts_stand_before_a_backbone_of_few_bits():
    """A rounded backbone has the same places for prompts as the plain one."""
    base = tiny_decoder()
    for wrap in (soft_prompt, prefix_tuning):
        model = wrap(quantized(base, "int8"), 3)
        plain = wrap(base, 3)
        held = attach(quantized(base, "int8"), random_variables(base), KEY)
        ours, theirs = attach(model, held, KEY), attach(plain, random_variables(base), KEY)
        jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
        off = apply(model, ours, TEXT) - apply(plain, theirs, TEXT)
        assert 0 < np.abs(off).mean() < 0.1


@pytest.mark.parametrize("make", [tiny_decoder, tiny_encoder])
def test_a_prompted_model_is_cut_with_its_prompts(make):
    """The masked model computes what the extracted one does, prompts included."""
    model = soft_prompt(prefix_tuning(make(), 2), 3)
    variables = random_variables(model)
    sizes = axis_sizes(variables, model.axes)
    half = width(sizes, {"embed": 0.5, "kv_heads": 0.5, "mlp": 0.5})
    small = extract(variables, model.axes, half)
    assert small.params["prompt"]["vectors"].shape == (3, 8)
    inputs = TEXT if make is tiny_decoder else {"tokens": TEXT}
    close(
        apply(model, small, inputs), apply(model, mask(variables, model.axes, half), inputs), 1e-4
    )
