"""Stop strings, found on the device while tokens are committed.

The strings become one automaton over bytes (Aho and Corasick 1975), and from it one over tokens: a
table `next_state[state, token]`, so that a string is found however the tokens cut it. The text is
then cut on the host at the byte where the string begins.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import numpy as np

HIT = 1  # the state that a text stays in once it holds a stop string; 0 is the first state
_MOST_ENTRIES = 2**26


def automaton(stop_strings: Sequence[str], token_bytes: Sequence[bytes]) -> np.ndarray:
    """i32[M, V]: the state after each token in each state; M is a multiple of 16.

    Args:
      stop_strings: at least one, and none of them empty.
      token_bytes: for each of V token ids the bytes that it stands for.
    Raises:
      ValueError: no string or an empty one, or a table of more than 2**26 entries.
    """
    stops = [string.encode() for string in stop_strings]
    if not stops or not all(stops):
        raise ValueError(f"Stop strings must not be empty, got {list(stop_strings)!r}.")
    prefixes = sorted({stop[:i] for stop in stops for i in range(len(stop))}, key=len)
    states = [prefixes[0], None, *prefixes[1:]]
    # Unreachable states are added, so that programs are compiled for few shapes.
    states += [None] * (-len(states) % 16)
    if len(states) * len(token_bytes) > _MOST_ENTRIES:
        raise ValueError(
            f"Stop strings with {len(states)} states over {len(token_bytes)} tokens need a table "
            f"of more than {_MOST_ENTRIES} entries; give fewer or shorter ones."
        )
    number = {state: i for i, state in enumerate(states) if state is not None}

    def follow(state: bytes | None, byte: int) -> int:
        if state is None:
            return HIT
        seen = state + bytes([byte])
        if any(seen.endswith(stop) for stop in stops):
            return HIT
        return next(number[seen[i:]] for i in range(len(seen) + 1) if seen[i:] in number)

    by_byte = np.array([[follow(state, byte) for byte in range(256)] for state in states], np.int32)
    lengths = np.array([len(token) for token in token_bytes])
    table = np.repeat(np.arange(len(states), dtype=np.int32)[:, None], len(token_bytes), axis=1)
    for i in range(lengths.max(initial=0)):
        longer = np.flatnonzero(lengths > i)
        ith = np.array([token_bytes[token][i] for token in longer.tolist()])
        table[:, longer] = by_byte[table[:, longer], ith[None]]
    return table


def cut(text: bytes, stops: Sequence[bytes]) -> bytes:
    """The text up to the stop string that is complete first."""
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        return text
    end, negative_length = min(ends)
    return text[: end + negative_length]


class Detokenizer:
    """The text of one growing sequence of tokens, in pieces that are never taken back.

    It holds back the bytes of an incomplete character and whatever may turn out to be the
    beginning of a stop string.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop_strings: Sequence[str] = ()):
        self.token_bytes = token_bytes
        self.stops = [string.encode() for string in stop_strings]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = b""
        self.given = 0

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """The next piece; after the `last` tokens nothing is held back."""
        self.text += b"".join(self.token_bytes[token] for token in tokens)
        ready = len(cut(self.text, self.stops))
        if ready == len(self.text) and not last:
            most = max((len(stop) for stop in self.stops), default=1) - 1
            tails = (self.text[len(self.text) - i :] for i in range(min(most, ready), 0, -1))
            held = next((t for t in tails if any(stop.startswith(t) for stop in self.stops)), b"")
            ready -= len(held)
        piece = self.text[self.given : ready]
        self.given = max(ready, self.given)
        return self.decoder.decode(piece, final=last)
