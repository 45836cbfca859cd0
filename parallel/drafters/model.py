"""A causal language model that drafts: a small one, a subnet or the target's own first layers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.adapters.prompts import read_prompts
from jaxfm.model import Array, Model, Variables, is_stacked, layers_of, num_layers
from jaxfm.parallel import sampling as sample
from jaxfm.parallel.cache import (
    Block,
    Cache,
    CausalModel,
    Prior,
    causal_model,
    decoding_layout,
    extend,
    prefill,
    vocab_size,
)
from jaxfm.parallel.drafting import Answer, Drafter, Proposals, Proposer, Question
from jaxfm.parallel.grammar import FREE, Standing, advance, follow
from jaxfm.parallel.penalties import line_history
from jaxfm.parallel.rows import Rows, flat_rows, read_block
from jaxfm.parallel.sampling import Sampling
from jaxfm.parallel.token_tree import NONE, bit, history
from jaxfm.parallel.verification import Draft, Rules, Text, newest, room


def model_drafter(
    model: Model, variables: Variables, *, target_tokens: int | None = None
) -> Drafter:
    """The drafter that asks a causal language model with the target's vocabulary.

    Args:
      model, variables: the drafting model; for a subnet of the target, the target's own Model with
        the extracted variables.
      target_tokens: rows of the target's vocabulary, where the two models have one tokenizer but
        different numbers of rows beyond its tokens; None: as many as the draft has.
    Raises:
      ValueError: the model is not a causal language model.
    """
    model, variables = read_prompts(model, variables)
    tokens = vocab_size(model, variables) if target_tokens is None else target_tokens
    lm = _with_rows(causal_model(model), tokens)
    return Drafter(_chain(lm), _tree(lm), decoding_layout(variables), tokens)


@functools.cache
def _with_rows(lm: CausalModel, tokens: int) -> CausalModel:
    """The model with that many logits: tokens that it lacks get none of the probability."""

    def head(variables: Variables, x: Array) -> Array:
        logits = lm.stages.head(variables, x)[..., :tokens]
        more = [(0, 0)] * (logits.ndim - 1) + [(0, tokens - logits.shape[-1])]
        return jnp.pad(logits, more, constant_values=-jnp.inf)

    return lm._replace(stages=lm.stages._replace(head=head))


def early_exit_drafter(model: Model, variables: Variables, layers: int) -> Drafter:
    """The drafter that runs the target's own first `layers` layers, under its own head.

    Args:
      model, variables: the target.
      layers: at least one, and fewer than the target has.
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
    return model_drafter(model, Variables(*parts))


