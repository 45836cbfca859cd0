"""Decoding under a grammar against the model's own logits and the texts that `re` matches."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from jaxfm import hub
from jaxfm.launch import generate as script
from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.model import model_drafter
from jaxfm.parallel.generation import generate
from jaxfm.parallel.grammar import Standing, pack
from jaxfm.parallel.grammars.automaton import regular
from jaxfm.parallel.grammars.vocabulary import over_tokens
from jaxfm.parallel.pipe.pipeinfer import pipeinfer
from jaxfm.parallel.sampling import History, Sampling, adjusted, log_probs
from jaxfm.testing import random_variables, tiny_decoder
from jaxfm.tokenizer import train_bpe

PATTERN = "(ab|ba){1,3}c?"
ALPHABET = "abc"
TEXTS = sorted(
    text
    for size in range(1, 8)
    for text in map("".join, itertools.product(ALPHABET, repeat=size))
    if re.fullmatch(PATTERN, text)
)
TOKENIZER = train_bpe(["abab abba cab bac abc"] * 9, 270)
BYTES = TOKENIZER.token_bytes()
END = TOKENIZER.eos_id
MODEL = tiny_decoder(vocab_size=TOKENIZER.vocab_size, num_layers=1)
VARIABLES, OTHER = random_variables(MODEL), random_variables(MODEL, seed=1)
PROMPT = TOKENIZER.encode("cab ab")
DECODERS = {
    "plain": lambda: plain(MODEL, VARIABLES),
    "lookup": lambda: lookup(MODEL, VARIABLES, length=3),
    "speculative": lambda: speculative(MODEL, VARIABLES, model_drafter(MODEL, OTHER), length=3),
    "pipe": lambda: pipeinfer(MODEL, VARIABLES, model_drafter(MODEL, OTHER), width=2, levels=2),
}


def allowed(text):
    """bool[V], the tokens after which a text of the pattern can still be reached; its end, too."""
    begins = {known[:n].encode() for known in TEXTS for n in range(1, len(known) + 1)}
    found = np.array([bool(b) and text + b in begins for b in BYTES])
    found[END] = text.decode() in TEXTS
    return found


def logits_after(ids):
    padded = np.zeros((1, 24), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(_apply(jnp.asarray(padded)))[0, len(ids) - 1].astype(np.float64)


_apply = jax.jit(lambda tokens: MODEL.apply(VARIABLES, tokens)[0])


def greedy(repetition=1.0, presence=0.0, frequency=0.0, bias=()):
    """The tokens of greedy decoding, one by one in NumPy; no end where the text can only end."""
    ids, text = list(PROMPT), b""
    while ids[-1] != END and (open_ := allowed(text))[:END].any() | open_[END + 1 :].any():
        logits = logits_after(ids)
        for token, more in dict(bias).items():
            logits[token] += more
        new = np.bincount(ids[len(PROMPT) :], minlength=len(BYTES))
        seen = np.bincount(ids, minlength=len(BYTES)) > 0
        scaled = np.where(logits > 0, logits / repetition, logits * repetition)
        logits = np.where(seen, scaled, logits) - frequency * new - presence * (new > 0)
        ids.append(int(np.where(open_, logits, -np.inf).argmax()))
        text += BYTES[ids[-1]] if ids[-1] != END else b""
    return ids[len(PROMPT) :]


def run(name, **settings):
    settings = {"max_new_tokens": 12, "stop_tokens": [END], "grammar": PATTERN} | settings
    return generate(DECODERS[name](), [PROMPT], tokenizer=TOKENIZER, **settings)


def test_the_vocabulary_has_tokens_of_several_bytes():
    assert {b"ab", b"ba"} & set(BYTES) and sum(len(b) > 1 for b in BYTES) >= 4


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_those_of_numpy(name):
    """Without and with penalties and a bias; these come before the mask."""
    assert run(name).tokens[0].tolist() == greedy()
    first = greedy()[0]
    changes = {"repetition_penalty": 1.7, "presence_penalty": 0.9, "frequency_penalty": 0.6}
    found = run(name, logit_bias={first: -2.0}, **changes).tokens[0].tolist()
    assert found == greedy(1.7, 0.9, 0.6, {first: -2.0})


@pytest.mark.parametrize("name", DECODERS)
def test_a_stop_string_ends_a_text_of_a_grammar(name):
    whole = run(name).text[0]
    stop = whole[2:4]
    found = run(name, stop_strings=[stop])
    assert stop and found.text == [whole[: whole.index(stop)]]
    assert found.finish == ["stop string"]


def test_what_is_drawn_from_is_the_renormalized_distribution():
    """At every state of the grammar, after temperature, and after top-p and min-p, in NumPy."""
    made = over_tokens(regular(PATTERN), BYTES, ends=[END])
    grammar, (first,) = pack([made])
    rng = np.random.default_rng(0)
    for text in (b"", b"a", b"ab", b"abba", b"ababba"):
        state = first
        for byte in text:
            state = grammar.table[state, grammar.classes[0, BYTES.index(bytes([byte]))]]
        logits = rng.normal(size=len(BYTES)).astype(np.float32) * 3
        p = np.where(allowed(text), np.exp(logits / 0.7), 0.0).astype(np.float64)
        p /= p.sum()
        order = np.argsort(-p)
        kept = order[np.cumsum(p[order]) - p[order] < 0.8]
        nucleus = np.zeros_like(p)
        nucleus[kept] = p[kept] * (p[kept] >= 0.3 * p.max())
        one = lambda value: jnp.full((1,), value, jnp.float32)
        for cuts, expected in (
            ({}, p),
            ({"top_p": one(0.8), "min_p": one(0.3)}, nucleus / nucleus.sum()),
        ):
            sampling = Sampling(
                jax.random.key(0), jnp.zeros(1, jnp.int32), one(0.7), grammar=grammar, **cuts
            )
            standing = Standing(jnp.full((1, 1), state), jnp.full((1, 1), 9))
            masked = adjusted(jnp.asarray(logits)[None, None], sampling, NO_HISTORY, standing)
            found = np.exp(np.asarray(log_probs(masked, sampling)))[0, 0]
            np.testing.assert_allclose(found, expected, atol=2e-6)


NO_HISTORY = History(*(jnp.zeros((1, 0), jnp.int32),) * 2, before=jnp.zeros((1, 1, 0), bool))


@pytest.mark.parametrize("name", DECODERS)
def test_sampled_texts_have_the_renormalized_distribution(name):
    """Pearson's test over whole texts; those expected fewer than five times are one cell.

    The texts of 24 keys, 10 to 33, have p-values spread evenly, and 0.99 all together.
    """
    temperature, number = 2.0, 400
    expected: dict[str, float] = {}
    open_ = [(tuple(PROMPT), b"", 1.0)]
    while open_:
        ids, text, mass = open_.pop()
        p = np.where(allowed(text), np.exp(logits_after(ids) / temperature), 0.0)
        p /= p.sum()
        if p[END]:
            expected[text.decode()] = expected.get(text.decode(), 0.0) + mass * p[END]
        open_ += [
            ((*ids, int(t)), text + BYTES[t], mass * p[t]) for t in np.flatnonzero(p) if t != END
        ]
    assert set(expected) == set(TEXTS) and abs(sum(expected.values()) - 1) < 1e-9
    settings = {"temperature": temperature, "key": jax.random.key(11), "num_samples": number}
    found = run(name, **settings).text
    counts = {text: found.count(text) for text in set(found)}
    assert set(counts) <= set(TEXTS)
    often = [text for text, mass in expected.items() if number * mass >= 5]
    pairs = [(counts.get(text, 0), number * expected[text]) for text in often]
    rest = number - sum(n for n, _ in pairs), number - sum(e for _, e in pairs)
    pairs += [rest] if rest[1] >= 5 else []
    statistic = sum((n - e) ** 2 / e for n, e in pairs)
    assert len(pairs) > 4 and chi2.sf(statistic, len(pairs) - 1) > 1e-3


def test_the_script_writes_a_text_of_the_grammar(tmp_path, capsys):
    hub.save(MODEL, VARIABLES, tmp_path, TOKENIZER)
    config = script.GenerateConfig(
        model=str(tmp_path), prompt=("cab ab",), grammar=PATTERN, max_new_tokens=12
    )
    script.main(config)
    assert re.fullmatch(PATTERN, capsys.readouterr().out.removeprefix("cab ab").rstrip("\n"))
    with pytest.raises(ValueError, match="no end; close it"):
        script.GenerateConfig(model=str(tmp_path), prompt=("c",), grammar="(ab")
