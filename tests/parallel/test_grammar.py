"""Texts that keep to a grammar are whole, and alike for all decoders."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.model import model_drafter
from jaxfm.parallel.generation import advance, generate
from jaxfm.parallel.grammar import Standing, mask, pack
from jaxfm.parallel.grammars.automaton import regular
from jaxfm.parallel.grammars.vocabulary import over_tokens
from jaxfm.parallel.pipe.pipeinfer import pipeinfer
from jaxfm.parallel.verified import best_of, first_verified
from jaxfm.testing import random_variables, tiny_decoder
from jaxfm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
MODEL = tiny_decoder(vocab_size=260, num_layers=1)
VARIABLES = random_variables(MODEL)
OTHER = random_variables(MODEL, seed=1)
PATTERNS = ["a(b|c)*d", r"(reduction\((\+|\*): [a-c]\) ?)+", None, r"\d{2,4}|é+x"]
DECODERS = {
    "plain": lambda: plain(MODEL, VARIABLES),
    "lookup": lambda: lookup(MODEL, VARIABLES, length=3),
    "other": lambda: speculative(MODEL, VARIABLES, model_drafter(MODEL, OTHER), length=3),
    "pipe": lambda: pipeinfer(MODEL, VARIABLES, model_drafter(MODEL, OTHER), width=2, levels=2),
}
PROMPTS = ["ab", "reduction(+: a) r", "x", "1"]


def texts(name, patterns=PATTERNS, prompts=PROMPTS, **settings):
    settings = {"max_new_tokens": 24, "stop_tokens": [257]} | settings
    return generate(DECODERS[name](), prompts, tokenizer=TOKENIZER, grammar=patterns, **settings)


def test_every_decoder_gives_the_same_whole_texts():
    """The last text is sampled; the pipe draws what plain decoding does."""
    settings = {"temperature": [0.0, 0.0, 0.0, 0.9], "key": jax.random.key(0)}
    results = {name: texts(name, **settings) for name in DECODERS}
    for name, result in results.items():
        for pattern, text in zip(PATTERNS, result.text):
            assert pattern is None or re.fullmatch(pattern, text, re.ASCII), (name, text)
        same = slice(None) if name == "pipe" else slice(3)
        expected = [t.tolist() for t in results["plain"].tokens][same]
        assert [t.tolist() for t in result.tokens][same] == expected
    free = texts("plain", None, PROMPTS[2:3])
    assert results["plain"].tokens[2].tolist() == free.tokens[0].tolist()
    alone = texts("plain", PATTERNS[1:2], PROMPTS[1:2])
    assert alone.tokens[0].tolist() == results["plain"].tokens[1].tolist()


def test_random_patterns_are_matched_by_re_without_another_compilation():
    rng = np.random.default_rng(0)

    def pattern(depth):
        kind = rng.integers(0, 5 if depth else 1)
        inner = lambda: pattern(depth - 1)
        return [lambda: rng.choice(["a", "b", "[a-c]", r"\d", "[^x]", "é", "."]),
                lambda: inner() + inner(), lambda: f"({inner()}|{inner()})",
                lambda: f"({inner()})*", lambda: f"({inner()}){{1,2}}"][kind]()  # fmt: skip

    before = None
    for _ in range(6):
        four = [f"{pattern(3)}y" for _ in range(4)]
        result = texts("plain", four, temperature=2.0, key=jax.random.key(1))
        for each, text in zip(four, result.text):
            assert re.fullmatch(each, text, re.ASCII), (each, text)
        before = advance._cache_size() if before is None else before
    assert advance._cache_size() <= before + 3  # other sizes of tables, to powers of two


def test_forced_drafts_are_accepted_and_change_no_token():
    pattern = [r"#pragma omp parallel for (private|reduction)\(a\)"] * 4
    settings = {"max_new_tokens": 45, "stop_tokens": ()}
    alone, forced = texts("plain", pattern, **settings), texts("lookup", pattern, **settings)
    assert forced.text == alone.text
    assert forced.stats.passes.max() < 0.5 * alone.stats.passes.min()


def test_the_first_sample_that_passes_is_kept():
    seen = []
    verify = lambda sample: seen.append(sample) or sample == "c"
    assert first_verified(["a", "b", "a", "c", "d"], verify) == ("c", 3, 3)
    assert seen == ["a", "b", "c"]
    assert first_verified(["x", "x"], verify) == ("x", None, 1)
    with pytest.raises(ValueError, match="no samples"):
        first_verified([], verify)
    settings = {"grammar": "[a-c]", "tokenizer": TOKENIZER, "max_new_tokens": 24}
    kept = best_of(
        plain(MODEL, VARIABLES), PROMPTS[:1], lambda number, text: number == 0 and text == "b",
        num_samples=4, temperature=9.0, key=jax.random.key(0), **settings, stop_tokens=[257],
    )[0]  # fmt: skip
    assert (kept.answer == "b") == (kept.index is not None)


def test_the_automaton_reads_what_re_matches():
    rng = np.random.default_rng(0)
    for pattern in ["a(b|c)*d", "[^a-c]+", ".{2,3}x", r"\d+(\.\d+)?", "é|ü*", r"[\]\-x]{,2}"]:
        found = regular(pattern)
        for _ in range(300):
            text = "".join(rng.choice(list("abcdx1.é\n]-€ü😀"), rng.integers(0, 5)))
            assert found.matches(text.encode()) == bool(re.fullmatch(pattern, text, re.ASCII))
    nested = regular("(?&e)", {"e": r"x|\((?&e)\)"}, depth=2)
    assert nested.matches(b"((x))") and not nested.matches(b"(((x)))")
    loop = regular("(?&l)", {"l": "x(,(?&l))?"})
    assert loop.matches(b"x,x,x") and not loop.matches(b"x,") and len(loop.table) == 2


def test_masked_logits_are_those_of_allowed_tokens():
    """By tokens of several bytes, against every continuation tried by hand."""
    tokens = [b"a", b"b", b"ab", b"ba", b"c", b"", b"bb"]
    made = over_tokens(regular("a(ba)*c"), tokens, ends=[5])
    grammar, (first,) = pack([made])
    state = grammar.table[first, grammar.classes[0, 0]]  # after "a"
    logits = jnp.arange(7.0)[None, None]
    shown = lambda state, left: np.isfinite(
        mask(logits, grammar, Standing(jnp.full((1, 1), state), jnp.full((1, 1), left)))[0, 0]
    ).nonzero()[0].tolist()  # fmt: skip
    assert shown(first, 9) == [0, 2] and shown(state, 9) == [1, 3, 4]
    assert shown(state, 2) == [3, 4] and shown(state, 1) == [4]
    after = grammar.table[state, grammar.classes[0, 4]]
    assert shown(after, 1) == [5]


def test_a_text_closes_within_its_limit():
    for most in (3, 4, 7):
        for name in ("plain", "other"):
            result = texts(name, ["a(b|c)*de"] * 4, max_new_tokens=most, stop_tokens=())
            assert all(re.fullmatch("a(b|c)*de", text) for text in result.text)
    assert texts("plain", ["abc"] * 4).finish == ["grammar"] * 4


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("a(b", r"wrong at position 1 .*the group has no end; close it with \)"),
        ("a**", "wrong at position 2 .*a repeat of a repeat"),
        ("(?&x)", "There is no rule 'x'"),
        ("[^\\x00-\\U0010ffff]", "has no text at all"),
        ("a{30}", "takes 30 tokens; max_new_tokens is 24"),
    ],
)
def test_wrong_grammars_raise_at_the_door(pattern, message):
    with pytest.raises(ValueError, match=message):
        texts("plain", pattern)


def test_a_vocabulary_without_a_needed_byte_is_refused():
    with pytest.raises(ValueError, match=r"has the byte 0x23 \(b'#'\)"):
        over_tokens(regular("a#b|ac#"), [b"a", b"b", b"c"])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generate(plain(MODEL, VARIABLES), [[1]], grammar="a")
