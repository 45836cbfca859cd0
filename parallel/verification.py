"""What all decoders share: the text so far, the check of drafted tokens, and their commitment.

`verify` decides how many drafted tokens are accepted and which token follows them; `commit` writes
these to the text and stops where the rules say so. Both are pure and independent of models and
caches.
Source: Leviathan et al. 2023, algorithm 1; Chen et al. 2023, theorem 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.model import Array
from jaxfm.parallel import grammar as grammars
from jaxfm.parallel import sampling as sample
from jaxfm.parallel.sampling import Sampling
from jaxfm.parallel.stop import HIT


class Stats(NamedTuple):
    """Counts for each request.

    Attributes:
      passes: i32[B] passes of the target model.
      drafted: i32[B, g] tokens that were proposed, by their place in the draft.
      accepted: i32[B, g] the ones of them that were committed.
    """

    passes: Array
    drafted: Array
    accepted: Array


class Top(NamedTuple):
    """The n most likely tokens at each place, the most likely first.

    Attributes:
      tokens: i32[..., n].
      logprobs: f32[..., n], the log-softmax of the model's logits at these.
    """

    tokens: Array
    logprobs: Array


class Text(NamedTuple):
    """A batch of texts, prompts included.

    Attributes:
      tokens: i32[B, N]; places from `length` on are undefined.
      length: i32[B] tokens so far.
      limit: i32[B] length at which a request ends.
      done: bool[B].
      progress: i32[B] state of the automaton of stop strings.
      stats: counts.
      failed: bool[B], the text ended because the logits of its next token were not finite.
      logprobs: f32[B, N] log-softmax of the model's logits at each generated token, or None.
      top: [B, N, n] the most likely tokens at the place of each, or None.
      states: i32[B] of each text's grammar, after its tokens; None without grammars.
    """

    tokens: Array
    length: Array
    limit: Array
    done: Array
    progress: Array
    stats: Stats
    failed: Array
    logprobs: Array | None = None
    top: Top | None = None
    states: Array | None = None


class Rules(NamedTuple):
    """How tokens are chosen and where a text ends.

    Attributes:
      sampling: how each request draws.
      stop_tokens: i32[n]; a text ends with the first of these.
      automaton: i32[M, V] of `jaxfm.parallel.stop`, or None without stop strings.
    """

    sampling: Sampling
    stop_tokens: Array
    automaton: Array | None = None


class Draft(NamedTuple):
    """Proposed continuations.

    Attributes:
      tokens: i32[B, g].
      size: i32[B] how many of them are proposed; the first ones.
      probs: f32[B, g, V] the distributions that they were drawn from; None: they were not drawn
        (all mass is on the token).
    """

    tokens: Array
    size: Array
    probs: Array | None = None


class Verdict(NamedTuple):
    """The outcome of a pass of the target.

    Attributes:
      tokens: i32[B, g + 1]; the accepted drafts, then the target's own token, or FAILED.
      accepted: i32[B] number of accepted drafts; the first `accepted + 1` tokens count.
    """

    tokens: Array
    accepted: Array


def newest(text: Text, count: int) -> Array:
    """i32[B, count], the last tokens of each text; the first repeats where there are fewer."""
    places = text.length[:, None] - count + jnp.arange(count)[None]
    return jnp.take_along_axis(text.tokens, jnp.maximum(places, 0), axis=1)


def room(text: Text, length: int) -> Array:
    """i32[B], how many of `length` drafts a text still has room for; 0 if it is done."""
    left = jnp.clip(text.limit - text.length - 1, 0, length)
    return jnp.where(text.done, 0, left)


def verify(logits: Array, draft: Draft, sampling: Sampling, length: Array) -> Verdict:
    """Accepts a prefix of the draft and chooses the token after it.

    Greedy: drafts are accepted as long as they are the argmax. Sampling: draft d is accepted with
    probability min(1, p(d) / q(d)); the first that is rejected is replaced by a draw from
    max(p - q, 0), normalised; if none is rejected, the next token is drawn from p. Either way each
    token has the distribution p. Nothing is accepted where logits are not finite.

    Args:
      logits: f32[B, g + 1, V] of the target, after the newest token and after each draft, as
        `jaxfm.parallel.sampling` checks and adjusts them.
      draft: g proposals.
      sampling: as the drafts were drawn.
      length: i32[B] of the texts: the position of the first draft.
    """
    drafts, width = draft.tokens, draft.tokens.shape[1]
    meant = jnp.arange(width)[None] < draft.size[:, None]
    failed = sample.failed(logits)
    meant &= ~failed[:, :-1]
    prefix = lambda stands: jnp.cumprod((stands & meant).astype(jnp.int32), axis=1).sum(1)
    if sampling.temperature is None:
        best = sample.choose(logits, sampling, length)
        accepted = prefix(drafts == best[:, :-1])
        own = jnp.take_along_axis(best, accepted[:, None], axis=1)
        return Verdict(_join(drafts, own, accepted), accepted)

    logp = sample.log_probs(logits, sampling)
    positions = length[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    pick = lambda table: jnp.take_along_axis(table, drafts[..., None], axis=-1)[..., 0]
    p = pick(jnp.exp(logp[:, :-1]))
    q = jnp.ones_like(p) if draft.probs is None else pick(draft.probs)
    u = jax.vmap(jax.vmap(jax.random.uniform))(sample.keys(sampling, positions, sample.ACCEPT))
    accepted = prefix(u * q < p)

    at = accepted[:, None, None]
    logp_at = jnp.take_along_axis(logp, at, axis=1)
    if width:
        fell = jnp.minimum(at, width - 1)
        if draft.probs is None:
            token = jnp.take_along_axis(drafts, fell[:, :, 0], axis=1)
            q_at = jax.nn.one_hot(token, logits.shape[-1], dtype=jnp.float32)
        else:
            q_at = jnp.take_along_axis(draft.probs, fell, axis=1)
        rest = jnp.maximum(jnp.exp(logp_at) - q_at, 0)
        # Nothing is left where p and q agree up to rounding; then the draw is from p itself.
        rejected = (at < draft.size[:, None, None]) & (rest.sum(-1, keepdims=True) > 0)
        logp_at = jnp.where(rejected, jnp.log(rest), logp_at)
    place = (length + accepted)[:, None]
    own = sample.draw(logp_at, sample.keys(sampling, place, sample.CHOOSE))
    own = jnp.where(jnp.take_along_axis(failed, accepted[:, None], axis=1), sample.FAILED, own)
    return Verdict(_join(drafts, own, accepted), accepted)


def _join(drafts: Array, own: Array, accepted: Array) -> Array:
    """The drafts with the target's own token [B, 1] put after the accepted ones."""
    padded = jnp.concatenate([drafts, own], axis=1)
    here = jnp.arange(padded.shape[1])[None] == accepted[:, None]
    return jnp.where(here, own, padded)


