import jax
import numpy as np
import pytest

from jaxfm.models.families.decoder import DecoderConfig, decoder, gpt2_config
from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.composite import composite_drafter
from jaxfm.parallel.drafters.lookup import lookup_drafter
from jaxfm.parallel.drafters.model import model_drafter
from jaxfm.parallel.generation import generate, stream
from jaxfm.parallel.pipe.pipeinfer import pipeinfer
from jaxfm.parallel.requests import listed_stops
from jaxfm.testing import random_variables, tiny_decoder
from jaxfm.tokenizer import ByteTokenizer

CONFIG = gpt2_config(
    vocab_size=260, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_len=32
)
MODEL = decoder(CONFIG)
VARIABLES = MODEL.init(jax.random.key(0))
DECODER = plain(MODEL, VARIABLES)
BYTES = ByteTokenizer()


class OtherBytes(ByteTokenizer):
    """As many tokens, two of them exchanged."""

    @property
    def vocab(self):
        vocab = dict(super().vocab)
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        return vocab


class Letter(ByteTokenizer):
    """One token."""

    @property
    def vocab(self):
        return {"a": 97}


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([], {}, "There are no prompts"),
        ([[1], []], {}, "Prompt 1 is empty"),
        ([""], {"tokenizer": BYTES}, "Prompt 0 is empty"),
        (["text"], {}, "Prompt 0 is a string; give a tokenizer"),
        ([[1, 260]], {}, r"The tokens of prompt 0 must be in 0\.\.259; got 260"),
        ([[1], [1] * 30], {"max_new_tokens": 4}, "Prompt 1 has 30 .* 4 new ones 34; the model has "
         "positions for 32"),
        ([[1] * 9], {"max_new_tokens": 8, "cells": 16}, "new ones 17; the cache holds 16"),
        ([[1]], {"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ([[1]], {"temperature": 1.0}, "give a key"),
        ([[1]], {"top_p": 0.0}, "top_p must be above 0"),
        ([[1]], {"top_p": 1.5}, "top_p must be from 0 to 1, got 1.5"),
        ([[1]], {"min_p": -1.0}, "min_p must be from 0 to 1, got -1"),
        ([[1]], {"top_k": -1}, "top_k must be at least 0, got -1"),
        ([[1], [2]], {"max_new_tokens": [4, 0]}, "max_new_tokens must be at least 1, got 0"),
        ([[1], [2]], {"max_new_tokens": [4] * 3}, "one value, or 2"),
        ([[1]], {"max_new_tokens": 2**40}, "max_new_tokens must be from 1 to .*, got 1"),
        ([[1]], {"temperature": 1.0, "key": jax.random.split(jax.random.key(0))},
         r"key has shape \(2,\); give one key"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, {}, "rows of .*2.*1.* places"),
        ([[1]], {"stop_strings": ["x"]}, "stop_strings need a tokenizer"),
        ([[1]], {"stop_strings": [""], "tokenizer": BYTES}, "must not be empty"),
        ([[1]], {"stop_tokens": [300]}, r"Stop tokens must be in 0\.\.259; got 300"),
        ([[1]], {"logit_bias": {300: 1.0}}, r"tokens of logit_bias must be in 0\.\.259; got 300"),
        ([[1]], {"logit_bias": {3: float("inf")}}, "is nan or inf; give a number, or -inf"),
        ([[1], [2]], {"logit_bias": [{}, {97: -np.inf}], "tokenizer": Letter()},
         "logit_bias is -inf for every token of text 1; leave one"),
        ([[1]], {"logit_bias": [{}, {3: 1}]}, "logit_bias has 2 mappings; give one, or 1"),
        ([[1], [2]], {"seeds": [1, 2, 3]}, "seeds has shape .*; give one value, or 2"),
        ([[1]], {"top_logprobs": 261}, "top_logprobs must be from 0 to 260, got 261"),
        ([[1]], {"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ([[1]], {"ticks": 0}, "ticks must be at least 1, got 0"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk must be at least 1, got 0"),
        ([[1]], {"draft_tokenizer": BYTES}, "give both"),
        ([[1]], {"tokenizer": BYTES, "draft_tokenizer": OtherBytes()},
         "token 'a' has id 97 in the target's .* and 98 in the draft's"),
    ],
)  # fmt: skip
def test_bad_input_raises_at_the_door(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        stream(DECODER, prompts, **({"max_new_tokens": 4} | settings))


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        (None, {}, "prompts must be a sequence of prompts, got None"),
        ([1, 2], {}, "tokens of prompt 0 must be a sequence of whole numbers, got 1"),
        ([[1, 1.5]], {}, "tokens of prompt 0 must be a sequence of whole numbers, got .1, 1.5"),
        ({"text": ["a"]}, {}, "a mapping of .'text'.; give a sequence of prompts"),
        ({"input_ids": [1, 2]}, {}, "'input_ids' is one prompt"),
        ([[1]], {"top_k": 2.7}, "top_k must be whole numbers, got 2.7"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens must be whole numbers, got 2.5"),
        ([[1]], {"temperature": "hot"}, "temperature must be numbers, got 'hot'"),
        ([[1]], {"cells": 64.5}, "cells must be whole numbers, got 64.5"),
        ([[1]], {"stop_tokens": [None]}, "Stop tokens must be a sequence of whole numbers"),
        ([[1]], {"stop_tokens": 1.5}, r"Stop tokens must be .* got \[1.5\]"),
        ([[1]], {"stop_strings": [5], "tokenizer": BYTES}, "A text must be a string, got 5"),
        ([[1]], {"temperature": 1.0, "key": 0}, "key must be a typed key, .* got 0"),
        ([[1]], {"temperature": 1.0, "key": jax.random.PRNGKey(0)}, "key of the older kind"),
    ],
)
def test_what_is_of_another_type_raises_at_the_door(prompts, settings, message):
    with pytest.raises(TypeError, match=message):
        stream(DECODER, prompts, **({"max_new_tokens": 4} | settings))


def test_a_tokenizers_output_is_read_without_its_padding():
    padded = {"input_ids": np.array([[0, 0, 97], [98, 99, 100]]),
              "attention_mask": np.array([[0, 0, 1], [1, 1, 1]])}  # fmt: skip
    ours, theirs = (generate(DECODER, p, max_new_tokens=4) for p in ([[97], [98, 99, 100]], padded))
    assert [t.tolist() for t in ours.tokens] == [t.tolist() for t in theirs.tokens]


def test_one_stop_needs_no_list():
    assert listed_stops(5, "the end", 260) == ([5], ["the end"])
    assert listed_stops(np.array([5, 6]), ["a", "b"], 260) == ([5, 6], ["a", "b"])
    assert listed_stops(None, None, 260) == listed_stops((), (), 260) == ([], [])


def test_one_bare_string_is_no_batch():
    with pytest.raises(TypeError, match="wrap the one"):
        stream(DECODER, "abc", tokenizer=BYTES)


def test_decoders_refuse_what_they_cannot_do():
    smaller = decoder(
        DecoderConfig(vocab_size=8, embed_dim=8, num_layers=1, num_heads=1, mlp_dim=8)
    )
    with pytest.raises(ValueError, match="target has 260 tokens and the draft 8"):
        speculative(MODEL, VARIABLES, model_drafter(smaller, smaller.init(jax.random.key(0))))
    with pytest.raises(ValueError, match="length=0 tokens cannot be drafted"):
        speculative(MODEL, VARIABLES, model_drafter(MODEL, VARIABLES), length=0)
    with pytest.raises(ValueError, match="min_ngram=3 and max_ngram=2"):
        lookup(MODEL, VARIABLES, max_ngram=2, min_ngram=3)
    both = composite_drafter(lookup_drafter(), model_drafter(MODEL, VARIABLES))
    with pytest.raises(ValueError, match=r"continues trees only: give it to `pipeinfer`"):
        speculative(MODEL, VARIABLES, both)
    with pytest.raises(ValueError, match=r"continues chains only: give it to `speculative`"):
        pipeinfer(MODEL, VARIABLES, lookup_drafter()._replace(tree=None))
    with pytest.raises(ValueError, match=r"know different numbers of tokens: \[8, 260\]"):
        composite_drafter(both, model_drafter(smaller, smaller.init(jax.random.key(0))))
    with pytest.raises(ValueError, match="one of them has no `tree`"):
        composite_drafter(both, lookup_drafter()._replace(tree=None))


def test_pieces_join_to_the_whole():
    prompts, settings = ["ab", "c"], {"tokenizer": BYTES, "max_new_tokens": [20, 11]}
    whole = generate(DECODER, prompts, ticks=32, **settings)
    assert [len(tokens) for tokens in whole.tokens] == [20, 11]
    assert (whole.stats.passes == [20, 11]).all()
    pieces = list(stream(DECODER, prompts, ticks=3, **settings))
    assert len(pieces) == 7
    for i in range(2):
        assert "".join(piece.text[i] for piece in pieces) == whole.text[i]
        tokens = np.concatenate([piece.tokens[i] for piece in pieces])
        assert tokens.tolist() == whole.tokens[i].tolist()


def test_prefill_in_chunks_changes_nothing():
    prompt = [list(range(1, 27)), [3]]
    one, *chunked = (
        generate(DECODER, prompt, max_new_tokens=6, prefill_chunk=chunk, logprobs=True)
        for chunk in (None, 8, 7)  # 7 does not divide the 32 places of the prompts
    )
    for other in chunked:
        assert [t.tolist() for t in one.tokens] == [t.tolist() for t in other.tokens]
        for ours, theirs in zip(one.logprobs, other.logprobs):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_prompts_as_text_or_ids_and_full_length():
    """The last position of the model can be used, and a text may fill the cache."""
    result = generate(DECODER, ["abc"], tokenizer=BYTES, max_new_tokens=29, cells=32)
    same = generate(DECODER, [[97, 98, 99]], max_new_tokens=29, cells=32)
    assert result.tokens[0].tolist() == same.tokens[0].tolist()
    assert len(same.tokens[0]) == 29 and same.text is None


def test_a_text_may_have_one_token_more_than_the_model_has_positions():
    """The last token is not read. The uncached model, with a full input, says what it is."""
    prompt = [97, 98, 99]
    full = generate(DECODER, [prompt], max_new_tokens=29).tokens[0]
    inputs = np.array([[*prompt, *full]], np.int32)
    last = int(MODEL.apply(VARIABLES, inputs)[0][0, -1].argmax())
    for made in (DECODER, pipeinfer(MODEL, VARIABLES, None)):
        result = generate(made, [prompt], max_new_tokens=30)
        assert result.tokens[0].tolist() == [*full, last] and result.finish == ["length"]


def test_beyond_the_positions_of_a_rotary_model_is_said():
    model = tiny_decoder(max_len=8)
    made = plain(model, random_variables(model))
    generate(made, [[1, 2]], max_new_tokens=7)
    with pytest.warns(UserWarning, match="new ones 10; the model was made for 8"):
        generate(made, [[1, 2]], max_new_tokens=8)


SHORT = tiny_decoder(vocab_size=32, num_layers=1)
WEIGHTS = random_variables(SHORT)
OTHER = model_drafter(SHORT, random_variables(SHORT, seed=1))


@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_a_bias_is_added_to_the_logits_by_every_decoder(heat):
    """Oracle: the uncached model, with the bias added by hand; log-probabilities are without it."""
    settings = {"max_new_tokens": 8, "temperature": heat, "key": jax.random.key(2)}
    bias = {7: 30.0, 9: 30.0, 11: -np.inf}
    # Sampled, the draws of speculative decoding are its own.
    other = pipeinfer if heat else lambda *args: speculative(*args, length=2)
    made = plain(SHORT, WEIGHTS), other(SHORT, WEIGHTS, OTHER)
    runs = [generate(d, [[1, 2]], logit_bias=bias, logprobs=True, **settings) for d in made]
    (first, *others) = [result.tokens[0].tolist() for result in runs]
    assert all(other == first for other in others) and set(first) <= {7, 9}
    logits = np.array(SHORT.apply(WEIGHTS, np.array([[1, 2, *first]], np.int32))[0][0, 1:-1])
    expected = jax.nn.log_softmax(logits)[np.arange(8), first]
    for result in runs:
        np.testing.assert_allclose(result.logprobs[0], expected, atol=1e-4)
    if not heat:
        logits[:, [7, 9]] += 30
        logits[:, 11] = -np.inf
        assert first == logits.argmax(-1).tolist()


def test_the_most_likely_tokens_are_those_of_the_uncached_model():
    decoders = (
        plain(SHORT, WEIGHTS),
        lookup(SHORT, WEIGHTS, length=3),
        speculative(SHORT, WEIGHTS, OTHER, length=2),
    )
    bias, prompts = {7: 30.0}, [[1, 2], [3, 4, 3, 4]]
    for made in decoders:
        result = generate(
            made, prompts, max_new_tokens=[8, 5], logit_bias=bias, top_logprobs=3, ticks=3
        )
        for prompt, tokens, top in zip(prompts, result.tokens, result.top, strict=True):
            inputs = np.array([[*prompt, *tokens]], np.int32)
            logits = SHORT.apply(WEIGHTS, inputs)[0][0, len(prompt) - 1 : -1]
            logp = np.asarray(jax.nn.log_softmax(logits))
            best = np.argsort(-logp, axis=-1)[:, :3]
            assert top.tokens.tolist() == best.tolist()
            np.testing.assert_allclose(
                top.logprobs, np.take_along_axis(logp, best, axis=-1), atol=1e-4
            )
    with pytest.raises(ValueError, match="A pipe keeps no top_logprobs"):
        generate(pipeinfer(SHORT, WEIGHTS, None), prompts, top_logprobs=3)


def test_samples_of_a_prompt_and_seeds_of_a_request():
    """A text depends on its prompt, the key and its seed; not on its place in the batch."""
    made = plain(SHORT, WEIGHTS)
    run = lambda prompts, **kw: [
        tokens.tolist()
        for tokens in generate(
            made, prompts, max_new_tokens=8, temperature=1.0, key=jax.random.key(2), **kw
        ).tokens
    ]
    several = run([[1, 2], [5]], num_samples=3)
    assert len(several) == 6 and len(set(map(tuple, several))) == 6
    assert run([[1, 2], [5]], num_samples=3, seeds=list(range(6))) == several
    again = run([[5], [1, 2]], num_samples=3, seeds=[5, 4, 3, 0, 1, 2])
    assert again == [*several[:2:-1], *several[:3]]
