"""A prefix read once gives what the whole prompts give."""

import jax
import numpy as np
import pytest

from jaxfm.adapters import prefix_tuning, soft_prompt
from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.model import model_drafter
from jaxfm.parallel.generation import generate, start
from jaxfm.parallel.mesh import make_mesh
from jaxfm.parallel.pipe.pipeinfer import pipeinfer, pipelined
from jaxfm.parallel.prefix import read_prefix
from jaxfm.testing import random_variables, tiny_decoder, tiny_gpt2
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


PROMPTED = {
    "soft": soft_prompt(MODEL, 5),
    "prefix": prefix_tuning(MODEL, 5),
    "network": prefix_tuning(MODEL, 4, hidden=3),
}


@pytest.mark.parametrize("kind", PROMPTED)
def test_trained_prompts_are_read_once_and_decode_as_the_whole_model_does(kind):
    """Each decoder's greedy tokens against those of the adapted model on the whole text."""
    model = PROMPTED[kind]
    variables = random_variables(model, seed=3)
    text = [1, 2, 3, 1, 2]
    apply = jax.jit(model.apply)
    whole = np.zeros((1, 14), np.int32)
    whole[0, :5] = text
    for end in range(5, 14):
        whole[0, end] = apply(variables, whole)[0][0, end - 1].argmax()
    unprompted = model_drafter(MODEL, VARIABLES)
    decoders = {
        "soft": [lookup(model, variables, length=3),
                 speculative(model, variables, model_drafter(model, variables), length=2)],
        "prefix": [speculative(model, variables, unprompted, length=2)],
        "network": [plain(model, variables)],
    }  # fmt: skip
    for decoder in decoders[kind]:
        result = generate(decoder, [text, text[:1]], max_new_tokens=9)
        assert result.tokens[0].tolist() == whole[0, 5:].tolist()
    read = read_prefix(decoder, text[:3])
    result = generate(decoder, [text[3:]], max_new_tokens=9, prefix=read)
    assert result.tokens[0].tolist() == whole[0, 5:].tolist()


def test_a_pipe_reads_trained_prompts_too():
    model = soft_prompt(tiny_decoder(), 5)
    variables = random_variables(model, seed=3)
    ours = generate(
        pipelined(model, variables, mesh=make_mesh(stage=2)), [[1, 2, 3]], max_new_tokens=6
    )
    assert ours.tokens[0].tolist() == (
        generate(plain(model, variables), [[1, 2, 3]], max_new_tokens=6).tokens[0].tolist()
    )


def test_prompts_take_positions_of_the_model():
    model = soft_prompt(tiny_gpt2(vocab_size=260), 60)
    decoder = plain(model, random_variables(model))
    assert decoder.positions.number == 4
    with pytest.raises(ValueError, match="positions for 4, and one"):
        generate(decoder, [[1, 2, 3]], max_new_tokens=3)
