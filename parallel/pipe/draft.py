"""Where the pipe's proposals come from: a model, the text itself, or a script.

A source answers one question a tick: what follows these nodes of a text's tree? It is a pair of
static functions over a state of its own, which lives on the device that drafts:

    start     the state after the prompts
    propose   levels of proposals below the nodes asked about, and the new state

Proposals for sampled texts are ranked by log q + g, where g is the very Gumbel noise with which the
target will draw its own token at that position: the more alike the two distributions are, the more
often both maxima fall on one token (with probability at least (1 - d) / (1 + d) at a total
variation distance d), and the target's draw does not depend on the draft at all. Source: Daliri,
Musco and Suresh 2024, "Coupling without communication and drafter-invariant speculative decoding".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import Array, Model, PyTree, Variables, is_stacked, layers_of, num_layers
from jaxfm.parallel import sampling as sample
from jaxfm.parallel.cache import Block, Network, decoding_layout, network, prefill
from jaxfm.parallel.decode import vocab_size
from jaxfm.parallel.decoders.lookup import continuation
from jaxfm.parallel.pipe.pipeline import Rows, flat_rows, read_block
from jaxfm.parallel.pipe.scheduler import NONE, Ask, Cells, Proposals, Tree, bit
from jaxfm.parallel.sampling import Sampling


class Question(NamedTuple):
    """All that a source may look at to answer.

    Attributes:
      ask: which nodes of which text.
      tree, cells: of that text.
      sampling: of that text; arrays of one row.
      tokens: i32[N] the text, followed by the tokens on the way to the best node asked about.
      length: i32[] of these.
      committed: i32[] tokens of the text.
      end: i32[] position from which on nothing is read or proposed.
    """

    ask: Ask
    tree: Tree
    cells: Cells
    sampling: Sampling
    tokens: Array
    length: Array
    committed: Array
    end: Array


class Answer(NamedTuple):
    """Proposals, and whether the source read what it was asked about.

    Attributes:
      proposals: k levels of w.
      reads: bool[]; sources without a cache of their own never do.
    """

    proposals: Proposals
    reads: Array


class Functions(NamedTuple):
    """The static part of a source; equal functions share what is compiled.

    Attributes:
      start: `(variables, tokens i32[B, P], length i32[B], cells, chunk) -> state`.
      propose: `(variables, state, question, levels, width) -> (Answer, state)`.
    """

    start: Callable[..., Any]
    propose: Callable[..., tuple[Answer, Any]]


class Source(NamedTuple):
    """Where proposals come from.

    Attributes:
      functions: what it does.
      variables: all arrays that these read.
      vocab_size: tokens it knows; None: any.
    """

    functions: Functions
    variables: PyTree
    vocab_size: int | None


def model_source(model: Model, variables: Variables) -> Source:
    """Proposals of a causal language model with the target's vocabulary: a smaller one, or a subnet
    of the target (the target's own Model with the extracted variables)."""
    functions = _model_functions(network(model))
    return Source(functions, decoding_layout(variables), vocab_size(model, variables))


def early_exit(model: Model, variables: Variables, layers: int) -> Source:
    """Proposals of the target's own first `layers` layers, under its own head.

    Raises:
      ValueError: the model has no such number of layers to leave out.
    """
    own = layers_of(variables)
    if not 0 < layers < num_layers(own):
        raise ValueError(
            f"layers={layers}: an early exit keeps 1 to {num_layers(own) - 1} of the model's "
            f"{num_layers(own)} layers."
        )
    if is_stacked(own):
        first = jax.tree.map(lambda x: x[:layers], own)
    else:
        first = Variables(*({str(i): p[str(i)] for i in range(layers)} if p else {} for p in own))
    parts = [{**whole, "layers": cut} if cut else whole for whole, cut in zip(variables, first)]
    return model_source(model, Variables(*parts))


@functools.cache
def _model_functions(net: Network) -> Functions:
    def start(variables, tokens: Array, length: Array, cells: int, chunk: int | None) -> Rows:
        return flat_rows(prefill(net, variables, tokens, length - 1, cells, chunk))

    def propose(variables, state: Rows, question: Question, levels: int, width: int):
        ask, tree, cells, end = question.ask, question.tree, question.cells, question.end
        words, none = tree.bits.shape[1], cells.positions.shape[0]
        join = lambda a, b: jnp.concatenate([a, b])
        at, tips, ok = jnp.minimum(ask.late, none - 1), ask.tips, ask.tips != NONE
        # First what was missed and the nodes asked about, then level after level below them.
        tokens = join(cells.tokens[at], tree.tokens[tips])
        positions = join(cells.positions[at], tree.positions[tips])
        bits = join(ask.late_bits, tree.bits[tips])
        to = join(ask.late, jnp.where(ok, tree.cells[tips], none))
        own = cells.bits[jnp.minimum(to, none - 1)]
        scores = jnp.where(ok, tree.scores[tips], -jnp.inf)
        out = []
        for level in range(levels):
            positions = jnp.where(to < none, positions, 0)
            block = Block(*(x[None] for x in (tokens, positions, to, bits, own)))
            x, state, cells = read_block(net, variables, state, ask.request, cells, block)
            logits = net.stages.head(variables, x[:, -width:])[0]
            after = positions[-width:] + 1
            ranked = _perturbed(logits, question.sampling, after)
            logq, token = lax.top_k(ranked, width)
            best, flat = lax.top_k((scores[:, None] + logq).reshape(-1), width)
            parents = (flat // width).astype(jnp.int32)
            tokens, gain = token.reshape(-1)[flat].astype(jnp.int32), logq.reshape(-1)[flat]
            valid = (best > -jnp.inf) & ~ask.behind
            out.append((tokens, parents, gain, valid))
            if level < levels - 1:
                positions, scores = after[parents], best
                own = bit(ask.slots[level], words)
                bits = bits[-width:][parents] | own
                to = jnp.where(valid & (positions < end), ask.cells[level], none)
        proposals = Proposals(*(jnp.stack(rows) for rows in zip(*out)))
        return Answer(proposals, jnp.ones((), bool)), state

    return Functions(start, propose)


def _perturbed(logits: Array, sampling: Sampling, positions: Array) -> Array:
    """f32[T, V] normalised log-scores, ranked as the target's own draw ranks its tokens."""
    if sampling.temperature is None:
        return jax.nn.log_softmax(logits, axis=-1)
    logp = sample.log_probs(logits[None], sampling)[0]
    keys = sample.keys(sampling, positions[None], sample.CHOOSE)[0]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], logits.dtype))(keys)
    return jax.nn.log_softmax(logp + noise, axis=-1)


