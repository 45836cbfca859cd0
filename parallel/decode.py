"""What a decoder is, and the frame of all that draft and verify.

A decoder advances a batch of texts by ticks, each of which is one pass of the target model:

    start   the caches, filled with the prompts
    tick    some more tokens of the texts

One invariant holds between the ticks of decoders that draft and verify: the target's cache covers
each text except its newest token, which the next tick reads first. `jaxfm.parallel.generation` runs
ticks in compiled loops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxfm.adapters.prompts import read_prompts
from jaxfm.model import Array, Model, PyTree, Variables
from jaxfm.parallel import sampling as sample
from jaxfm.parallel.cache import (
    CausalModel,
    Positions,
    Prior,
    causal_model,
    decoding_layout,
    extend,
    positions_of,
    prefill,
    vocab_size,
)
from jaxfm.parallel.drafting import Drafter, Proposer, check_vocabulary, no_state
from jaxfm.parallel.grammar import Standing, follow
from jaxfm.parallel.penalties import line_history
from jaxfm.parallel.verification import Draft, Rules, Text, commit, newest, verify


class DecoderFunctions(NamedTuple):
    """The static part of a decoder. Equal functions share what is compiled.

    Attributes:
      start: `(variables, tokens i32[B, P], length i32[B], cells, chunk) -> state`; `cells` and
        `chunk` are static (`jaxfm.parallel.cache.prefill`).
      tick: `(variables, state, text, rules) -> (state, text)`.
      counters: `(state) -> counts` that the decoder keeps; None: it keeps none.
      whole_model: every device runs the whole model, so ticks keep `Text.top`, and
        `start` takes a `Prior` of its own states as a last argument.
    """

    start: Callable[..., Any]
    tick: Callable[..., tuple[Any, Text]]
    counters: Callable[[Any], Any] | None = None
    whole_model: bool = False


class Policy(NamedTuple):
    """What changes a decoder's settings between two pieces of a text, without a compilation.

    Attributes:
      state: what it has measured so far.
      step: `(state, variables, counters, stats, seconds) -> (state, variables)`, called after a
        piece with the counts since the start, as NumPy arrays, and the seconds that the piece took.
    """

    state: Any
    step: Callable[..., tuple[Any, PyTree]]


class Decoder(NamedTuple):
    """A way to continue texts.

    Attributes:
      functions: what is compiled.
      variables: all arrays that the functions read.
      draft_length: most tokens drafted in a tick; 0: none.
      vocab_size: tokens that the model knows.
      positions: of the model.
      mesh: the devices that it runs on, where it runs on several; None: wherever its variables are.
      policy: changes the variables' settings between pieces; None: they stay.
    """

    functions: DecoderFunctions
    variables: PyTree
    draft_length: int
    vocab_size: int
    positions: Positions
    mesh: Mesh | None = None
    policy: Policy | None = None


def draft_and_verify(
    model: Model, variables: Variables, drafter: Drafter | None, length: int
) -> Decoder:
    """The decoder that checks a drafter's proposals in one pass of the model a tick.

    Args:
      model, variables: the target.
      drafter: continues chains; None: nothing is drafted.
      length: g, tokens drafted a tick; 0 without a drafter.
    Raises:
      ValueError: the model is not a causal language model, the drafter knows another number of
        tokens, or it continues trees only.
    """
    model, variables = read_prompts(model, variables)
    tokens = vocab_size(model, variables)
    proposer = _NOTHING
    if drafter is not None:
        check_vocabulary(tokens, drafter)
        if drafter.chain is None:
            raise ValueError("This drafter continues trees only: give it to `pipeinfer`.")
        proposer = drafter.chain
    return Decoder(
        functions=_functions(causal_model(model), proposer, length),
        variables=(decoding_layout(variables), None if drafter is None else drafter.variables),
        draft_length=length,
        vocab_size=tokens,
        positions=positions_of(model),
    )


@functools.cache
def _functions(lm: CausalModel, proposer: Proposer, draft_length: int) -> DecoderFunctions:
    """Cached, so that the same parts give equal functions."""

    def start(
        variables, tokens: Array, length: Array, cells: int, chunk: int | None,
        prior: Prior | None = None,
    ):  # fmt: skip
        own, drafters = variables
        part = lambda i: prior and prior._replace(state=prior.state[i])
        cache = prefill(lm, own, tokens, length - 1, cells, chunk, part(0))
        return cache, proposer.start(drafters, tokens, length, cells, chunk, part(1))

    def tick(variables, state, text: Text, rules: Rules):
        own, drafters = variables
        cache, drafter_state = state
        draft, drafter_state = proposer.propose(drafters, drafter_state, text, rules, draft_length)
        draft, standing = _in_grammar(draft, text, rules)
        block = jnp.concatenate([newest(text, 1), draft.tokens], axis=1)
        live = jnp.arange(block.shape[1])[None] <= draft.size[:, None]
        live &= ~text.done[:, None]
        x, cache = extend(lm, own, cache, block, text.length - 1, live)
        logits = sample.checked(lm.stages.head(own, x), rules.sampling)
        places = jnp.arange(block.shape[1], dtype=jnp.int32)
        history = line_history(text.tokens, text.length, draft.tokens, places)
        choices = sample.adjusted(logits, rules.sampling, history, standing)
        verdict = verify(choices, draft, rules.sampling, text.length)
        return (cache, drafter_state), commit(text, verdict, draft.size, rules, logits)

    return DecoderFunctions(start, tick, whole_model=True)


def _in_grammar(draft: Draft, text: Text, rules: Rules) -> tuple[Draft, Standing | None]:
    """The draft up to the first token that its text's grammar forbids, and where its places are."""
    grammar = rules.sampling.grammar
    if grammar is None:
        return draft, None
    assert text.states is not None
    left = text.limit - text.length
    states, allowed = follow(grammar, text.states, draft.tokens, left)
    places = jnp.arange(states.shape[1], dtype=jnp.int32)
    standing = Standing(states, left[:, None] - places[None])
    return draft._replace(size=jnp.minimum(draft.size, allowed)), standing


def _propose_nothing(variables, state, text: Text, rules: Rules, length: int) -> tuple[Draft, None]:
    batch = text.length.shape[0]
    return Draft(jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch,), jnp.int32)), None


_NOTHING = Proposer(no_state, _propose_nothing)
