"""Drafts that a grammar forces: where only one continuation is left, it needs no guess.

Where the bytes that come next are forced, the token that goes furthest along them is drafted; the
model checks it as any draft, so the tokens are those of plain decoding. In front of it another
drafter may be asked: its tokens are kept as long as the grammar allows them, and what the grammar
forces goes on after them. Without a grammar nothing is added. Source: jump-forward decoding of
Zheng et al. 2024 (SGLang), there without a check.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from jaxfm.model import Array
from jaxfm.parallel.drafting import Drafter, Proposer, no_state
from jaxfm.parallel.grammar import FREE, advance_within
from jaxfm.parallel.verification import Draft, Rules, Text, room


def forced_drafter(first: Drafter | None = None) -> Drafter:
    """The drafter that proposes what a text's grammar forces; it continues chains only.

    Args:
      first: a drafter of chains whose proposals come before; None: none.
    Raises:
      ValueError: `first` continues no chains.
    """
    if first is None:
        return Drafter(_chain(None), None, None, None)
    if first.chain is None:
        raise ValueError("The first drafter must continue chains; this one has no `chain`.")
    return first._replace(chain=_chain(first.chain), tree=None)


@functools.cache
def _chain(first: Proposer | None) -> Proposer:
    def propose(variables, state, text: Text, rules: Rules, length: int):
        batch = text.length.shape[0]
        draft = Draft(jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch,), jnp.int32))
        if first is not None:
            draft, state = first.propose(variables, state, text, rules, length)
        # What was drawn under the grammar's mask holds what is forced already.
        if rules.sampling.grammar is None or draft.probs is not None:
            return draft, state
        return _continued(draft, text, rules), state

    return Proposer(no_state if first is None else first.start, propose)


def _continued(draft: Draft, text: Text, rules: Rules) -> Draft:
    """The draft up to its first forbidden token, and then what is forced."""
    grammar, states = rules.sampling.grammar, text.states
    assert grammar is not None and states is not None
    follows = going = jnp.ones(states.shape, bool)
    tokens: list[Array] = []
    size = jnp.zeros_like(draft.size)
    for i in range(draft.tokens.shape[1]):
        left, likely = text.limit - text.length - i, grammar.likely[states]
        given = draft.tokens[:, i]
        follows &= (i < draft.size) & (advance_within(grammar, states, given, left) >= 0)
        token = jnp.where(follows, given, jnp.maximum(likely, 0))
        after = advance_within(grammar, states, token, left)
        going &= (follows | (likely >= 0)) & (after >= 0)
        follows &= token == given
        states = jnp.maximum(after, FREE)
        size += going.astype(jnp.int32)
        tokens.append(token)
    return Draft(jnp.stack(tokens, axis=1), jnp.minimum(size, room(text, len(tokens))))