def lookup_source(max_ngram: int = 4, min_ngram: int = 1) -> Source:
    """Proposals copied from an earlier place in the same text (`jaxfm.parallel.decoders.lookup`).

    Raises:
      ValueError: not 1 <= min_ngram <= max_ngram.
    """
    if not 1 <= min_ngram <= max_ngram:
        raise ValueError(
            f"min_ngram={min_ngram} and max_ngram={max_ngram}: need 1 <= min_ngram <= max_ngram."
        )
    return Source(_lookup_functions(max_ngram, min_ngram), None, None)


@functools.cache
def _lookup_functions(max_ngram: int, min_ngram: int) -> Functions:
    def propose(variables, state, question: Question, levels: int, width: int):
        tokens, found = continuation(
            question.tokens[None], question.length[None], levels, max_ngram, min_ngram
        )
        return Answer(_chain(tokens[0], found[0], width), jnp.zeros((), bool)), state

    return Functions(lambda variables, tokens, length, cells, chunk: (), propose)


def _chain(tokens: Array, valid: Array, width: int) -> Proposals:
    """One path below the best node asked about."""
    levels = tokens.shape[0]
    first = jnp.arange(width)[None] == 0
    spread = lambda x: jnp.broadcast_to(x, (levels, width))
    return Proposals(
        spread(tokens[:, None]),
        jnp.zeros((levels, width), jnp.int32),
        jnp.zeros((levels, width)),
        spread(first & valid),
    )


def composite(first: Source, second: Source) -> Source:
    """The proposals of `first` where it has any, else those of `second` (which else does nothing).

    Made for lookup before a model: a copied stretch costs no pass of the drafting model, which
    reads up on it later.
    """
    known = {source.vocab_size for source in (first, second)} - {None}
    if len(known) > 1:
        raise ValueError(f"The two sources know different numbers of tokens: {sorted(known)}.")  # type: ignore[type-var]
    functions = _composite_functions(first.functions, second.functions)
    variables = (first.variables, second.variables)
    return Source(functions, variables, known.pop() if known else None)


@functools.cache
def _composite_functions(first: Functions, second: Functions) -> Functions:
    def start(variables, *args):
        return first.start(variables[0], *args), second.start(variables[1], *args)

    def propose(variables, state, question: Question, levels: int, width: int):
        answer, own = first.propose(variables[0], state[0], question, levels, width)
        keep = lambda others: (answer, others)
        other = lambda others: second.propose(variables[1], others, question, levels, width)
        # Passing the other's cache by comes first, or XLA copies it.
        nothing = ~answer.proposals.valid[0].any()
        answer, others = lax.switch(nothing.astype(jnp.int32), [keep, other], state[1])
        return answer, (own, others)

    return Functions(start, propose)


def scripted(texts: np.ndarray, ranks: np.ndarray, vocab_size: int) -> Source:
    """A source that knows the texts and errs where it is told to: for tests and for measuring
    schedules, where the acceptance is to be given.

    Args:
      texts: i32[B, N] the right texts, prompts included.
      ranks: i32[B, N] the place of the right token among the candidates for its position; at or
        above the width: it is not among them.
      vocab_size: V; wrong candidates are the tokens after the right one.
    """
    variables = (jnp.asarray(texts, jnp.int32), jnp.asarray(ranks, jnp.int32))
    return Source(_scripted_functions(vocab_size), variables, vocab_size)


@functools.cache
def _scripted_functions(vocab: int) -> Functions:
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

    return Functions(lambda variables, tokens, length, cells, chunk: (), propose)


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
