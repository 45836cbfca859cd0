"""Speculative decoding: a small model drafts, the large one checks all drafts in one pass.

Greedy output is what the large model alone gives; sampled output has its distribution
(`jaxfm.parallel.verification.verify`). Source: Leviathan et al. 2023; Chen et al. 2023.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax

from jaxfm.model import Array, Model, Variables
from jaxfm.parallel import sampling as sample
from jaxfm.parallel.cache import Cache, Network, decoding_layout, extend, network, prefill
from jaxfm.parallel.decode import (
    Decoder,
    Drafter,
    check_draft_length,
    draft_and_verify,
    vocab_size,
)
from jaxfm.parallel.verification import Draft, Rules, Text, newest, room


def speculative(
    model: Model,
    variables: Variables,
    draft: Model,
    draft_variables: Variables,
    *,
    length: int = 4,
) -> Decoder:
    """The decoder whose drafts come from a second model.

    Args:
      model, variables: the target.
      draft, draft_variables: the drafting model; for a subnet of the target, the target's own
        Model with the extracted variables.
      length: tokens drafted a pass of the target.
    Raises:
      ValueError: a length below 1, or the models know different numbers of tokens. Equal numbers
        may still mean different tokens: hand both tokenizers to `generate`, which compares them.
    """
    check_draft_length(length)
    sizes = vocab_size(model, variables), vocab_size(draft, draft_variables)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The target has {sizes[0]} tokens and the draft {sizes[1]}; both need the same "
            "vocabulary."
        )
    drafter = _drafter(network(draft), length)
    return draft_and_verify(model, variables, drafter, decoding_layout(draft_variables))


@functools.cache
def _drafter(net: Network, length: int) -> Drafter:
    def start(variables, tokens: Array, text_length: Array, cells: int, chunk: int | None) -> Cache:
        return prefill(net, variables, tokens, text_length - 2, cells, chunk)

    def propose(variables, cache: Cache, text: Text, rules: Rules) -> tuple[Draft, Cache]:
        count = room(text, length)

        def choose(x: Array, place: Array) -> tuple[Array, Array | None]:
            """The draft's next token i32[B, 1] at `place` i32[B], and its distribution."""
            logits = net.stages.head(variables, x)
            if rules.sampling.temperature is None:
                return logits.argmax(-1).astype(jnp.int32), None
            logp = sample.log_probs(logits, rules.sampling)
            keys = sample.keys(rules.sampling, place[:, None], sample.PROPOSE)
            return sample.draw(logp, keys), jnp.exp(logp)[:, 0]

        # When all drafts were accepted, the draft model has not read the last of them: it always
        # reads the two newest tokens.
        first = text.length - 2
        live = (first[:, None] + jnp.arange(2)[None] >= 0) & ~text.done[:, None]
        x, cache = extend(net, variables, cache, newest(text, 2), first, live)
        token, probs = choose(x[:, 1:], text.length)

        def step(carry, i):
            cache, token = carry
            live = (i <= count)[:, None] & ~text.done[:, None]
            x, cache = extend(net, variables, cache, token, text.length - 1 + i, live)
            following, probs = choose(x, text.length + i)
            return (cache, following), (following[:, 0], probs)

        order = jnp.arange(1, length, dtype=jnp.int32)
        (cache, _), (later, later_probs) = lax.scan(step, (cache, token), order)
        tokens = jnp.concatenate([token, later.T], axis=1)
        if probs is not None:
            probs = jnp.concatenate([probs[:, None], jnp.swapaxes(later_probs, 0, 1)], axis=1)
        return Draft(tokens, count, probs), cache

    return Drafter(length, start, propose)
