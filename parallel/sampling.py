"""From logits to distributions and draws: temperature, top-k, top-p, min-p.

The order and the definitions are those of Hugging Face's `transformers`, so settings carry over:

    0. bias: what the caller adds to the logits of some tokens, then the penalties for tokens that
       the text already has (`jaxfm.parallel.penalties`); then the mask of tokens that the text's
       grammar forbids (`jaxfm.parallel.grammar`)
    1. temperature: logits / temperature; 0 means greedy: all mass on the largest logit
    2. top-k: tokens below the k-th largest are removed
    3. top-p: of the rest, in descending order, a token stays while the mass before it is < top_p
       (Holtzman et al. 2020); the first one always stays
    4. min-p: of the rest, tokens less probable than min_p times the most probable are removed
       (Nguyen et al. 2024)

Tokens whose logits tie exactly with the last one kept stay as well.

Each random draw has its own key, folded from (request, position, purpose): what a request samples
depends neither on its neighbours in the batch nor on how decoding was scheduled.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, Key
from jaxfm.parallel.grammar import Grammar, Standing, mask
from jaxfm.parallel.penalties import History, Penalties, penalized

# Purposes of draws at one position.
PROPOSE, ACCEPT, CHOOSE = 0, 1, 2
# Stands for the token that cannot be chosen, since its logits are not finite.
FAILED = np.iinfo(np.int32).max


class Sampling(NamedTuple):
    """How each request of a batch draws its tokens. A setting that is None is off for all.

    Attributes:
      key: typed key.
      request: i32[B], each request's number.
      temperature: f32[B]; None: greedy.
      top_k: i32[B]; 0: off.
      top_p: f32[B] in (0, 1]; 1: off.
      min_p: f32[B] in [0, 1]; 0: off.
      known: bool[V], which rows of the model are tokens; None: all.
      bias: f32[B, V], added to the logits before all else; -inf: never this token.
      penalties: for tokens that the text already has.
      grammar: tables of all grammars of the batch.
    """

    key: Key
    request: Array
    temperature: Array | None = None
    top_k: Array | None = None
    top_p: Array | None = None
    min_p: Array | None = None
    known: Array | None = None
    bias: Array | None = None
    penalties: Penalties | None = None
    grammar: Grammar | None = None


def checked(logits: Array, sampling: Sampling) -> Array:
    """f32[B, T, V], the model's logits: -inf for rows that are no tokens.

    Where any of them is not finite all are NaN, so that `failed` need look at one.
    """
    finite = jnp.isfinite(logits).all(-1, keepdims=True)
    return jnp.where(finite, known_only(logits, sampling), jnp.nan)


def known_only(logits: Array, sampling: Sampling) -> Array:
    """f32[B, T, V], the logits with -inf for rows that are no tokens."""
    if sampling.known is None:
        return logits
    return jnp.where(sampling.known[None, None], logits, -jnp.inf)


def adjusted(
    logits: Array, sampling: Sampling, history: History, standing: Standing | None = None
) -> Array:
    """f32[B, T, V], the logits that tokens are chosen by: with bias, penalties and grammar.

    Args:
      logits: f32[B, T, V] of the model.
      sampling: bias and penalties.
      history: what comes before each of the T places; it is read where there are penalties.
      standing: where the T places are in their grammars; needed where there are any.
    """
    if sampling.bias is not None:
        logits = logits + sampling.bias[:, None]
    if sampling.penalties is not None:
        logits = penalized(logits, sampling.penalties, history)
    if sampling.grammar is None:
        return logits
    assert standing is not None
    return mask(logits, sampling.grammar, standing)


def failed(logits: Array) -> Array:
    """bool[B, T], where `checked` (and `adjusted`) logits f32[B, T, V] are not finite."""
    return jnp.isnan(logits[..., 0])


def choose(logits: Array, sampling: Sampling, positions: Array) -> Array:
    """i32[B, T], the target's own tokens at positions i32[B, T], from `adjusted` logits."""
    if sampling.temperature is None:
        tokens = logits.argmax(-1).astype(jnp.int32)
    else:
        tokens = draw(log_probs(logits, sampling), keys(sampling, positions, CHOOSE))
    return jnp.where(failed(logits), FAILED, tokens)


def log_probs(logits: Array, sampling: Sampling) -> Array:
    """The logarithms of the distribution that is drawn from; -inf for tokens that were removed.

    Args:
      logits: f32[B, T, V], `adjusted`.
      sampling: with a temperature.
    Returns:
      f32[B, T, V], normalised.
    """
    along = lambda setting: setting[:, None, None]
    assert sampling.temperature is not None
    temperature = along(sampling.temperature)
    # What is divided is the distance from the largest, which is exact near it.
    scores = logits - logits.max(-1, keepdims=True)
    scores = scores / jnp.where(temperature > 0, temperature, 1)
    if sampling.top_k is not None or sampling.top_p is not None:
        scores = _cut_tail(scores, sampling)
    if sampling.min_p is not None:
        top = scores.max(-1, keepdims=True)
        scores = jnp.where(scores < top + jnp.log(along(sampling.min_p)), -jnp.inf, scores)
    best = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=jnp.float32)
    return jnp.where(temperature > 0, jax.nn.log_softmax(scores, axis=-1), jnp.log(best))


def _cut_tail(scores: Array, sampling: Sampling) -> Array:
    """The scores after top-k and top-p, from one sort."""
    ranked = -jnp.sort(-scores, axis=-1)
    if sampling.top_k is not None:
        count = jnp.where(sampling.top_k > 0, sampling.top_k, scores.shape[-1])
        last = jnp.minimum(count, scores.shape[-1])[:, None, None] - 1
        last = jnp.broadcast_to(last, (*scores.shape[:-1], 1))
        lowest = jnp.take_along_axis(ranked, last, axis=-1)
        scores = jnp.where(scores < lowest, -jnp.inf, scores)
        ranked = jnp.where(ranked < lowest, -jnp.inf, ranked)
    if sampling.top_p is not None:
        top_p = sampling.top_p[:, None, None]
        mass = jax.nn.softmax(ranked, axis=-1)
        stays = (jnp.cumsum(mass, axis=-1) - mass < top_p) | (top_p >= 1)
        stays |= jnp.arange(scores.shape[-1])[None, None] == 0
        lowest = jnp.where(stays, ranked, jnp.inf).min(-1, keepdims=True)
        scores = jnp.where(scores < lowest, -jnp.inf, scores)
    return scores


def keys(sampling: Sampling, positions: Array, purpose: int) -> Key:
    """key[B, T]: one key for each position i32[B, T] of each request."""

    def one(request, position):
        key = jax.random.fold_in(jax.random.fold_in(sampling.key, request), position)
        return jax.random.fold_in(key, purpose)

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(sampling.request, positions)


def draw(logp: Array, key: Key) -> Array:
    """i32[...]: one token from each distribution f32[..., V] with each key[...]."""
    flat = logp.reshape(-1, logp.shape[-1])
    tokens = jax.vmap(jax.random.categorical)(key.reshape(-1), flat)
    return tokens.reshape(logp.shape[:-1]).astype(jnp.int32)
