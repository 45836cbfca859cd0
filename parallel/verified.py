"""Several answers to each prompt, of which the first that a verifier passes is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.generation import generate

Answer = TypeVar("Answer", bound=Hashable)


class Choice(NamedTuple, Generic[Answer]):
    """Which of some samples was kept.

    Attributes:
      answer: the first that passed, or else the first sample.
      index: its place among the samples; None: none passed.
      verified: how often the verifier ran; distinct answers are verified once.
    """

    answer: Answer
    index: int | None  # type: ignore[assignment]  # hides a method of tuples
    verified: int


def first_verified(samples: Sequence[Answer], verify: Callable[[Answer], bool]) -> Choice[Answer]:
    """The first sample that passes; later ones are not verified.

    Args:
      samples: answers, at least one; the best guess first.
      verify: on the host, whether an answer is right.
    Raises:
      ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("There are no samples to verify; give at least one.")
    tried: set[Answer] = set()
    for index, sample in enumerate(samples):
        if sample in tried:
            continue
        tried.add(sample)
        if verify(sample):
            return Choice(sample, index, len(tried))
    return Choice(samples[0], None, len(tried))


def best_of(
    decoder: Decoder, prompts: Sequence, verify: Callable[[int, str], bool], *, num_samples: int,
    **settings: Any,
) -> list[Choice[str]]:  # fmt: skip
    """Samples texts for each prompt in one batch and keeps the first that passes.

    Args:
      decoder, prompts: as in `generate`.
      verify: `(prompt's number, text) -> whether it is right`, called after the batch.
      num_samples: k, texts for each prompt; they need a temperature above 0 to differ.
      settings: of `generate`; a tokenizer among them.
    Returns:
      One choice a prompt. The share of those with an index is verified@k.
    Raises:
      ValueError: there is no tokenizer.
    """
    if settings.get("tokenizer") is None:
        raise ValueError("Texts are verified, so best_of needs a tokenizer.")
    texts = generate(decoder, prompts, num_samples=num_samples, **settings).text
    assert texts is not None
    groups = [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
    return [
        first_verified(group, functools.partial(verify, number))
        for number, group in enumerate(groups)
    ]
