"""Labelled words: rows of words and of as many tags, as tokens of which some have a tag.

    words  Angela    Merkel   lives        tokens  [CLS] ange ##la merkel lives [SEP]
    tags   B-PER     I-PER    O            tags    -100  1    -100 2      0     -100

A word's tag stands at the first of its tokens; all other tokens have `IGNORED`, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxfm.data.tables import Column, Table
from jaxfm.data.text import framed
from jaxfm.tokenizer import Tokenizer, frame

IGNORED = -100  # the tag of a token that has none


def holds_words(column: Column) -> bool:
    """Whether the cells of a column are lists of words."""
    if isinstance(column, np.ndarray):
        return False
    cell = next((cell for cell in column if cell is not None and len_of(cell)), None)
    return isinstance(cell, list | tuple) and all(isinstance(word, str) for word in cell)


def len_of(cell: Any) -> int:
    """The length of a list; 0 of what is none."""
    return len(cell) if isinstance(cell, list | tuple) else 0


def tagged(
    table: Table, words: str, tags: str, tokenizer: Tokenizer, length: int
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns tokens i32[N, T], mask bool[N, T] and tags i32[N, T], and the names of the tags.

    Rows stand between the tokenizer's special tokens and are cut where they are longer than
    `length` tokens with these.

    Raises:
      ValueError: a row without words, or with another number of tags; a tag that no training row
        has, or that is not one of those that the file names.
    """
    _check(table, words, tags)
    numbers, classes = _numbered(table, tags)
    space = _space(tokenizer)
    rows, marks = [], []
    for own, row in zip(table.columns[words], numbers, strict=True):
        pieces = [tokenizer.encode(space + word if i else word) for i, word in enumerate(own)]
        rows.append([token for piece in pieces for token in piece])
        first = [[tag, *[IGNORED] * len(piece)][: len(piece)] for tag, piece in zip(row, pieces)]
        marks.append([mark for piece in first for mark in piece])
    tokens, mask = framed(rows, tokenizer, length)
    before, after = map(len, frame(tokenizer))
    leaf = np.full(tokens.shape, IGNORED, np.int32)
    for number, row in enumerate(marks):
        kept = row[: length - before - after]
        leaf[number, before : before + len(kept)] = kept
    return {"tokens": tokens, "mask": mask, "tags": leaf}, classes


def _check(table: Table, words: str, tags: str) -> None:
    """Refuses rows that are not lists of words with as many tags."""
    pairs = zip(table.columns[words], table.columns[tags], strict=True)
    for row, (own, marks) in enumerate(pairs):
        if not len_of(own):
            raise table.fault(words, row, "the row has no words.")
        if wrong := [word for word in own if not isinstance(word, str) or not word.strip()]:
            raise table.fault(words, row, f"{wrong[0]!r:.40} is no word.")
        if not isinstance(marks, list | tuple | np.ndarray):
            raise table.fault(tags, row, f"{marks!r:.40} is no list of tags, one for each word.")
        if len(marks) != len(own):
            raise table.fault(tags, row, f"{len(marks)} tags found for {len(own)} words.")


def _numbered(table: Table, column: str) -> tuple[list[list[int]], tuple[str, ...]]:
    """Returns the tags of each row by number, and their names."""
    cells = [list(cell) for cell in table.columns[column]]
    named = table.classes.get(column, ())
    sides = [piece.split or "train" for piece in table.pieces for _ in range(piece.size)]
    trains = [side == "train" or "train" not in sides for side in sides]
    for row, marks in enumerate(cells):
        for tag in marks:
            if isinstance(tag, bool) or not isinstance(tag, str | int | np.integer):
                raise table.fault(column, row, f"the tag {tag!r:.40} is no text or whole number.")
    seen = {tag for marks, own in zip(cells, trains, strict=True) if own for tag in marks}
    if named:
        known: Sequence = range(len(named))
        places = {tag: place for place, tag in enumerate(named)} | {n: n for n in known}
        why = f"not one of its {len(named)} names"
    else:
        known = sorted(seen, key=lambda tag: (isinstance(tag, str), tag))
        places = {tag: place for place, tag in enumerate(known)}
        why = "in no training row"
    for row, marks in enumerate(cells):
        if new := [tag for tag in marks if tag not in places]:
            raise table.fault(column, row, f"the tag {new[0]!r} is {why}.")
    if len(known) < 2:
        raise ValueError(
            f"{table.origin}: column {column!r} has only the tag {known[0]!s}; there must be two."
        )
    return [[places[tag] for tag in marks] for marks in cells], named or tuple(map(str, known))


def _space(tokenizer: Tokenizer) -> str:
    """What stands before a word that is not the first, if the tokenizer does not add it itself."""
    a, b, both = (tokenizer.encode(text) for text in ("a", "b", "a b"))
    return "" if both == a + b else " "
