"""Penalties for tokens that a text already has: repetition, presence and frequency.

The definitions are those of Hugging Face's `transformers` and of OpenAI's API (as vLLM has them),
so settings carry over. For a token that stands c times among those generated so far:

    repetition r    logit / r where the logit is above 0, else logit * r; also for tokens of the
                    prompt (Keskar et al. 2019)
    frequency f     logit - f c
    presence p      logit - p where c > 0

What counts is what comes before the place that is chosen for, drafts included. So a pass that
checks drafts has other counts at each place, and so has every node of a tree of tokens: `History`
says which tokens each of the places sees.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxfm.model import Array


class Penalties(NamedTuple):
    """The penalties of each request of a batch. One that is None is off for all.

    Attributes:
      begin: i32[B], position of the first generated token.
      repetition: f32[B] above 0; 1: off.
      presence: f32[B]; 0: off.
      frequency: f32[B]; 0: off.
    """

    begin: Array
    repetition: Array | None = None
    presence: Array | None = None
    frequency: Array | None = None


class History(NamedTuple):
    """The tokens that come before each of T places.

    Attributes:
      tokens, positions: i32[B, N] of all tokens that any of the places sees.
      before: bool[B, T, N], which of them come before each place.
    """

    tokens: Array
    positions: Array
    before: Array


def line_history(tokens: Array, length: Array, drafts: Array, counts: Array) -> History:
    """What comes before places of texts that go on with drafts.

    Args:
      tokens: i32[B, N], of which the first `length` i32[B] are the text.
      drafts: i32[B, g], what follows it.
      counts: i32[T], how many of the drafts come before each place.
    """
    (batch, size), (width, places) = tokens.shape, (drafts.shape[1], counts.shape[0])
    order = jnp.arange(size, dtype=jnp.int32)[None]
    text = jnp.broadcast_to((order < length[:, None])[:, None], (batch, places, size))
    ahead = jnp.arange(width, dtype=jnp.int32)
    drafted = jnp.broadcast_to((ahead[None] < counts[:, None])[None], (batch, places, width))
    positions = jnp.broadcast_to(order, tokens.shape)
    return History(
        tokens=jnp.concatenate([tokens, drafts], axis=1),
        positions=jnp.concatenate([positions, length[:, None] + ahead[None]], axis=1),
        before=jnp.concatenate([text, drafted], axis=2),
    )


def penalized(logits: Array, penalties: Penalties, history: History) -> Array:
    """f32[B, T, V], the logits of T places after the penalties for what comes before each."""
    along = lambda setting: setting[:, None, None]
    if penalties.repetition is not None:
        rate = along(penalties.repetition)
        less = jnp.where(logits > 0, logits / rate, logits * rate)
        logits = jnp.where(_counts(history, logits.shape[-1]) > 0, less, logits)
    if penalties.presence is None and penalties.frequency is None:
        return logits
    generated = history.before & (history.positions >= penalties.begin[:, None])[:, None]
    counts = _counts(history._replace(before=generated), logits.shape[-1])
    if penalties.frequency is not None:
        logits = logits - along(penalties.frequency) * counts
    if penalties.presence is not None:
        logits = jnp.where(counts > 0, logits - along(penalties.presence), logits)
    return logits


def _counts(history: History, vocab_size: int) -> Array:
    """f32[B, T, V], how often each token comes before each place."""
    batch, places, _ = history.before.shape
    row, place = jnp.arange(batch)[:, None, None], jnp.arange(places)[None, :, None]
    counts = jnp.zeros((batch, places, vocab_size))
    # One scatter by three indices; `vmap` of a plain one takes minutes to compile inside branches.
    return counts.at[row, place, history.tokens[:, None]].add(
        history.before.astype(jnp.float32), mode="drop"
    )
