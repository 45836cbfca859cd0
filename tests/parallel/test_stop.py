import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jaxfm.parallel.stop import HIT, Detokenizer, automaton, cut

PIECES = [b"a", b"b", b"ab", b"ba", b"aab", b"", "é".encode(), "é".encode()[:1], "é".encode()[1:]]


@given(
    st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, len(PIECES) - 1), max_size=12),
)
def test_automaton_hits_with_the_token_that_completes_a_stop_string(stops, tokens):
    table = automaton(stops, PIECES)
    state, text = 0, b""
    for token in tokens:
        state, text = table[state, token], text + PIECES[token]
        assert (state == HIT) == any(stop.encode() in text for stop in stops)


@given(
    st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, len(PIECES) - 1), max_size=12),
)
def test_pieces_join_to_the_text_before_the_first_stop_string(stops, tokens):
    """... however they are cut, up to the token that completes it."""
    whole = b"".join(PIECES[token] for token in tokens)
    writer = Detokenizer(PIECES, stops)
    pieces = [writer.add([token]) for token in tokens] + [writer.add([], last=True)]
    expected = cut(whole, [stop.encode() for stop in stops]).decode(errors="replace")
    assert "".join(pieces) == expected


def test_cut_ends_before_the_string_that_is_complete_first():
    assert cut(b"xabcd", [b"abcd", b"bc"]) == b"xa"
    assert cut(b"xabcd", [b"bc", b"abc"]) == b"x"  # complete together: the longer one
    assert cut(b"xyz", [b"bc"]) == b"xyz"


def test_empty_stop_strings_and_huge_tables_raise():
    with pytest.raises(ValueError, match="must not be empty"):
        automaton(["a", ""], PIECES)
    with pytest.raises(ValueError, match="give fewer or shorter"):
        automaton(["ab" * 4000], [b"a"] * 20_000)
    assert automaton(["ab"], PIECES).dtype == np.int32