def commit(
    text: Text, verdict: Verdict, drafted: Array, rules: Rules, logits: Array | None = None
) -> Text:
    """The texts with a verdict appended, up to their limits and the first stop inside it.

    Args:
      text: the texts.
      verdict: of `verify`.
      drafted: i32[B] how many drafts were checked.
      rules: where texts end.
      logits: f32[B, g + 1, V] of the target, needed where `text.logprobs` or `text.top` is
        kept.
    """
    logprobs = top = None
    if text.logprobs is not None:
        assert logits is not None
        logprobs = chosen(logits, verdict.tokens)
    if text.top is not None:
        assert logits is not None
        top = most_likely(logits, text.top.tokens.shape[-1])
    after, count = append(
        text, verdict.tokens, verdict.accepted + 1, rules, logprobs=logprobs, top=top
    )
    order = jnp.arange(verdict.tokens.shape[1] - 1, dtype=jnp.int32)[None]
    number = lambda limit: (order < limit[:, None]).astype(jnp.int32)
    running = ~text.done
    stats = Stats(
        text.stats.passes + running.astype(jnp.int32),
        text.stats.drafted + number(jnp.where(running, drafted, 0)),
        text.stats.accepted + number(jnp.minimum(verdict.accepted, count)),
    )
    return after._replace(stats=stats)


