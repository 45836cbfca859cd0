"""T7: models of code; what counts is bits per byte of the text, whatever its tokens are.

The label of an example is its number of bytes, a prediction the bits that a model spends on it.
"""

from __future__ import annotations

import lzma
import random
from collections.abc import Iterator, Sequence

import numpy as np

from jaxfm.tasks.hpc.families import FAMILIES
from jaxfm.tasks.hpc.generator import Item
from jaxfm.tasks.hpc.naming import restyle
from jaxfm.tasks.hpc.records.contract import Example, Record, register
from jaxfm.tasks.hpc.render import to_c, to_fortran

ORDER = 6


def function(item: Item, rng: random.Random, language: str) -> Iterator[Example]:
    """A whole function with its directives."""
    if language in item.languages:
        program, style = restyle(item.program, rng)
        write = to_c if language == "c" else to_fortran
        text = write(program, style=style).text
        yield Example(text, len(text.encode()), (), item.family, item)


def bits_per_byte(labels: Sequence, predictions: Sequence) -> dict[str, float]:
    """All bits over all bytes."""
    return {"bits_per_byte": float(np.sum(predictions) / np.sum(labels))}


def uniform(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """Eight bits a byte."""
    return 8.0 * np.array([row.label for row in test], float)


def xz(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """What the test texts add to an archive of the training texts, shared out by their lengths."""
    before = "".join(row.source for row in train).encode()
    after = "".join(row.source for row in test).encode()
    packed = lambda data: len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    sizes = np.array([row.label for row in test], float)
    return 8.0 * (packed(before + after) - packed(before)) * sizes / sizes.sum()


def ngrams(train: Sequence[Example], test: Sequence[Example], order: int = ORDER) -> np.ndarray:
    """The bits of a byte model with contexts of up to `order` bytes, at most 7.

    p_k(s | c) = (n(c, s) + d(c) p_{k-1}(s | c without its first byte)) / (n(c) + d(c)), where n
    counts in the training texts and d(c) is the number of different bytes after c (Witten and Bell
    1991, method C, interpolated); p_{-1} is uniform.
    """
    known = "".join(row.source for row in train).encode()
    found = []
    counts = [_counts(known, size) for size in range(order + 1)]
    for row in test:
        text = row.source.encode()
        p = np.full(len(text), 1 / 256)
        for size, (grams, times, contexts, totals, kinds) in enumerate(counts):
            codes = _codes(text, size)
            n = _looked_up(grams, times, codes)
            at = codes >> np.uint64(8)
            total, different = (_looked_up(contexts, x, at) for x in (totals, kinds))
            seen = total > 0
            p = np.where(seen, (n + different * p) / np.where(seen, total + different, 1), p)
        found.append(-np.log2(p).sum())
    return np.array(found)


def _codes(text: bytes, size: int) -> np.ndarray:
    """u64[len(text)]: each byte with the `size` before it; zeros stand before the text."""
    data = np.frombuffer(b"\0" * size + text, np.uint8).astype(np.uint64)
    codes = np.zeros(len(text), np.uint64)
    for i in range(size + 1):
        codes = (codes << np.uint64(8)) | data[i : i + len(text)]
    return codes


def _counts(text: bytes, size: int):
    """Grams of `size` bytes and the next, and how often; their contexts: how often, next bytes."""
    grams, times = np.unique(_codes(text, size), return_counts=True)
    contexts, first, kinds = np.unique(grams >> np.uint64(8), return_index=True, return_counts=True)
    return grams, times, contexts, np.add.reduceat(times, first), kinds


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


register(Record("language", function, tuple(FAMILIES), bits_per_byte,
                {"uniform": uniform, "xz": xz, "n-grams": ngrams}, "none"))  # fmt: skip
