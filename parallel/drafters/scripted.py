"""A drafter that is right exactly where it is told to be: for tests, and to measure schedules."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import Array
from jaxfm.parallel.drafting import Answer, Drafter, Proposals, Proposer, Question, no_state
from jaxfm.parallel.token_tree import NONE, Tree, bit


def scripted_drafter(texts: np.ndarray, ranks: np.ndarray, vocab_size: int) -> Drafter:
    """The drafter that knows the texts and errs where it is told to; it continues trees only.

    Args:
      texts: i32[B, N] the right texts, prompts included.
      ranks: i32[B, N] the place of the right token among the candidates for its position; at or
        above the width, it is not among them.
      vocab_size: V; wrong candidates are the tokens after the right one.
    """
    variables = (jnp.asarray(texts, jnp.int32), jnp.asarray(ranks, jnp.int32))
    return Drafter(None, _tree(vocab_size), variables, vocab_size)


@functools.cache
def _tree(vocab: int) -> Proposer:
    def propose(variables, state, question: Question, levels: int, width: int):
        texts, ranks = (rows[question.ask.request] for rows in variables)
        ask, tree = question.ask, question.tree
        positions, ok = tree.positions[ask.tips], ask.tips != NONE
        # Which of the nodes asked about is on the right path; no more than one is.
        right = _on_path(tree, question.committed, texts)[ask.tips] & ok
        order = jnp.arange(width, dtype=jnp.int32)
        out = []
        for _ in range(levels):
            # All candidates go to one parent: the right one, or else the best.
            parent = jnp.where(right.any(), jnp.argmax(right), 0).astype(jnp.int32)
            place = jnp.minimum(positions[parent] + 1, texts.shape[0] - 1)
            hit = right.any() & (ranks[place] == order)
            tokens = jnp.where(hit, texts[place], (texts[place] + 1 + order) % vocab)
            # Earlier candidates are more probable, and so are those of the right parent.
            logq = -0.01 * (order + 1).astype(jnp.float32)
            out.append(
                (tokens, jnp.full((width,), parent), logq, jnp.broadcast_to(ok[parent], (width,)))
            )
            positions, right, ok = positions[parent] + 1 + 0 * order, hit, jnp.ones((width,), bool)
        proposals = Proposals(*(jnp.stack(rows) for rows in zip(*out)))
        return Answer(proposals, jnp.zeros((), bool)), state

    return Proposer(no_state, propose)


def _on_path(tree: Tree, committed: Array, texts: Array) -> Array:
    """bool[N]: nodes that, with all their ancestors, say what the right text says."""
    size = texts.shape[0]
    says = texts[jnp.minimum(tree.positions, size - 1)] == tree.tokens
    says |= tree.positions < committed
    wrong = tree.alive & ~says
    words = tree.bits.shape[1]
    slots = jnp.arange(tree.alive.shape[0], dtype=jnp.int32)
    bad = jnp.where(wrong[:, None], bit(slots, words), jnp.uint32(0))
    bad = lax.reduce(bad, jnp.uint32(0), lax.bitwise_or, (0,))
    return ~((tree.bits & bad[None]) != 0).any(1)