def chosen(logits: Array, tokens: Array) -> Array:
    """f32[B, T], the log-softmax of logits f32[B, T, V] at tokens i32[B, T]."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]


def most_likely(logits: Array, count: int) -> Top:
    """The `count` most likely tokens by logits f32[B, T, V]."""
    logprobs, tokens = lax.top_k(jax.nn.log_softmax(logits, axis=-1), count)
    return Top(tokens.astype(jnp.int32), logprobs)


def append(
    text: Text, new: Array, meant: Array, rules: Rules, *, logprobs: Array | None = None,
    top: Top | None = None,
) -> tuple[Text, Array]:  # fmt: skip
    """The texts with tokens appended, up to their limits and the first stop among the tokens.

    The token that stops a text is part of it; FAILED is none, and stops it before. A text also ends
    where its grammar has no longer one with room. Texts that are done do not change.

    Args:
      text: the texts.
      new: i32[B, n] tokens.
      meant: i32[B] how many of them to append; the first ones.
      rules: where texts end.
      logprobs: f32[B, n], needed where `text.logprobs` is kept.
      top: of [B, n, ...], needed where `text.top` is kept.
    Returns:
      The texts, and i32[B] how many tokens each of them took.
    """
    order = jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    stops, progress, bad = [], [text.progress], new == sample.FAILED
    grammar, standing = rules.sampling.grammar, [text.states]
    for i in range(new.shape[1]):
        token = new[:, i]
        stop = (token[:, None] == rules.stop_tokens[None]).any(1)
        if rules.automaton is not None:
            progress.append(rules.automaton[progress[-1], token])
            stop |= progress[-1] == HIT
        if grammar is not None:
            state = standing[-1]
            assert state is not None
            after = grammars.advance(grammar, state, jnp.where(bad[:, i], 0, token))
            state = jnp.maximum(after, grammars.FREE)
            standing.append(state)
            left = text.limit - text.length - (i + 1)
            stop |= grammars.complete(grammar, state, left)
        stops.append(stop)
    stopping = (jnp.stack(stops, axis=1) | bad).astype(jnp.int32)
    # A token counts if no earlier one of the block stopped the text.
    before = jnp.cumsum(stopping, axis=1) - stopping
    takes = (before == 0) & (order < meant[:, None]) & ~text.done[:, None]
    takes &= text.length[:, None] + order < text.limit[:, None]
    done = text.done | (takes & (stopping > 0)).any(1)
    failed = text.failed | (takes & bad).any(1)
    takes &= ~bad
    count = takes.sum(1, dtype=jnp.int32)
    length = text.length + count
    done |= length >= text.limit

    places = jnp.where(takes, text.length[:, None] + order, text.tokens.shape[1])
    rows = jnp.arange(places.shape[0])[:, None]
    put = lambda old, new: old.at[rows, places].set(new, mode="drop")
    kept = jax.tree.map(put, (text.logprobs, text.top), (logprobs, top))
    reach = lambda states: jnp.take_along_axis(jnp.stack(states, 1), count[:, None], axis=1)[:, 0]
    reached = text.progress if rules.automaton is None else reach(progress)
    states = text.states if grammar is None else reach(standing)
    text = text._replace(
        tokens=put(text.tokens, new), length=length, done=done, failed=failed, progress=reached,
        logprobs=kept[0], top=kept[1], states=states,
    )  # fmt: skip
    return text, count
