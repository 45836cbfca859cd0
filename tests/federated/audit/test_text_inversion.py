"""The gradient of a short text holds its words, and nearly their order; noise hides both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.federated.audit.inversion import batch_gradient
from jaxfm.federated.audit.text_inversion import invert_text, recovered_tokens, words_of
from jaxfm.federated.parts.clipping import clipped, noised
from jaxfm.tasks import classification
from jaxfm.testing import tiny_encoder

MODEL = tiny_encoder(head="classify", num_classes=2, num_layers=1)
TASK = classification(2, inputs=("tokens", "mask"))
TOKENS = jnp.array([[7, 31, 2, 55, 14]], jnp.int32)
LABELS = jnp.array([1], jnp.int32)
BATCH = {"tokens": TOKENS, "mask": jnp.ones((1, 5), bool), "label": LABELS}


@functools.cache
def variables():
    return MODEL.init(jax.random.key(0))


@functools.cache
def gradient():
    return jax.jit(lambda v: batch_gradient(MODEL, v, TASK, BATCH))(variables())


def recovered(seen) -> float:
    found = invert_text(
        MODEL, variables(), TASK, seen, LABELS, 5, jax.random.key(1), steps=50, restarts=2
    )
    return recovered_tokens(TOKENS, found.tokens)


def test_a_text_is_recovered_and_noise_of_dp_sgd_hides_it():
    assert recovered(gradient()) == 1.0
    private = noised(clipped(gradient(), jnp.float32(1.0)), jnp.float32(1.0), jax.random.key(3))
    assert recovered(private) <= 2 / 5


def test_rows_with_a_gradient_are_the_words():
    tokens, there = words_of(gradient()["embed"]["tokens"]["table"], 10)
    assert set(np.asarray(tokens)[np.asarray(there)].tolist()) == set(TOKENS[0].tolist())
    assert words_of(jnp.zeros((3, 2)), 10)[1].tolist() == [False] * 3


def test_shares_are_those_of_the_best_pairs():
    texts = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert recovered_tokens(texts, texts[::-1]) == 1.0
    assert recovered_tokens(texts, [[5, 6, 0, 0], [0, 0, 0, 0]]) == 0.25


def test_bad_input_is_refused():
    go = functools.partial(invert_text, MODEL, variables(), TASK, gradient(), LABELS)
    with pytest.raises(ValueError, match="steps=0, restarts=4 and length=5 must be at least 1"):
        go(5, jax.random.key(0), steps=0)
    with pytest.raises(ValueError, match="no token table at embed/words in the parameters"):
        go(5, jax.random.key(0), table=("embed", "words"))
