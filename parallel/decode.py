"""What a decoder is, and the frame of all that draft and verify.

A decoder advances a batch of texts by ticks, each one pass of the target model:

    start   the caches, filled with the prompts
    tick    some more tokens of the texts

One invariant holds between the ticks of decoders that draft and verify: the target's cache covers
each text but its newest token, which the next tick reads first. `jaxfm.parallel.generation` runs
ticks in compiled loops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxfm.model import Array, Model, PyTree, Variables
from jaxfm.parallel.cache import Network, decoding_layout, extend, network, prefill
from jaxfm.parallel.verification import Draft, Rules, Text, commit, newest, verify


class Program(NamedTuple):
    """The functions of a decoder. Equal programs share what is compiled.

    Attributes:
      start: `(variables, tokens i32[B, P], length i32[B], cells, chunk) -> state`; `cells` and
        `chunk` are static (`jaxfm.parallel.cache.prefill`).
      tick: `(variables, state, text, rules) -> (state, text)`.
      counters: `(state) -> counts` of the decoder's own; None: it has none.
    """

    start: Callable[..., Any]
    tick: Callable[..., tuple[Any, Text]]
    counters: Callable[[Any], Any] | None = None


class Policy(NamedTuple):
    """What changes a decoder's settings between two pieces of a text, without a compilation.

    Attributes:
      state: what it has learned so far.
      step: `(state, variables, counters, stats, seconds) -> (state, variables)`, after a piece:
        counts since the start, as NumPy arrays, and the seconds that the piece took.
    """

    state: Any
    step: Callable[..., tuple[Any, PyTree]]


class Decoder(NamedTuple):
    """A way to continue texts.

    Attributes:
      program: its functions.
      variables: all arrays they read.
      draft_length: most tokens drafted in a tick; 0: none.
      vocab_size: tokens that the model knows.
      max_len: longest text that the model has positions for; None: any.
      mesh: the devices that it runs on, where it runs on several; None: wherever its variables are.
      policy: changes the variables' settings between pieces; None: they stay.
    """

    program: Program
    variables: PyTree
    draft_length: int
    vocab_size: int
    max_len: int | None
    mesh: Mesh | None = None
    policy: Policy | None = None


class Drafter(NamedTuple):
    """Where proposals come from.

    Attributes:
      length: g, proposals a tick.
      start: as in Program; the drafter's own state.
      propose: `(variables, state, text, rules) -> (Draft, state)`.
    """

    length: int
    start: Callable[..., Any]
    propose: Callable[..., tuple[Draft, Any]]


def draft_and_verify(
    model: Model, variables: Variables, drafter: Drafter, drafter_variables: PyTree = None
) -> Decoder:
    """The decoder that checks a drafter's proposals in one pass of the model a tick."""
    program = _program(network(model), drafter)
    learned = getattr(model.config, "positions", None) == "learned"
    return Decoder(
        program,
        (decoding_layout(variables), drafter_variables),
        drafter.length,
        vocab_size(model, variables),
        model.config.max_len if learned else None,
    )


@functools.cache
def _program(net: Network, drafter: Drafter) -> Program:
    """Cached, so that the same parts give equal programs."""

    def start(variables, tokens: Array, length: Array, cells: int, chunk: int | None):
        own, drafters = variables
        cache = prefill(net, own, tokens, length - 1, cells, chunk)
        return cache, drafter.start(drafters, tokens, length, cells, chunk)

    def tick(variables, state, text: Text, rules: Rules):
        own, drafters = variables
        cache, drafter_state = state
        draft, drafter_state = drafter.propose(drafters, drafter_state, text, rules)
        block = jnp.concatenate([newest(text, 1), draft.tokens], axis=1)
        live = jnp.arange(block.shape[1])[None] <= draft.size[:, None]
        live &= ~text.done[:, None]
        x, cache = extend(net, own, cache, block, text.length - 1, live)
        logits = net.stages.head(own, x)
        verdict = verify(logits, draft, rules.sampling, text.length)
        return (cache, drafter_state), commit(text, verdict, draft.size, rules, logits)

    return Program(start, tick)


def vocab_size(model: Model, variables: Variables) -> int:
    """V, the number of logits of a causal language model."""
    stages = network(model).stages
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    logits = jax.eval_shape(lambda v, t: stages.head(v, stages.embed(v, t, t)), variables, one)
    return logits.shape[-1]


def check_draft_length(length: int) -> None:
    """Raises ValueError for a draft length below 1."""
    if length < 1:
        raise ValueError(f"length={length} tokens cannot be drafted; give 1 or more.")
