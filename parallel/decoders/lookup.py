"""Lookup decoding: drafts copied from an earlier place in the same text.

The longest ending of the text that occurred before (the latest occurrence of it) tells what came
next then; that is drafted now. A draft that reaches the end of the text goes on with itself, so a
text that repeats with any period is continued with that period. No model is asked: the cost is a
comparison of integers on the device. Source: Saxena 2023, prompt lookup decoding.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from jaxfm.model import Array, Model, Variables
from jaxfm.parallel.decode import Decoder, Drafter, check_draft_length, draft_and_verify
from jaxfm.parallel.verification import Draft, Text, room


def lookup(
    model: Model, variables: Variables, *, length: int = 8, max_ngram: int = 4, min_ngram: int = 1
) -> Decoder:
    """The decoder that drafts from the text itself.

    Args:
      model, variables: the model that verifies.
      length: tokens drafted a pass.
      max_ngram, min_ngram: longest and shortest ending looked for.
    Raises:
      ValueError: a length below 1, or not 1 <= min_ngram <= max_ngram.
    """
    check_draft_length(length)
    if not 1 <= min_ngram <= max_ngram:
        raise ValueError(
            f"min_ngram={min_ngram} and max_ngram={max_ngram}: need 1 <= min_ngram <= max_ngram."
        )
    return draft_and_verify(model, variables, _drafter(length, max_ngram, min_ngram))


@functools.cache
def _drafter(length: int, max_ngram: int, min_ngram: int) -> Drafter:
    def propose(variables, state, text: Text, rules) -> tuple[Draft, None]:
        tokens, found = continuation(text.tokens, text.length, length, max_ngram, min_ngram)
        return Draft(tokens, jnp.where(found, room(text, length), 0)), None

    return Drafter(length, lambda variables, tokens, length, cells, chunk: None, propose)


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
