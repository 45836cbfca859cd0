"""From an automaton over bytes to one over tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from jaxfm.parallel.grammars.automaton import DEAD, Automaton

FREE = 0  # the state of a text that has no grammar, or has ended
NEVER = 2**30  # tokens to go where no token leads on
_MOST_ENTRIES = 2**27
_LONGEST = 64  # bytes of a forced continuation


@dataclasses.dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """Which tokens a grammar has in each state; state 0 is FREE, and 1 is the first.

    Attributes:
      table: i32[S, K] the state after a token of each class; DEAD: not allowed.
      classes: i32[V] of each token.
      steps: i32[S] fewest tokens to a text of the grammar.
      needs: i32[S] fewest tokens to one that is longer; NEVER: there is none.
      likely: i32[S] the token that goes furthest along bytes that the grammar forces; -1: none.
    """

    table: np.ndarray
    classes: np.ndarray
    steps: np.ndarray
    needs: np.ndarray
    likely: np.ndarray


def over_tokens(
    automaton: Automaton, token_bytes: Sequence[bytes], ends: Collection[int] = (),
    banned: Collection[int] = (),
) -> TokenAutomaton:  # fmt: skip
    """The automaton over a vocabulary.

    Args:
      automaton: over bytes.
      token_bytes: of each token; those without bytes are never allowed.
      ends: tokens that end a text: allowed exactly where it is one of the grammar.
      banned: tokens that are never allowed.
    Raises:
      ValueError: the tokens spell no text of the grammar, or the table is too large.
    """
    kinds = bytes(automaton.byte_classes.tolist())
    usable = bytes(np.flatnonzero((automaton.table != DEAD).any(0)[automaton.byte_classes]))
    no_text = {*ends, *banned}
    words: dict[bytes, int] = {b"": 0}  # tokens whose bytes are of the same classes are alike
    spelled = np.zeros(len(token_bytes), np.int64)
    for token, text in enumerate(token_bytes):
        if text and token not in no_text and not text.translate(None, usable):
            spelled[token] = words.setdefault(text.translate(kinds), len(words))
    if len(words) * len(automaton.table) > _MOST_ENTRIES:
        raise ValueError(
            f"The grammar's {len(automaton.table)} states and the vocabulary's {len(words)} kinds "
            f"of tokens need a table of more than {_MOST_ENTRIES} entries; give a smaller grammar."
        )
    table = _walk(automaton.table, list(words))
    table, merged = np.unique(table, axis=1, return_inverse=True)
    classes = merged.reshape(-1)[spelled]

    steps = _steps(table, automaton.accepting)
    if steps[0] == NEVER:
        raise ValueError(_inexpressible(automaton, token_bytes, no_text))
    table = np.where((table != DEAD) & (steps[table] < NEVER), table, DEAD)
    needs = np.where(table == DEAD, NEVER, 1 + steps[table]).min(1)
    likely = _likely(automaton, table, classes, token_bytes, no_text)
    # One class more for the tokens that end a text, and state 0 in front.
    over = np.where(automaton.accepting, FREE, DEAD)
    table = np.column_stack([np.where(table == DEAD, DEAD, table + 1), over])
    classes[list(ends)] = table.shape[1] - 1
    classes[list(banned)] = classes_dead = _dead_class(table, classes)
    if classes_dead == table.shape[1]:
        table = np.column_stack([table, np.full(len(table), DEAD)])
    front = lambda values, first: np.concatenate([[first], values]).astype(np.int32)
    table = np.concatenate([np.full((1, table.shape[1]), FREE), table]).astype(np.int32)
    return TokenAutomaton(
        table=table, classes=classes.astype(np.int32), steps=front(steps, 0),
        needs=front(needs, 0), likely=front(likely, -1),
    )  # fmt: skip


def _dead_class(table: np.ndarray, classes: np.ndarray) -> int:
    """The class that is never allowed; a new one where there is none."""
    dead = np.flatnonzero((table[:, :-1] == DEAD).all(0))
    return int(dead[0]) if len(dead) else table.shape[1]


def _walk(table: np.ndarray, words: list[bytes]) -> np.ndarray:
    """i32[S, U], the state after each word of classes of bytes; DEAD after the empty word."""
    lengths = np.array([len(word) for word in words])
    table = np.concatenate([table, np.full((1, table.shape[1]), DEAD, np.int32)])  # row DEAD
    states = np.repeat(np.arange(len(table) - 1, dtype=np.int32)[:, None], len(words), axis=1)
    states[:, lengths == 0] = DEAD
    for i in range(lengths.max()):
        longer = np.flatnonzero((lengths > i) & (states != DEAD).any(0))
        ith = np.array([words[word][i] for word in longer.tolist()], np.int64)
        states[:, longer] = table[states[:, longer], ith[None]]
        # Words that died are DEAD already.
    return states


def _steps(table: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """i64[S], the fewest tokens to an accepting state; NEVER: it is not reached."""
    steps = np.where(accepting, 0, NEVER)
    while True:
        further = np.where(table == DEAD, NEVER, 1 + steps[table]).min(1, initial=NEVER)
        closer = np.minimum(steps, np.minimum(further, NEVER))
        if (closer == steps).all():
            return steps
        steps = closer


def _likely(
    automaton: Automaton, table: np.ndarray, classes: np.ndarray, token_bytes: Sequence[bytes],
    no_text: Collection[int],
) -> np.ndarray:  # fmt: skip
    """i64[S], for each state the longest token along the bytes that must come next; -1: none."""
    ids: dict[bytes, int] = {}
    for token, text in enumerate(token_bytes):
        if text and token not in no_text:
            ids.setdefault(text, token)
    longest = max(map(len, ids), default=0)
    wide = automaton.table[:, automaton.byte_classes]
    forced = ((wide != DEAD).sum(1) == 1) & ~automaton.accepting
    byte = (wide != DEAD).argmax(1)
    likely = np.full(len(table), -1)
    for first in np.flatnonzero(forced):
        state, run = int(first), b""
        while forced[state] and len(run) < min(_LONGEST, longest):
            run += bytes([int(byte[state])])
            state = wide[state, byte[state]]
        tokens = (ids[run[:n]] for n in range(len(run), 0, -1) if run[:n] in ids)
        allowed = (token for token in tokens if table[first, classes[token]] != DEAD)
        likely[first] = next(allowed, -1)
    return likely


def _inexpressible(
    automaton: Automaton, token_bytes: Sequence[bytes], no_text: Collection[int]
) -> str:
    """Why the tokens spell no text: a byte on the way to a shortest one that none of them has."""
    there = {b for i, text in enumerate(token_bytes) if i not in no_text for b in text}
    wide = automaton.table[:, automaton.byte_classes]
    distance = _steps(wide, automaton.accepting)
    state = 0
    while distance[state]:
        ahead = np.where(wide[state] == DEAD, NEVER, distance[wide[state]])
        byte = int(ahead.argmin())
        if byte not in there:
            return (
                f"No token of the vocabulary has the byte 0x{byte:02x} ({bytes([byte])!r}), which "
                "the grammar needs."
            )
        state = wide[state, byte]
    return "No sequence of the vocabulary's tokens spells a text of the grammar."
