"""Images with a sentence each: scikit-learn's digits, described."""

from __future__ import annotations

import numpy as np

from jaxfm.data.arrays import digits
from jaxfm.data.source import Source
from jaxfm.data.text import token_rows
from jaxfm.tokenizer import Tokenizer

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SENTENCES = ("a handwritten {}", "the digit {}", "somebody wrote a {}")
_LENGTH = 32  # tokens, more than any of them needs


def captioned_digits(
    tokenizer: Tokenizer, *, sentences: tuple[str, ...] = SENTENCES, seed: int = 0
) -> dict[str, Source]:
    """Returns the splits of `digits`, with "tokens" i32[N, T] beside "image" and "label".

    Args:
      tokenizer: of the captions.
      sentences: with {} for the digit; each row has one, drawn at random.
      seed: of the splits and the sentences.
    """
    parts = digits(seed=seed)
    texts = [sentence.format(name) for sentence in sentences for name in NAMES]
    tokens, _ = token_rows(texts, tokenizer, _LENGTH)
    tokens = tokens.reshape(len(sentences), len(NAMES), -1)
    drawn = np.random.default_rng(seed)
    captioned = {}
    for split, source in parts.items():
        label = source.examples["label"]
        which = drawn.integers(0, len(sentences), len(label))
        examples = dict(source.examples) | {"tokens": tokens[which, label]}
        captioned[split] = source._replace(examples=examples)
    return captioned
