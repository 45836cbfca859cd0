"""Penalties for what a text already has: one law for all decoders, and NumPy says which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.model import model_drafter
from jaxfm.parallel.generation import generate
from jaxfm.parallel.penalties import History, Penalties, line_history, penalized
from jaxfm.parallel.pipe.pipeinfer import pipeinfer
from jaxfm.parallel.requests import make_penalties
from jaxfm.testing import random_variables, tiny_decoder

MODEL = tiny_decoder(vocab_size=32, num_layers=1)
VARIABLES = random_variables(MODEL)
PROMPTS, NEW = [[3, 4, 3, 4, 3], [7]], 14
PENALTIES = {
    "repetition_penalty": [1.3, 0.8],
    "presence_penalty": [0.5, -0.3],
    "frequency_penalty": [0.2, 0.4],
}


def adjusted(logits, prompt, new, repetition, presence, frequency):
    """The definitions, a token at a time."""
    logits = np.array(logits, np.float32)
    for token in {*prompt, *new}:
        logits[token] *= 1 / repetition if logits[token] > 0 else repetition
    for token in set(new):
        logits[token] -= frequency * new.count(token) + presence
    return logits


def greedy(prompt, *settings):
    """Tokens and log-probabilities by the uncached model on the whole text."""
    forward, new, logprobs = jax.jit(lambda t: MODEL.apply(VARIABLES, t)[0]), [], []
    for _ in range(NEW):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(prompt) + len(new)] = [*prompt, *new]
        logits = forward(padded)[0, len(prompt) + len(new) - 1]
        token = int(adjusted(logits, prompt, new, *settings).argmax())
        logprobs.append(float(jax.nn.log_softmax(logits)[token]))
        new.append(token)
    return new, logprobs


def test_every_decoder_counts_the_tokens_before_each_place():
    """The first text is greedy, the second is sampled: by the pipe as by plain decoding."""
    other = model_drafter(MODEL, random_variables(MODEL, seed=1))
    decoders = {
        "plain": plain(MODEL, VARIABLES),
        "lookup": lookup(MODEL, VARIABLES, length=3),
        "itself": speculative(MODEL, VARIABLES, model_drafter(MODEL, VARIABLES), length=3),
        "pipe": pipeinfer(MODEL, VARIABLES, other, width=2),
    }
    results = {
        name: generate(
            decoder, PROMPTS, max_new_tokens=NEW, temperature=[0.0, 0.9], key=jax.random.key(1),
            logprobs=True, **PENALTIES,
        )
        for name, decoder in decoders.items()
    }  # fmt: skip
    tokens, logprobs = greedy(PROMPTS[0], *(each[0] for each in PENALTIES.values()))
    for result in results.values():
        assert result.tokens[0].tolist() == tokens
        np.testing.assert_allclose(result.logprobs[0], logprobs, atol=1e-4)
    assert results["pipe"].tokens[1].tolist() == results["plain"].tokens[1].tolist()
    # A draft with the same penalties foresees what they do.
    counts = results["itself"].stats
    assert (counts.accepted[0] == counts.drafted[0]).all() and counts.drafted[0].sum() > 0
    assert len(set(tokens)) > len(set(greedy(PROMPTS[0], 1, 0, 0)[0]))


@pytest.mark.slow
def test_speculative_texts_have_the_penalized_distribution():
    """Chi-square of all three-token texts; the second and third are chosen after drafts."""
    small = tiny_decoder(vocab_size=5, num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1)
    target, draft = (
        jax.tree.map(lambda x: x * 2, random_variables(small, seed=i)) for i in range(2)
    )
    made, settings = (
        speculative(small, target, model_drafter(small, draft), length=2),
        (1.5, 0.4, 0.8),
    )
    prompt, requests = [1, 2, 1], 60_000
    result = generate(
        made, [prompt] * requests, max_new_tokens=3, cells=8, temperature=1.0,
        key=jax.random.key(4), **dict(zip(PENALTIES, settings)),
    )  # fmt: skip
    every = np.stack(np.meshgrid(*[np.arange(5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    inputs = np.concatenate([np.tile(prompt, (125, 1)), every], axis=1)
    logits = np.asarray(small.apply(target, jnp.asarray(inputs, jnp.int32))[0])[:, 2:5]
    expected = np.full(125, float(requests))
    for row, text in enumerate(every.tolist()):
        for place in range(3):
            scores = adjusted(logits[row, place], prompt, text[:place], *settings)
            expected[row] *= np.exp(scores[text[place]]) / np.exp(scores).sum()
    seen = np.bincount(np.stack(result.tokens) @ [25, 5, 1], minlength=125)
    often = expected >= 5
    seen, expected = (np.append(x[often], x[~often].sum()) for x in (seen, expected))
    assert stats.chisquare(seen, expected * (requests / expected.sum())).pvalue > 1e-3
    assert 0.1 < result.stats.accepted.sum() / result.stats.drafted.sum() < 0.95


def test_penalties_of_random_logits_are_numpys():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 6)).astype(np.float32) * 5
    logits[:, :, 5] = -np.inf
    text, drafts = rng.integers(0, 6, (2, 8)), rng.integers(0, 6, (2, 2))
    prompt, length = np.array([2, 4]), np.array([3, 8])
    whole = lambda x: jnp.asarray(x, jnp.int32)
    history = line_history(whole(text), whole(length), whole(drafts), jnp.arange(3))
    settings = np.float32([[1.5, 0.7], [1.1, -2.0], [-0.4, 0.6]])
    ours = penalized(
        jnp.asarray(logits), Penalties(whole(prompt), *map(jnp.asarray, settings)), history
    )
    for i, j in np.ndindex(2, 3):
        tokens = [*text[i, : length[i]].tolist(), *drafts[i, :j].tolist()]
        begin = prompt[i]
        expected = adjusted(logits[i, j], tokens[:begin], tokens[begin:], *settings[:, i])
        np.testing.assert_allclose(ours[i, j], expected, rtol=1e-5)


def test_penalties_that_change_nothing_are_off():
    lengths = np.array([2, 3], np.int32)
    assert make_penalties(lengths, None, None, None) is None
    assert make_penalties(lengths, 1.0, [0, 0], 0.0) is None
    some = make_penalties(lengths, [1.0, 2.0], 0, None)
    assert some.presence is None and some.frequency is None
    history = History(*[jnp.zeros((2, 1), jnp.int32)] * 2, jnp.ones((2, 1, 1), bool))
    logits = jnp.ones((2, 1, 4))
    assert penalized(logits, some, history)[:, 0, 0].tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"repetition_penalty": 0}, "repetition_penalty must be from 0.01 to 100, got 0"),
        ({"presence_penalty": 2.5}, "presence_penalty must be from -2 to 2, got 2.5"),
        ({"frequency_penalty": [0.1, 0.2]}, "frequency_penalty has shape .*; give one value, or 1"),
    ],
)
def test_penalties_out_of_range_raise_at_the_door(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(plain(MODEL, VARIABLES), [[1]], **settings)
