"""Pipes of random models, drafts and settings; and the distribution of what a pipe samples."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxfm.parallel import generate, make_mesh, plain
from jaxfm.parallel.drafters.lookup import lookup_drafter
from jaxfm.parallel.drafters.model import early_exit_drafter, model_drafter
from jaxfm.parallel.drafters.scripted import scripted_drafter
from jaxfm.parallel.pipe.pipeinfer import pipeinfer
from jaxfm.testing import random_variables, tiny_decoder, tiny_gpt2


@st.composite
def cases(draw):
    """(model, draft, stages, settings): small models of all shapes, drafts good and adversarial."""
    layers = draw(st.integers(2, 4))
    heads = draw(st.sampled_from([1, 2, 4]))
    changes = {"num_layers": layers, "num_heads": heads, "embed_dim": 8 * heads}
    if draw(st.booleans()):
        model = tiny_gpt2(**changes)
    else:
        own = {"num_kv_heads": draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))}
        window = draw(st.sampled_from([None, 4]))
        model = tiny_decoder(**changes, **own, **({"sliding_window": window} if window else {}))
    kind = draw(st.sampled_from(["exit", "self", "lookup", "wrong", "right", "every third"]))
    shape = {"width": draw(st.integers(1, 3)), "levels": draw(st.integers(1, 2))}
    return model, kind, draw(st.integers(1, 2)), shape


@pytest.mark.slow
@settings(max_examples=6)
@given(cases(), st.integers(0, 2**16))
def test_whatever_is_drafted_the_tokens_are_those_of_plain_decoding(case, seed):
    model, kind, stages, shape = case
    variables = random_variables(model, seed)
    prompts, new = [[seed % 64, 5, 9], [3]], 16
    truth = generate(plain(model, variables), prompts, max_new_tokens=new)
    rows = np.zeros((2, 64), np.int32)
    for row, prompt, tokens in zip(rows, prompts, truth.tokens):
        row[: len(prompt) + new] = [*prompt, *tokens.tolist()]
    place = np.arange(64) % 3 == 0
    drafter = {
        "exit": lambda: early_exit_drafter(model, variables, 1),
        "self": lambda: model_drafter(model, variables),
        "lookup": lookup_drafter,
        "wrong": lambda: scripted_drafter(rows, np.full((2, 64), 9), 64),
        "right": lambda: scripted_drafter(rows, np.zeros((2, 64), np.int32), 64),
        "every third": lambda: scripted_drafter(rows, np.tile(np.where(place, 9, 0), (2, 1)), 64),
    }[kind]()
    decoder = pipeinfer(model, variables, drafter, mesh=make_mesh(stage=stages), **shape)
    # The text ends at a token that it has, in the middle of what is in flight.
    stop = int(truth.tokens[0][new // 2])
    for more in ({}, {"stop_tokens": [stop]}):
        expected = generate(plain(model, variables), prompts, max_new_tokens=new, **more)
        found = generate(decoder, prompts, max_new_tokens=new, **more)
        assert [t.tolist() for t in found.tokens] == [t.tolist() for t in expected.tokens]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"width": 1}, {"width": 3}], ids=["chain", "tree"])
def test_what_is_sampled_has_the_targets_distribution(shape):
    """The second token given the first, 102,400 texts of one prompt."""
    model = tiny_decoder(vocab_size=8, num_layers=2)
    variables = random_variables(model)
    drafter = early_exit_drafter(model, variables, 1)
    decoder = pipeinfer(model, variables, drafter, mesh=make_mesh(stage=1), **shape)
    texts, runs, prompt = 512, 200, [1, 2, 3]
    seen = np.zeros((8, 8))
    for run in range(runs):
        found = generate(
            decoder, [prompt] * texts, max_new_tokens=2, cells=16, temperature=1.0,
            key=jax.random.key(run),
        )  # fmt: skip
        np.add.at(seen, tuple(np.array(found.tokens).T), 1)
    assert seen.sum() == texts * runs
    inputs = np.array([[*prompt, first] for first in range(8)], np.int32)
    logits = jax.jit(model.apply)(variables, inputs)[0]
    probs = np.asarray(jax.nn.softmax(logits.astype(np.float32), -1), np.float64)
    first, second = probs[0, -2], probs[:, -1]
    expected = first[:, None] * second / second.sum(-1, keepdims=True)
    assert (
        stats.chisquare(seen.ravel(), expected.ravel() / expected.sum() * seen.sum()).pvalue > 1e-3
    )
