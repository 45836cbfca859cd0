"""Directives from a decoder keep to their grammar, alike for all decoders, and are judged."""

import numpy as np
import pytest

from jaxfm.launch.hpc.completions import Completer, Pair, encode, scores, train
from jaxfm.launch.hpc.writing import figures, judged, translate, write
from jaxfm.models.families.decoder import DecoderConfig
from jaxfm.parallel import plain
from jaxfm.parallel.grammars.automaton import regular
from jaxfm.tasks.hpc import records
from jaxfm.tasks.hpc.directives import grammar_of, in_order
from jaxfm.tasks.hpc.records.pragma import question
from jaxfm.tasks.hpc.tokenizers import LexerTokenizer
from jaxfm.testing import random_variables, tiny_decoder
from jaxfm.tokenizer import ByteTokenizer

TOKENIZER = LexerTokenizer()
MADE = records.splits(records.record("pragma"), 6, 12, 6, ("train", "other language"))
ASKED = [question(row) for rows in MADE.values() for row in rows][::3]


def completer():
    model = tiny_decoder(vocab_size=TOKENIZER.vocab_size, num_layers=1, max_len=512)
    return Completer(model, random_variables(model), TOKENIZER)


def test_what_is_written_keeps_to_the_grammar_and_is_judged():
    own = completer()._replace(noted=True)
    written = write(own, ASKED, num_samples=3, temperature=2.0)
    again = write(own, ASKED, num_samples=1, make=plain)
    for w, other, q in zip(written, again, ASKED):
        assert w.question == q and len(w.answers) == len(w.right) == 3
        assert all(regular(grammar_of(q)).matches(a.encode()) for a in w.answers)
        assert w.answers[0] == other.answers[0]
        assert (w.kept().index is None) == (not any(w.right))
    found = figures(written)
    assert found["verified_at_3"] >= found["verified_at_1"]
    perfect = figures(judged(ASKED, [q.answer for q in ASKED]))
    assert set(perfect.values()) == {1.0}
    with pytest.raises(ValueError, match="samples differ only above 0"):
        write(own, ASKED, temperature=0.0)


def test_a_checked_translation_has_only_directives_that_pass():
    rows = records.splits(records.record("translation"), 1, 12, 1, ("train",))["train"][:2]
    programs = [row.item.program for row in rows]
    for text in translate(completer(), programs, checked=True, num_samples=2):
        assert text.startswith("void kernel(")


def test_training_on_pairs_learns_their_answers():
    pairs = [Pair(f"{a}+{b}=", str(a)) for a in range(4) for b in range(4)]
    groups = encode([*pairs, Pair("x" * 40, "y")], ByteTokenizer(), (4, 12))
    assert [len(group["tokens"]) for group in groups] == [0, 16]
    row = groups[1]["tokens"][5]
    assert row.tolist()[:8] == [256, *b"1+1=", *b"1", 257, 258]
    assert groups[1]["begin"].tolist() == [5] * 16
    config = DecoderConfig(
        vocab_size=260, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_len=64
    )
    steps = list(train(config, groups, ByteTokenizer(), steps=80, learning_rate=2e-2))
    assert steps[-1].steps == 80 and steps[-1].loss < 0.3 * steps[0].loss
    assert scores(steps[-1].completer, groups)["exact_match"] > 0.9
    with pytest.raises(ValueError, match="no row to train on"):
        next(train(config, groups[:1], ByteTokenizer(), steps=1))


def test_the_names_of_an_answer_are_those_of_the_loop():
    short = [in_order(q) for q in ASKED]
    assert all("v0" in q.source for q in short)
    assert np.mean([q.answer == s.answer for q, s in zip(ASKED, short)]) < 1
