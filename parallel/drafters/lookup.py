"""Prompt lookup: drafts copied from an earlier place in the same text.

The longest ending of the text that occurred before (the latest occurrence of it) shows what came
next then; that is drafted now. A draft that reaches the end of the text goes on with itself, so a
text that repeats with any period is continued with that period. No model is asked: the cost is a
comparison of integers on the device. Source: Saxena 2023, prompt lookup decoding.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from jaxfm.model import Array
from jaxfm.parallel.drafting import Answer, Drafter, Proposals, Proposer, Question, no_state
from jaxfm.parallel.verification import Draft, Rules, Text, room


def lookup_drafter(max_ngram: int = 4, min_ngram: int = 1) -> Drafter:
    """The drafter that copies from the text itself.

    Args:
      max_ngram: longest ending that is looked for.
      min_ngram: shortest ending that is looked for.
    Raises:
      ValueError: not 1 <= min_ngram <= max_ngram.
    """
    if not 1 <= min_ngram <= max_ngram:
        raise ValueError(
            f"min_ngram={min_ngram} and max_ngram={max_ngram}: give 1 <= min_ngram <= max_ngram."
        )
    return Drafter(_chain(max_ngram, min_ngram), _tree(max_ngram, min_ngram), None, None)


@functools.cache
def _chain(max_ngram: int, min_ngram: int) -> Proposer:
    def propose(variables, state, text: Text, rules: Rules, length: int) -> tuple[Draft, None]:
        tokens, found = continuation(text.tokens, text.length, length, max_ngram, min_ngram)
        return Draft(tokens, jnp.where(found, room(text, length), 0)), None

    return Proposer(no_state, propose)


@functools.cache
def _tree(max_ngram: int, min_ngram: int) -> Proposer:
    def propose(variables, state, question: Question, levels: int, width: int):
        tokens, found = continuation(
            question.tokens[None], question.length[None], levels, max_ngram, min_ngram
        )
        return Answer(_path(tokens[0], found[0], width), jnp.zeros((), bool)), state

    return Proposer(no_state, propose)


def _path(tokens: Array, valid: Array, width: int) -> Proposals:
    """One path below the best node asked about."""
    levels = tokens.shape[0]
    first = jnp.arange(width)[None] == 0
    spread = lambda x: jnp.broadcast_to(x, (levels, width))
    return Proposals(
        spread(tokens[:, None]),
        jnp.zeros((levels, width), jnp.int32),
        jnp.zeros((levels, width)),
        spread(first & valid),
    )


def continuation(
    tokens: Array, length: Array, count: int, max_ngram: int, min_ngram: int = 1
) -> tuple[Array, Array]:
    """What followed the latest earlier occurrence of the longest ending of each text.

    Args:
      tokens: i32[B, N] of which the first `length` i32[B] are the text.
      count: tokens wanted.
      max_ngram, min_ngram: longest and shortest ending.
    Returns:
      i32[B, count] tokens, and bool[B] whether an ending was found.
    """
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    matches = jnp.zeros(tokens.shape, jnp.int32)  # of the ending, up to and including each place
    unbroken = places < length[:, None] - 1
    for back in range(max_ngram):
        last = jnp.take_along_axis(tokens, jnp.maximum(length[:, None] - 1 - back, 0), axis=1)
        # tokens[p - back] == text[-1 - back]; what rolled in from the end is ruled out.
        unbroken &= (jnp.roll(tokens, back, axis=1) == last) & (places >= back)
        matches += unbroken.astype(jnp.int32)
    best = jnp.argmax(matches * tokens.shape[1] + jnp.where(matches > 0, places, 0), axis=1)
    found = jnp.take_along_axis(matches, best[:, None], axis=1)[:, 0] >= min_ngram
    period = jnp.maximum(length - 1 - best, 1)
    after = best[:, None] + 1 + jnp.arange(count)[None] % period[:, None]
    return jnp.take_along_axis(tokens, after, axis=1), found
