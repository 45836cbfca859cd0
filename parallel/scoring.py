"""How likely words are after prompts: a causal language model as a classifier.

>>> import jax
>>> from jaxfm.testing import tiny_decoder
>>> from jaxfm.tokenizer import ByteTokenizer
>>> model = tiny_decoder(vocab_size=260)
>>> score = word_scorer(model, model.init(jax.random.key(0)), ByteTokenizer())
>>> score(["2 + 2 =", "2 - 2 ="], [" 4", " 0", " none"]).shape
(2, 3)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.adapters.prompts import read_prompts
from jaxfm.model import Array, Model, Variables, fold_layers, layers_of
from jaxfm.parallel.cache import CausalModel, causal_model, positions_of
from jaxfm.parallel.requests import bucket
from jaxfm.tokenizer import Tokenizer

# (N prompts, W words that may follow) -> log p(word | prompt) f32[N, W]
Score = Callable[[Sequence[str], Sequence[str]], np.ndarray]

_BATCH = 8  # prompts that are scored at once


def word_scorer(model: Model, variables: Variables, tokenizer: Tokenizer) -> Score:
    """Returns a function that gives log p(word | prompt) of several words for each prompt.

    A prompt is read once: the words stand behind it side by side, in places of the same positions
    that do not see each other. Prompts of lengths up to the same power of two share one program.
    What is longer than the model's positions loses its beginning.

    Args:
      model, variables: a causal language model, adapted or not; held fixed.
      tokenizer: of the model.
    Raises:
      ValueError: the model is not a causal language model.
    """
    model, variables = read_prompts(model, variables)
    program, room = _program(causal_model(model)), positions_of(model).number

    def score(prompts: Sequence[str], words: Sequence[str]) -> np.ndarray:
        ends = [tokenizer.encode(word) for word in words]
        longest = max(map(len, ends))
        table = np.zeros((len(ends), longest), np.int32)
        for row, end in zip(table, ends):
            row[: len(end)] = end
        sizes = np.array(list(map(len, ends)), np.int32)
        most = None if room is None else room - longest
        if most is not None and most < 1:
            raise ValueError(f"words={tuple(words)} are longer than the model's {room} positions.")
        ids = [tokenizer.encode(text)[-(most or 0) :] for text in prompts]
        out = np.zeros((len(ids), len(words)), np.float32)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(ids), _BATCH):
            chosen = by_length[start : start + _BATCH]
            width = bucket(max(1, max(len(ids[i]) for i in chosen)))
            width = width if most is None else min(width, most)
            tokens = np.zeros((_BATCH, width), np.int32)
            length = np.ones((_BATCH,), np.int32)
            for place, i in enumerate(chosen):
                tokens[place, : len(ids[i])] = ids[i]
                length[place] = max(1, len(ids[i]))
            out[chosen] = program(variables, tokens, length, table, sizes)[: len(chosen)]
        return out

    return score


@functools.cache
def _program(lm: CausalModel) -> Callable[..., Array]:
    """`(variables, tokens i32[B, T], length i32[B], words i32[W, n], sizes i32[W]) -> f32[B, W]`.

    `sizes` says how many tokens of each word are real.
    """

    @jax.jit
    def score(variables: Variables, tokens, length, words, sizes) -> Array:
        batch, width = tokens.shape
        number, longest = words.shape
        flat = jnp.broadcast_to(words.reshape(1, -1), (batch, number * longest))
        place = jnp.tile(jnp.arange(longest, dtype=jnp.int32), number)[None]
        before = jnp.arange(width, dtype=jnp.int32)[None]
        positions = jnp.concatenate(
            [jnp.broadcast_to(before, (batch, width)), length[:, None] + place], axis=1
        )
        # Branch 0 is the prompt, -1 its padding, 1 and on are the words.
        owner = jnp.repeat(jnp.arange(1, number + 1, dtype=jnp.int32), longest)[None]
        branch = jnp.concatenate(
            [
                jnp.where(before < length[:, None], 0, -1),
                jnp.broadcast_to(owner, (batch, number * longest)),
            ],
            axis=1,
        )
        distance = positions[:, :, None] - positions[:, None]
        mask = (distance >= 0) & ((branch[:, None] == 0) | (branch[:, None] == branch[:, :, None]))
        if lm.window is not None:
            mask &= distance < lm.window
        everything = jnp.concatenate([tokens, flat], axis=1)
        x = lm.stages.embed(variables, everything, positions)
        step = lambda x, layer, _: (lm.stages.block(layer, x, positions, mask)[0], None)
        x = fold_layers(step, x, layers_of(variables))[0]
        # The first token of a word is foretold by the prompt's last one.
        within = jnp.arange(number * longest, dtype=jnp.int32)[None] + width - 1
        source = jnp.where(place == 0, length[:, None] - 1, within)
        logits = lm.stages.head(variables, jnp.take_along_axis(x, source[..., None], axis=1))
        logp = jax.nn.log_softmax(logits, axis=-1)
        each = jnp.take_along_axis(logp, flat[..., None], axis=-1)[..., 0]
        real = jnp.arange(longest, dtype=jnp.int32)[None] < sizes[:, None]
        return jnp.where(real[None], each.reshape(batch, number, longest), 0).sum(-1)

    return score
