"""Sets of characters, and the bytes by which UTF-8 writes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Ranges = tuple[tuple[int, int], ...]
"""Code points from first to last of each range, in order, without overlap."""

LAST = 0x10FFFF
_LENGTHS = ((0x7F, 1), (0x7FF, 2), (0xFFFF, 3), (LAST, 4))  # last code point, and its bytes


def ranges(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """The union of ranges that may overlap."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(pairs):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return tuple(merged)


def single(text: str) -> Ranges:
    """The set of the characters of a text."""
    return ranges((ord(character), ord(character)) for character in text)


def complement(some: Ranges) -> Ranges:
    """All code points that are not in a set."""
    edges = [-1, *(edge for pair in some for edge in pair), LAST + 1]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return tuple((low + 1, high - 1) for low, high in gaps if low + 1 <= high - 1)


DIGITS = ranges([(0x30, 0x39)])
LETTERS = ranges([*DIGITS, *single("_"), (0x41, 0x5A), (0x61, 0x7A)])
SPACES = single(" \t\n\r\f\v")
ANY = complement(single("\n"))


def utf8(some: Ranges) -> Iterator[tuple[tuple[int, int], ...]]:
    """Sequences of byte ranges that together match the UTF-8 of exactly these characters.

    Halves of surrogate pairs stand for no character and are left out. The split of ranges is that
    of Cox 2010, "Regular expression matching in the wild", section on UTF-8.
    """
    for low, high in some:
        for first, last in ((low, min(high, 0xD7FF)), (max(low, 0xE000), high)):
            begin = first
            for limit, length in _LENGTHS:
                if begin <= min(limit, last):
                    yield from _split(begin, min(limit, last), length)
                begin = max(begin, limit + 1)


def _split(low: int, high: int, length: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Code points of one length, cut until each piece is a product of byte ranges."""
    for i in range(1, length):
        below = (1 << 6 * i) - 1  # the bits of the last i bytes
        if low & ~below == high & ~below:
            continue
        if low & below:
            yield from _split(low, low | below, length)
            yield from _split((low | below) + 1, high, length)
            return
        if high & below != below:
            yield from _split(low, (high & ~below) - 1, length)
            yield from _split(high & ~below, high, length)
            return
    yield tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))
