"""Texts that begin alike: what they share is read once.

    prefix = read_prefix(decoder, system_prompt, tokenizer=tokenizer)
    generate(decoder, prompts, prefix=prefix, tokenizer=tokenizer)

gives what `generate` gives for the prefix followed by each prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.parallel.cache import Prior
from jaxfm.parallel.decode import Decoder, DecoderFunctions
from jaxfm.parallel.requests import bucket, prompt_ids, whole_number
from jaxfm.tokenizer import Tokenizer


class Prefix(NamedTuple):
    """What a decoder has read of texts that begin alike.

    Attributes:
      decoder: that read it, and the only one that can go on.
      tokens: with which the texts begin.
      prior: the decoder's state after them, of one text.
    """

    decoder: Decoder
    tokens: tuple[int, ...]
    prior: Prior


def read_prefix(
    decoder: Decoder,
    prefix: str | Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    prefill_chunk: int | None = None,
) -> Prefix:
    """Reads what several prompts begin with, for `generate(..., prefix=...)`.

    Args:
      decoder: of `plain`, `lookup` or `speculative`.
      prefix: token ids, or a string where a tokenizer is given. It is encoded on its own, and so
        are the prompts that follow it.
      tokenizer: of the model.
      prefill_chunk: as in `jaxfm.parallel.generation.stream`.
    Raises:
      TypeError, ValueError: as for one prompt; or the decoder is a pipe.
    """
    if not decoder.functions.whole_model:
        raise ValueError(
            "A pipe cannot share a prefix, since its cache belongs to the texts of one call; use "
            "plain, lookup or speculative."
        )
    [tokens] = prompt_ids([prefix], tokenizer, decoder.vocab_size)
    if prefill_chunk is not None:
        prefill_chunk = whole_number("prefill_chunk", prefill_chunk)
    padded = np.zeros((1, bucket(len(tokens))), np.int32)
    padded[0, : len(tokens)] = tokens
    # A text's newest token is not read at the start: here it is the first one after the prefix.
    length = jnp.asarray([len(tokens) + 1], jnp.int32)
    state = _read(decoder.functions, decoder.variables, padded, length, prefill_chunk)
    # A drafter has not read the last one, so both read it with what follows.
    return Prefix(decoder, tuple(tokens), Prior(state, jnp.asarray(len(tokens) - 1, jnp.int32)))


@functools.partial(jax.jit, static_argnames=("functions", "chunk"))
def _read(functions: DecoderFunctions, variables, tokens, length, chunk: int | None):
    return functions.start(variables, tokens, length, tokens.shape[1], chunk)


def check_prefix(prefix: Prefix, decoder: Decoder) -> None:
    """Raises TypeError for what is no prefix, ValueError for one that another decoder has read."""
    if not isinstance(prefix, Prefix):
        raise TypeError(f"prefix must be what `read_prefix` returns, got {type(prefix).__name__}.")
    same = prefix.decoder.functions == decoder.functions
    if not same or prefix.decoder.variables is not decoder.variables:
        raise ValueError("The prefix was read by another decoder; read it with this one.")
