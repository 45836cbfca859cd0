"""From the grammars that a caller asks for to tables on the device; mistakes raise here."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array
from jaxfm.parallel.grammar import Grammar, pack
from jaxfm.parallel.grammars.automaton import Automaton, regular
from jaxfm.parallel.grammars.vocabulary import FREE, TokenAutomaton, over_tokens
from jaxfm.tokenizer import Tokenizer


def make_grammar(
    grammar, room: np.ndarray, tokenizer: Tokenizer | None, vocab_size: int,
    ends: Sequence[int] = (), logit_bias=None,
) -> tuple[Grammar | None, Array | None]:  # fmt: skip
    """The tables of a batch and the first state i32[B] of each text; None and None without one.

    Args:
      grammar: a pattern or an automaton for all texts, or one (or None) for each.
      room: i32[B] tokens that each text may have.
      tokenizer: of the model.
      vocab_size: rows of the model.
      ends: tokens that end a text.
      logit_bias: as in `generate`; tokens with -inf are none of the grammar's.
    Raises:
      TypeError: something else than patterns and automata.
      ValueError: another number of grammars, a wrong one, one that the tokens cannot spell, or one
        whose shortest text has no room.
    """
    alone = isinstance(grammar, (str, Automaton)) or grammar is None
    each = [grammar] * len(room) if alone else list(grammar)
    if len(each) != len(room):
        raise ValueError(f"grammar has {len(each)} entries; give one, or {len(room)}.")
    if all(one is None for one in each):
        return None, None
    if tokenizer is None:
        raise ValueError("A grammar needs a tokenizer, to know the bytes of each token.")
    biases = [logit_bias] * len(each) if isinstance(logit_bias, Mapping) else logit_bias
    parts: list[TokenAutomaton] = []
    own: list[TokenAutomaton | None] = []
    for i, one in enumerate(each):
        if one is None:
            own.append(None)
            continue
        if not isinstance(one, (str, Automaton)):
            raise TypeError(f"A grammar must be a pattern or an automaton, got {one!r}.")
        bias = biases[i] if biases else {}
        banned = frozenset(int(t) for t, value in bias.items() if value == -np.inf)
        made = _made(one, tokenizer, vocab_size, tuple(ends), banned)  # type: ignore[arg-type]
        least = made.needs[1] if made.steps[1] == 0 and not ends else max(made.steps[1], 1)
        if least > room[i]:
            raise ValueError(_no_room(int(least), int(room[i]), i))
        own.append(made)
        if not any(made is part for part in parts):
            parts.append(made)
    grammars, firsts = pack(parts)
    place = {id(part): first for part, first in zip(parts, firsts, strict=True)}
    states = [FREE if made is None else place[id(made)] for made in own]
    return grammars, jnp.asarray(states, jnp.int32)


def _no_room(least: int, room: int, text: int) -> str:
    if least > room and least >= 2**30:
        return f"The grammar of text {text} has the empty text only; give it stop_tokens, or none."
    return (
        f"The shortest text of the grammar of text {text} takes {least} tokens; max_new_tokens is "
        f"{room}. Give more."
    )


@functools.lru_cache(maxsize=64)
def _made(
    grammar: str | Automaton, tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...],
    banned: frozenset[int],
) -> TokenAutomaton:  # fmt: skip
    automaton = regular(grammar) if isinstance(grammar, str) else grammar
    token_bytes = list(tokenizer.token_bytes())[:vocab_size]
    token_bytes += [b""] * (vocab_size - len(token_bytes))
    return over_tokens(automaton, token_bytes, ends, banned - set(ends))
