"""Laws over the whole range of numbers: extreme logits and temperatures, and what is not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfm.parallel import sampling as sample
from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.composite import composite_drafter
from jaxfm.parallel.drafters.lookup import lookup_drafter
from jaxfm.parallel.drafters.model import early_exit_drafter, model_drafter
from jaxfm.parallel.generation import generate
from jaxfm.parallel.mesh import make_mesh
from jaxfm.parallel.pipe.pipeinfer import pipeinfer
from jaxfm.parallel.sampling import Sampling
from jaxfm.testing import random_variables, tiny_decoder
from jaxfm.tokenizer import ByteTokenizer

VOCAB = 12


@jax.jit
def probabilities(logits, temperature, top_k, top_p, min_p):
    one = jnp.zeros((1,), jnp.int32)
    values = Sampling(jax.random.key(0), one, temperature, top_k, top_p, min_p)
    return jnp.exp(sample.log_probs(logits[None, None], values))[0, 0]


def reference(logits, temperature, top_k, top_p, min_p):
    """The definitions in float64; None where float32 cannot tell: a cut is too near a token's mass,
    or two scores differ by less than a rounding of their distance from the best."""
    scores = np.asarray(logits, np.float64)
    order = np.argsort(-scores, kind="stable")
    scaled = (scores - scores.max()) / np.float64(temperature)
    ranked = scaled[order]
    gaps = ranked[:-1] - ranked[1:]
    if ((gaps > 0) & (gaps < 1e-6 * np.abs(ranked[1:]))).any():
        return None
    kept = np.ones(len(ranked), bool)
    if top_k:
        kept &= ranked >= ranked[top_k - 1]
    mass = np.where(kept, np.exp(ranked), 0)
    mass /= mass.sum()
    before = np.cumsum(mass) - mass
    near = np.abs(before - top_p) < 1e-5
    kept &= (before < top_p) | (top_p >= 1)
    if kept.any():
        kept |= ranked >= ranked[kept].min()  # ties with the last one stay
    if min_p:
        near |= np.abs(ranked - np.log(min_p)) < 1e-4
        kept &= ranked >= np.log(min_p)
    probs = np.zeros(len(scores))
    probs[order] = np.where(kept, np.exp(ranked), 0)
    return None if near.any() else probs / probs.sum()


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=VOCAB, max_size=VOCAB),
    scale=st.sampled_from([1e-4, 1e-2, 1.0]),
    temperature=st.floats(-12, 4).map(lambda x: float(np.float32(10.0**x))),
    top_k=st.integers(0, VOCAB),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_compiled_sampling_is_the_float64_reference(
    logits, scale, temperature, top_k, top_p, min_p
):
    logits = np.float32(np.array(logits) * scale)
    expected = reference(logits, temperature, top_k, np.float32(top_p), np.float32(min_p))
    if expected is None:
        return
    single = lambda value: jnp.asarray([value], jnp.float32)
    ours = probabilities(
        jnp.asarray(logits), single(temperature), jnp.asarray([top_k], jnp.int32), single(top_p),
        single(min_p),
    )  # fmt: skip
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_a_temperature_below_every_float_is_greedy():
    model = tiny_decoder()
    made = plain(model, random_variables(model))
    run = lambda heat: generate(
        made, [[1, 2]], max_new_tokens=6, temperature=heat, key=jax.random.key(0)
    ).tokens[0]
    assert run(1e-60).tolist() == run(1e-12).tolist() == run(0.0).tolist()


MODEL = tiny_decoder(tied=False, vocab_size=32)
HEALTHY = random_variables(MODEL)
PROMPT, NEW = [3, 4, 3, 4, 3], 8


def changed(path, index, value):
    """The healthy variables with one number, or a row of them, replaced."""
    params = jax.tree.map(np.array, HEALTHY.params)
    leaf = params
    for name in path:
        leaf = leaf[name]
    leaf[index] = value
    return HEALTHY._replace(params=jax.tree.map(jnp.asarray, params))


DECODERS = {
    "plain": plain,
    "lookup": lambda model, variables: lookup(model, variables, length=3),
    "by itself": lambda model, variables: speculative(
        model, variables, model_drafter(model, variables), length=2
    ),
    "pipe": lambda model, variables: pipeinfer(
        model, variables, model_drafter(model, HEALTHY), mesh=make_mesh(stage=2), width=2
    ),
}


def greedy(variables):
    """Tokens of the uncached model, until its logits are not finite."""
    tokens, forward = list(PROMPT), jax.jit(lambda v, t: MODEL.apply(v, t)[0])
    for _ in range(NEW):
        padded = np.zeros((1, len(PROMPT) + NEW), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward(variables, padded))[0, len(tokens) - 1]
        if not np.isfinite(logits).all():
            return tokens[len(PROMPT) :], "not finite"
        tokens.append(int(logits.argmax()))
    return tokens[len(PROMPT) :], "length"


TEXT = greedy(HEALTHY)[0]
UNSEEN = next(t for t in range(1, 32) if t not in {*PROMPT, *TEXT})
BAD = {
    "a weight": ((("layers", "mlp", "up", "kernel"), (1, 2, 3), np.nan), 0),
    "a key's weight": ((("layers", "attention", "k", "kernel"), (0, 1, 1, 0), -np.inf), 0),
    "a value's weight": ((("layers", "attention", "v", "kernel"), (0, 1, 1, 0), np.inf), 0),
    "the head's row of a token": ((("head", "out", "kernel"), (0, UNSEEN), -np.inf), 0),
    "a prompt's token": ((("embed", "tokens", "table"), (4, 0), np.nan), 0),
    "a generated token": ((("embed", "tokens", "table"), (TEXT[2], 0), np.inf), None),
    "another token": ((("embed", "tokens", "table"), (UNSEEN, 0), np.nan), NEW),
}


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_not_finite_is_reported_alike_by_all(name):
    for case, (change, count) in BAD.items():
        variables = changed(*change)
        if count is None:
            count = TEXT.index(TEXT[2]) + 1
        expected = "length" if count == NEW else "not finite"
        decoder = DECODERS[name](MODEL, variables)
        run = lambda decoder=decoder: generate(
            decoder, [PROMPT, [7]], max_new_tokens=[NEW, 1], logprobs=True
        )
        if expected == "not finite":
            with pytest.warns(UserWarning, match="logits of texts .0.* were not finite"):
                result = run()
        else:
            result = run()
        assert (result.tokens[0].tolist(), result.finish[0]) == (TEXT[:count], expected), case
        assert np.isfinite(result.logprobs[0]).all()


def test_another_text_of_the_batch_goes_on():
    variables = changed(("embed", "tokens", "table"), (7, 0), np.nan)
    with pytest.warns(UserWarning, match=r"texts \[1\] were not finite"):
        result = generate(plain(MODEL, variables), [PROMPT, [7]], max_new_tokens=NEW)
    assert result.finish == ["length", "not finite"] and result.tokens[0].tolist() == TEXT
    assert len(result.tokens[1]) == 0


HEATS = [0.0, float(np.finfo(np.float32).tiny), 1e-12, 1.0, 1e4, 3e38]
CUTS = [  # top_k, top_p, min_p; all but the first two leave the most likely token only
    (0, 1.0, 0.0), (288, 1.0, 0.0), (1, 1.0, 0.0), (0, 1e-37, 0.0), (0, 1.0, 1.0), (1, 1e-37, 1.0),
]  # fmt: skip
ENDS = [(heat, *cut) for heat in HEATS for cut in CUTS]
# The last row of the prompt's beginning is no token, so lookup drafts one that must not be chosen.
COPIED = [97, 98, 287, 99, 97, 98]
PADDED = tiny_decoder(vocab_size=288, num_heads=2, embed_dim=8)


@functools.cache
def padded():
    """Weights with which rows beyond the tokenizer have the largest logits."""
    variables = random_variables(PADDED)
    table = np.array(variables.params["embed"]["tokens"]["table"])
    table[260:] *= 30
    params = {**variables.params, "embed": {"tokens": {"table": jnp.asarray(table)}}}
    return variables._replace(params=params)


DRAFTED = {
    "plain": plain,
    "lookup": lambda model, variables: lookup(model, variables, length=3),
    "exit": lambda model, variables: speculative(
        model, variables, early_exit_drafter(model, variables, 1), length=2
    ),
    "pipe": lambda model, variables: pipeinfer(
        model, variables,
        composite_drafter(lookup_drafter(), early_exit_drafter(model, variables, 1)),
    ),
}  # fmt: skip


@functools.cache
def at_the_ends(name):
    heat, k, p, least = (list(values) for values in zip(*ENDS))
    return generate(
        DRAFTED[name](PADDED, padded()), [COPIED] * len(ENDS), temperature=heat, top_k=k, top_p=p,
        min_p=least, max_new_tokens=5, key=jax.random.key(2), logprobs=True,
        tokenizer=ByteTokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize("name", DRAFTED)
def test_settings_at_their_ends_give_tokens_in_every_decoder(name):
    """Known tokens and finite log-probabilities everywhere, greedy ones where a setting says so."""
    result, alone = at_the_ends(name), at_the_ends("plain")
    tokens = np.stack(result.tokens)
    assert tokens.max() < 260 and result.finish == ["length"] * len(ENDS)
    assert np.isfinite(np.stack(result.logprobs)).all()
    best = tokens[0].tolist()
    for row, (heat, *cut) in zip(tokens, ENDS, strict=True):
        if heat <= 1e-12 or tuple(cut) in CUTS[2:]:
            assert row.tolist() == best, (heat, cut)
    assert best == alone.tokens[0].tolist()
    if name == "pipe":
        assert (tokens == np.stack(alone.tokens)).all()
    hot = tokens[[heat >= 1e4 and tuple(cut) in CUTS[:2] for heat, *cut in ENDS]]
    assert len(np.unique(hot)) > 10  # of 20 draws among all tokens
    inputs = np.array([[*COPIED, *best]], np.int32)
    logits = np.array(PADDED.apply(padded(), inputs)[0])[0, len(COPIED) - 1 : -1]
    assert (logits.argmax(-1) >= 260).all() and logits[:, :260].argmax(-1).tolist() == best


def test_rows_beyond_the_tokenizer_are_never_chosen():
    """A draft and a target with one tokenizer and other numbers of rows decode together."""
    sizes = {"num_layers": 1, "num_heads": 2, "embed_dim": 8}
    target, draft = (tiny_decoder(vocab_size=rows, **sizes) for rows in (288, 272))
    variables, drafts = random_variables(target), random_variables(draft, seed=1)
    table = np.array(variables.params["embed"]["tokens"]["table"])
    table[260:] *= 30  # rows that would win
    params = {**variables.params, "embed": {"tokens": {"table": jnp.asarray(table)}}}
    variables = variables._replace(params=params)
    run = lambda decoder, heat=0.0: generate(
        decoder, ["ab"], tokenizer=ByteTokenizer(), draft_tokenizer=ByteTokenizer(),
        max_new_tokens=10, temperature=heat, key=jax.random.key(3), logprobs=True,
    )  # fmt: skip
    inputs = lambda tokens: np.array([[97, 98, *tokens]], np.int32)
    assert target.apply(variables, inputs([]))[0][0, -1].argmax() >= 260
    drafter = model_drafter(draft, drafts, target_tokens=288)
    alone, padded = plain(target, variables), pipeinfer(target, variables, drafter)
    cases = [(run(alone), run(speculative(target, variables, drafter, length=2))),
             (run(alone, 0.8), run(padded, 0.8))]  # fmt: skip
    for first, other in cases:
        assert first.tokens[0].tolist() == other.tokens[0].tolist()
        assert (first.tokens[0] < 260).all()
        # The log-probabilities are those of the tokens alone.
        logits = np.asarray(target.apply(variables, inputs(first.tokens[0]))[0], np.float64)
        logp = logits[0, 1:-1, :260]
        logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
        expected = logp[np.arange(10), first.tokens[0]]
        for result in (first, other):
            np.testing.assert_allclose(result.logprobs[0], expected, atol=1e-3)
    with pytest.raises(ValueError, match=r"288 tokens and the draft 272.*target_tokens=288"):
        speculative(target, variables, model_drafter(draft, drafts))
    assert model_drafter(target, variables, target_tokens=272).vocab_size == 272
