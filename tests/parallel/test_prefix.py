"""A prefix read once gives what the whole prompts give."""

import jax
import numpy as np
import pytest

from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.model import model_drafter
from jaxfm.parallel.generation import generate, start
from jaxfm.parallel.pipe.pipeinfer import pipeinfer
from jaxfm.parallel.prefix import read_prefix
from jaxfm.testing import random_variables, tiny_decoder
from jaxfm.tokenizer import ByteTokenizer

MODEL = tiny_decoder(vocab_size=260, num_layers=1, sliding_window=9)
VARIABLES = random_variables(MODEL)
SHARED, PROMPTS = "abcabcabcab", ["c", "xyab", "cab"]
DECODERS = {
    "plain": plain(MODEL, VARIABLES),
    "lookup": lookup(MODEL, VARIABLES, length=3),
    "itself": speculative(MODEL, VARIABLES, model_drafter(MODEL, VARIABLES), length=2),
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_and_prompts_are_continued_as_the_whole(name):
    """Sampled texts and greedy ones; prefixes of one token and more, prompts of other lengths."""
    decoder, tokenizer = DECODERS[name], ByteTokenizer()
    run = lambda prompts, **more: generate(
        decoder, prompts, max_new_tokens=[9, 5, 9], temperature=[0.0, 0.0, 0.9], logprobs=True,
        key=jax.random.key(1), repetition_penalty=1.1, tokenizer=tokenizer,
        stop_strings=["\x00\x00\x00"], **more,
    )  # fmt: skip
    compiled = None
    for shared in (SHARED, SHARED[:1]):
        whole = run([shared + prompt for prompt in PROMPTS])
        prefix = read_prefix(decoder, shared, tokenizer=tokenizer)
        ours = run(PROMPTS, prefix=prefix)
        assert (ours.text, ours.finish) == (whole.text, whole.finish)
        for tokens, others in zip((*ours.tokens,), (*whole.tokens,), strict=True):
            assert tokens.tolist() == others.tolist()
        for logprobs, others in zip(ours.logprobs, whole.logprobs, strict=True):
            np.testing.assert_allclose(logprobs, others, atol=1e-4)
        assert (ours.stats.accepted == whole.stats.accepted).all()
        # Prefixes of another length need no other program.
        assert compiled in (None, start._cache_size())
        compiled = start._cache_size()


def test_a_long_prefix_is_read_in_chunks_and_may_fill_the_cache():
    decoder = DECODERS["plain"]
    shared, prompt = list(range(1, 24)), [7]
    whole = generate(decoder, [[*shared, *prompt]], max_new_tokens=4, cells=28)
    prefix = read_prefix(decoder, shared, prefill_chunk=5)
    ours = generate(decoder, [prompt], prefix=prefix, max_new_tokens=4, cells=28, prefill_chunk=6)
    assert ours.tokens[0].tolist() == whole.tokens[0].tolist()


def test_a_prefix_is_its_decoders_own():
    prefix = read_prefix(DECODERS["plain"], [1, 2])
    with pytest.raises(ValueError, match="The prefix was read by another decoder"):
        generate(DECODERS["lookup"], [[1]], prefix=prefix)
    with pytest.raises(ValueError, match="The prefix was read by another decoder"):
        generate(plain(MODEL, random_variables(MODEL, seed=1)), [[1]], prefix=prefix)
    with pytest.raises(TypeError, match="prefix must be what `read_prefix` returns, got list"):
        generate(DECODERS["plain"], [[1]], prefix=[1, 2])
    with pytest.raises(ValueError, match="A pipe cannot share a prefix"):
        read_prefix(pipeinfer(MODEL, VARIABLES, None), [1, 2])
