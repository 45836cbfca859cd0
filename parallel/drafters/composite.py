"""One drafter after another: the second is asked only where the first has nothing to propose."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax

from jaxfm.parallel.drafting import Drafter, Proposer, Question


def composite_drafter(first: Drafter, second: Drafter) -> Drafter:
    """The drafter that proposes what `first` does where it has proposals, else what `second` does.

    It is meant for lookup before a model: a copied stretch costs no pass of the drafting model,
    which reads the copied tokens later. Only the pipe keeps track of what a drafter has still to
    read, so the result continues trees, not chains.

    Args:
      first, second: drafters that continue trees.
    Raises:
      ValueError: the two know different numbers of tokens, or one of them continues no trees.
    """
    known = sorted({d.vocab_size for d in (first, second) if d.vocab_size is not None})
    if len(known) > 1:
        raise ValueError(f"The two drafters know different numbers of tokens: {known}.")
    if first.tree is None or second.tree is None:
        raise ValueError("Both drafters must continue trees; one of them has no `tree`.")
    return Drafter(
        chain=None,
        tree=_tree(first.tree, second.tree),
        variables=(first.variables, second.variables),
        vocab_size=known[0] if known else None,
    )


@functools.cache
def _tree(first: Proposer, second: Proposer) -> Proposer:
    def start(variables, *args):
        return first.start(variables[0], *args), second.start(variables[1], *args)

    def propose(variables, state, question: Question, levels: int, width: int):
        answer, own = first.propose(variables[0], state[0], question, levels, width)
        keep = lambda others: (answer, others)
        other = lambda others: second.propose(variables[1], others, question, levels, width)
        # The branch that leaves the other's cache alone comes first, or XLA copies it.
        nothing = ~answer.proposals.valid[0].any()
        answer, others = lax.switch(nothing.astype(jnp.int32), [keep, other], state[1])
        return answer, (own, others)

    return Proposer(start, propose)
