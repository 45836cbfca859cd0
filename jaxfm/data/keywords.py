"""Which keyword begins a line of Python: labelled texts without a download.

A row is the end of what stands before a line in a file of the standard library, with the line's
indentation, and the keyword that the line begins with. Owners are packages; files go to splits as
in `jaxfm.data.standard_library`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from jaxfm.data.text import Document, split_of

KEYWORDS = ("return", "if", "for", "def")


class Keyword(NamedTuple):
    """One row.

    Attributes:
      text: what stands before the keyword.
      label: number of the keyword.
      owner: of the file.
      split: of the file.
    """

    text: str
    label: int
    owner: str
    split: str


def keyword_rows(
    documents: Sequence[Document], *, length: int = 96, keywords: Sequence[str] = KEYWORDS
) -> list[Keyword]:
    """Returns a row for about every line that begins with one of the keywords, in a fixed order.

    The order is by a hash, so that the first rows of an owner are of many files and all labels.

    Args:
      documents: files of source code.
      length: characters of a text.
      keywords: the labels.
    """
    rows = []
    for document in documents:
        split = document.split or split_of(document.name)
        place = 0
        for line in document.text.splitlines(keepends=True):
            bare = line.lstrip(" ")
            word = bare.partition(" ")[0]
            if word in keywords and place >= length:
                end = place + len(line) - len(bare)
                text = document.text[end - length : end]
                label = list(keywords).index(word)
                digest = hashlib.sha256(f"{document.name}:{end}".encode()).digest()
                rows.append((digest, Keyword(text, label, document.client, split)))
            place += len(line)
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]
