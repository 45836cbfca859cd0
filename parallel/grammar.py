"""Decoding that keeps to a grammar: which tokens it allows next, from two gathers a place.

Each text has a state of its grammar's automaton over tokens (`jaxfm.parallel.grammars`), which
moves on with committed tokens; states along a draft are computed inside the tick. In each place the
logits of tokens that the grammar forbids there become -inf, after bias and penalties and before
temperature, top-k, top-p and min-p, so that what is drawn from is the model's distribution over
allowed tokens, renormalised. A token is allowed if a text of the grammar can still be reached
within the tokens that are left, so every text is whole when it ends, except where a stop string
ends it. A token that stops a text is allowed exactly where the text is one of the grammar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import Array
from jaxfm.parallel.grammars.vocabulary import FREE, TokenAutomaton


class Grammar(NamedTuple):
    """The automata of G grammars in one table; state 0, of texts without one, allows all tokens.

    Attributes:
      table: i32[S, K] the state after a token of each class; negative: not allowed.
      classes: i32[G, V] of each token.
      group: i32[S] the grammar of each state.
      steps: i32[S] fewest tokens to a text of the grammar.
      needs: i32[S] fewest tokens to a longer one.
      likely: i32[S] the token that forced bytes suggest; -1: none.
    """

    table: Array
    classes: Array
    group: Array
    steps: Array
    needs: Array
    likely: Array


class Standing(NamedTuple):
    """Where T places of texts are in their grammars.

    Attributes:
      states: i32[B, T] before each place.
      left: i32[B, T] tokens that the text has room for, from that place on.
    """

    states: Array
    left: Array


def pack(parts: Sequence[TokenAutomaton]) -> tuple[Grammar, list[int]]:
    """The tables of some grammars, and the first state of each.

    Numbers of states and classes are rounded up to powers of two, so that few shapes are compiled.
    """
    up = lambda count: max(16, 1 << (count - 1).bit_length())
    rows = up(1 + sum(len(part.table) - 1 for part in parts))
    columns = up(max(part.table.shape[1] for part in parts))
    groups = 1 << (len(parts) - 1).bit_length()
    table = np.full((rows, columns), FREE, np.int32)
    table[1:] = -1
    classes = np.zeros((groups, len(parts[0].classes)), np.int32)
    fields = {name: np.zeros(rows, np.int32) for name in ("group", "steps", "needs", "likely")}
    fields["likely"][:] = -1
    begin, firsts = 1, []
    for number, part in enumerate(parts):
        size = len(part.table) - 1
        own = slice(begin, begin + size)
        moved = np.where(part.table[1:] > FREE, part.table[1:] + begin - 1, part.table[1:])
        table[own, : part.table.shape[1]] = moved
        classes[number] = part.classes
        fields["group"][own] = number
        for name in ("steps", "needs", "likely"):
            fields[name][own] = getattr(part, name)[1:]
        firsts.append(begin)
        begin += size
    return Grammar(jnp.asarray(table), jnp.asarray(classes), **_arrays(fields)), firsts


def _arrays(fields: dict[str, np.ndarray]) -> dict[str, Array]:
    return {name: jnp.asarray(values) for name, values in fields.items()}


def mask(logits: Array, grammar: Grammar, standing: Standing) -> Array:
    """f32[B, T, V], the logits with -inf for tokens that the grammar forbids; NaN stays.

    Places that no text reaches, as those after a draft that was forbidden, may allow nothing; there
    all is allowed.
    """
    following = grammar.table[standing.states]
    allowed = (following >= 0) & (grammar.steps[following] < standing.left[..., None])
    allowed |= ~allowed.any(-1, keepdims=True)
    classes = grammar.classes[grammar.group[standing.states]]
    allowed = jnp.take_along_axis(allowed, classes, axis=-1)
    return jnp.where(allowed | jnp.isnan(logits), logits, -jnp.inf)


def advance(grammar: Grammar, states: Array, tokens: Array) -> Array:
    """i32[...], the states after tokens i32[...]; negative: not allowed."""
    return grammar.table[states, grammar.classes[grammar.group[states], tokens]]


def advance_within(grammar: Grammar, states: Array, tokens: Array, left: Array) -> Array:
    """As `advance`; also negative where the text cannot be whole after `left` i32[...] tokens."""
    after = advance(grammar, states, tokens)
    return jnp.where(grammar.steps[after] < left, after, -1)


def follow(grammar: Grammar, states: Array, tokens: Array, left: Array) -> tuple[Array, Array]:
    """The states along drafts, and how many of these are allowed.

    Args:
      grammar: of all texts.
      states: i32[B] before the drafts.
      tokens: i32[B, g] drafts.
      left: i32[B] tokens that each text has room for.
    Returns:
      i32[B, g + 1] states before each draft and after the last, FREE after a forbidden one; i32[B].
    """

    def step(carry, token):
        states, left = carry
        after = advance_within(grammar, states, token, left)
        states = jnp.maximum(after, FREE)
        return (states, left - 1), (states, after >= 0)

    _, (later, good) = lax.scan(step, (states, left), tokens.T)
    along = jnp.concatenate([states[:, None], later.T], axis=1)
    return along, jnp.cumprod(good.astype(jnp.int32), axis=0).sum(0, dtype=jnp.int32)


def complete(grammar: Grammar, states: Array, left: Array) -> Array:
    """bool[...], where no longer text of the grammar has room."""
    return grammar.needs[states] > left