@functools.cache
def _chain(lm: CausalModel) -> Proposer:
    def start(
        variables, tokens: Array, text_length: Array, cells: int, chunk: int | None,
        prior: Prior | None = None,
    ) -> Cache:  # fmt: skip
        return prefill(lm, variables, tokens, text_length - 2, cells, chunk, prior)

    def propose(variables, cache: Cache, text: Text, rules: Rules, length: int):
        count = room(text, length)
        nothing = jnp.zeros((text.length.shape[0], length), jnp.int32)

        def standing(drafts: Array, i: Array) -> Standing | None:
            grammar = rules.sampling.grammar
            if grammar is None:
                return None
            left = text.limit - text.length
            assert text.states is not None
            states, _ = follow(grammar, text.states, drafts, left)
            here = lax.dynamic_slice_in_dim(states, i, 1, axis=1)
            return Standing(here, (left - i)[:, None])

        def choose(x: Array, drafts: Array, i: Array) -> tuple[Array, Array | None]:
            """The draft's token i32[B, 1] after its first i i32[], and its distribution."""
            logits = sample.known_only(lm.stages.head(variables, x), rules.sampling)
            history = line_history(text.tokens, text.length, drafts, i[None])
            logits = sample.adjusted(logits, rules.sampling, history, standing(drafts, i))
            if rules.sampling.temperature is None:
                return logits.argmax(-1).astype(jnp.int32), None
            logp = sample.log_probs(logits, rules.sampling)
            keys = sample.keys(rules.sampling, (text.length + i)[:, None], sample.PROPOSE)
            return sample.draw(logp, keys), jnp.exp(logp)[:, 0]

        # When all drafts were accepted, the draft model has not read the last of them: it always
        # reads the two newest tokens.
        first = text.length - 2
        live = (first[:, None] + jnp.arange(2)[None] >= 0) & ~text.done[:, None]
        x, cache = extend(lm, variables, cache, newest(text, 2), first, live)
        token, probs = choose(x[:, 1:], nothing, jnp.int32(0))

        def step(carry, i):
            cache, token, drafts = carry
            live = (i <= count)[:, None] & ~text.done[:, None]
            x, cache = extend(lm, variables, cache, token, text.length - 1 + i, live)
            following, probs = choose(x, drafts, i)
            drafts = lax.dynamic_update_slice_in_dim(drafts, following, i, axis=1)
            return (cache, following, drafts), (following[:, 0], probs)

        # The drafts are carried for the penalties; without these nothing reads them.
        carry = cache, token, nothing.at[:, :1].set(token)
        order = jnp.arange(1, length, dtype=jnp.int32)
        (cache, _, _), (later, later_probs) = lax.scan(step, carry, order)
        tokens = jnp.concatenate([token, later.T], axis=1)
        if probs is not None:
            probs = jnp.concatenate([probs[:, None], jnp.swapaxes(later_probs, 0, 1)], axis=1)
        return Draft(tokens, count, probs), cache

    return Proposer(start, propose)


@functools.cache
def _tree(lm: CausalModel) -> Proposer:
    def start(variables, tokens: Array, length: Array, cells: int, chunk: int | None) -> Rows:
        return flat_rows(prefill(lm, variables, tokens, length - 1, cells, chunk))

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
        grammar, states, standing = question.sampling.grammar, question.states, None
        out = []
        for level in range(levels):
            positions = jnp.where(to < none, positions, 0)
            block = Block(*(x[None] for x in (tokens, positions, to, bits, own)))
            x, state, cells = read_block(lm, variables, state, ask.request, cells, block)
            logits = lm.stages.head(variables, x[:, -width:])[0]
            after = positions[-width:] + 1
            seen = history(cells, positions[None, -width:], bits[None, -width:])
            logits = sample.known_only(logits[None], question.sampling)
            if grammar is not None:
                assert states is not None
                standing = Standing(states[None], (end + 1 - after)[None])
            choices = sample.adjusted(logits, question.sampling, seen, standing)[0]
            ranked = _perturbed(choices, question.sampling, after)
            logq, token = lax.top_k(ranked, width)
            best, flat = lax.top_k((scores[:, None] + logq).reshape(-1), width)
            parents = (flat // width).astype(jnp.int32)
            tokens, gain = token.reshape(-1)[flat].astype(jnp.int32), logq.reshape(-1)[flat]
            valid = (best > -jnp.inf) & ~ask.behind
            out.append((tokens, parents, gain, valid))
            if level < levels - 1:
                if grammar is not None:
                    assert states is not None
                    states = jnp.maximum(advance(grammar, states[parents], tokens), FREE)
                positions, scores = after[parents], best
                own = bit(ask.slots[level], words)
                bits = bits[-width:][parents] | own
                to = jnp.where(valid & (positions < end), ask.cells[level], none)
        proposals = Proposals(*(jnp.stack(rows) for rows in zip(*out)))
        return Answer(proposals, jnp.ones((), bool)), state

    return Proposer(start, propose)


def _perturbed(logits: Array, sampling: Sampling, positions: Array) -> Array:
    """f32[T, V] log-scores of adjusted logits, ranked as the target's own draw ranks its tokens."""
    if sampling.temperature is None:
        return jax.nn.log_softmax(logits, axis=-1)
    logp = sample.log_probs(logits[None], sampling)[0]
    keys = sample.keys(sampling, positions[None], sample.CHOOSE)[0]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], logits.dtype))(keys)
    return jax.nn.log_softmax(logp + noise, axis=-1)
