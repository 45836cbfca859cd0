"""What a drafter is: whatever guesses the next tokens, for draft-then-verify and for the pipe.

A drafter answers one or both of two questions, each with a pair of static functions over a state
of its own (`Proposer`):

    chain   what are the next few tokens of each committed text?    asked by `draft_and_verify`
    tree    what follows these nodes of one text's tree?            asked by `pipeinfer`, every tick

They are two, because their answers differ. A chain is asked of all texts of a batch at once, draws
its tokens and reports the distributions that it drew them from, so that the verdict can accept as
many as possible. A tree is asked of one text while earlier answers are still outstanding, and its
nodes' places in the cache are the scheduler's to give; its proposals are ranked by log q + g, where
g is the very Gumbel noise with which the target will draw its own token at that position: the more
alike the two distributions are, the more often both maxima fall on one token (with probability at
least (1 - d) / (1 + d) at a total variation distance d), and the target's draw does not depend on
the draft at all. Source: Daliri, Musco and Suresh 2024, "Coupling without communication and
drafter-invariant speculative decoding".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxfm.model import Array, PyTree
from jaxfm.parallel.cache import Prior
from jaxfm.parallel.sampling import Sampling
from jaxfm.parallel.token_tree import Cells, Tree


class Proposer(NamedTuple):
    """The functions that answer one question. Equal functions share what is compiled.

    Attributes:
      start: `(variables, tokens i32[B, P], length i32[B], cells, chunk) -> state` after the
        prompts; `cells` and `chunk` are static (`jaxfm.parallel.cache.prefill`). A chain's takes a
        `Prior` of its own state as well.
      propose: the answer and the new state; the numbers are static.
        chain: `(variables, state, text, rules, length) -> (Draft, state)`.
        tree: `(variables, state, question, levels, width) -> (Answer, state)`.
    """

    start: Callable[..., Any]
    propose: Callable[..., tuple[Any, Any]]


class Drafter(NamedTuple):
    """Where proposals come from.

    Attributes:
      chain: continues committed texts; None: it cannot.
      tree: continues nodes of a text's tree; None: it cannot.
      variables: all arrays that these functions read.
      vocab_size: tokens that it knows; None: any.
    """

    chain: Proposer | None
    tree: Proposer | None
    variables: PyTree
    vocab_size: int | None


class Ask(NamedTuple):
    """Which nodes of which text a tree is to be continued from.

    Attributes:
      wanted: bool[] whether the drafter is asked at all.
      request: i32[] the text.
      tips: i32[w] nodes; NONE: an empty place.
      slots: i32[k, w] nodes for the answer.
      cells: i32[k, w] cells for the answer.
      late: i32[M] cells before the best tip that the drafter has still to read; C: none.
      late_bits: u32[M, W] what these see.
      behind: bool[] whether there are more of them: this time the drafter only reads.
    """

    wanted: Array
    request: Array
    tips: Array
    slots: Array
    cells: Array
    late: Array
    late_bits: Array
    behind: Array


class Question(NamedTuple):
    """All that a drafter may look at to continue a tree.

    Attributes:
      ask: which nodes of which text.
      tree, cells: of that text.
      sampling: of that text; arrays of one row.
      tokens: i32[N] the text, followed by the tokens on the way to the best node asked about.
      length: i32[] number of these.
      committed: i32[] number of the text's own.
      end: i32[] position from which on nothing is read or proposed.
      states: i32[w] of the text's grammar after each node asked about; None without grammars.
    """

    ask: Ask
    tree: Tree
    cells: Cells
    sampling: Sampling
    tokens: Array
    length: Array
    committed: Array
    end: Array
    states: Array | None = None


class Proposals(NamedTuple):
    """Levels of proposed nodes, each level below the one before.

    Attributes:
      tokens: i32[k, w].
      parents: i32[k, w]; in the first level indices of the tips asked about, then of the level
        before.
      logprobs: f32[k, w] of each token after its parent, by the drafter.
      valid: bool[k, w].
    """

    tokens: Array
    parents: Array
    logprobs: Array
    valid: Array


class Answer(NamedTuple):
    """Proposals, and whether the drafter read what it was asked about.

    Attributes:
      proposals: k levels of w.
      reads: bool[]; drafters without a cache of their own never do.
    """

    proposals: Proposals
    reads: Array


def no_state(
    variables: PyTree, tokens: Array, length: Array, cells: int, chunk: int | None,
    prior: Prior | None = None,
) -> None:  # fmt: skip
    """The `start` of a proposer without a state."""


def check_vocabulary(vocab_size: int, drafter: Drafter) -> None:
    """Raises ValueError if target and drafter know different numbers of tokens.

    Equal numbers may still mean different tokens: hand both tokenizers to `generate`, which
    compares them.
    """
    if drafter.vocab_size not in (None, vocab_size):
        raise ValueError(
            f"The target has {vocab_size} tokens and the draft {drafter.vocab_size}; both need the "
            "same vocabulary. If they have one tokenizer, and one has more rows than tokens, make "
            f"the drafter with target_tokens={vocab_size}."
        )
