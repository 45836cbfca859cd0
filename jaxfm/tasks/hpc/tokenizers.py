"""Tokenizers of source code: bytes, byte-pair encoding, and a lexer's pieces.

All keep the two rules of `jaxfm.tokenizer`, so any text round-trips exactly; the lexer that renames
gives back the renamed text, which `jaxfm.tasks.hpc.lexer.restore` turns into the first one. They
are compared by bits per byte of the text and by the accuracy of tasks, never by loss per token.
"""

from __future__ import annotations

import collections
import difflib
import json
import pathlib
from collections.abc import Iterable, Sequence

from jaxfm.tasks.hpc.lexer import KEPT, OPERATORS, lex, rename
from jaxfm.tokenizer import (
    SPECIAL_TOKENS,
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    token_ids,
    train_bpe,
    utf8,
)

NAMES = ("byte", "bpe", "lexer", "lexer-renamed")
_FILE = "lexer.json"
_SLOTS = 64
_INDENTS = tuple(
    newline + blank
    for newline in ("\n", "")
    for blank in ("", *(" " * n for n in range(2, 17, 1)), "\t", "\t\t", "\t\t\t", "\t\t\t\t")
)


class LexerTokenizer:
    """Keywords, operators, indents and frequent identifiers as one token each; else bytes.

    Ids 0..255 are bytes and 256..259 the special tokens, as of `ByteTokenizer`; then come
    keywords in small and capital letters, operators, line breaks with their indents, the names
    v0..v63 of `rename`, and `words`. Digits are always one token each, since a stride of 12 and
    one of 21 have nothing else in common. Whitespace is kept.

    Args:
        words: Identifiers that are one token, for example `frequent_words` of a corpus.
        renames: Whether `encode` renames identifiers first, so that a model sees which are the
            same but not how they are called; `decode` then gives the renamed text.
    """

    bos_id, eos_id, pad_id, mask_id = 256, 257, 258, 259
    special_ids = frozenset((bos_id, eos_id, pad_id, mask_id))

    def __init__(self, words: Iterable[str] = (), *, renames: bool = False):
        self.words, self.renames = tuple(words), renames
        kept = sorted(KEPT | {word.upper() for word in KEPT if word.islower()})
        slots = [f"v{number}" for number in range(_SLOTS)]
        fixed = [*kept, *OPERATORS, "#pragma", "!$omp", *_INDENTS, *slots, *self.words]
        pieces = dict.fromkeys(piece for piece in fixed if len(utf8(piece)) > 1)
        self._ids = {piece: 260 + number for number, piece in enumerate(pieces)}
        special = [b""] * len(SPECIAL_TOKENS)
        self._bytes = [bytes([b]) for b in range(256)] + special + [utf8(p) for p in pieces]

    @property
    def vocab(self) -> dict[str, int]:
        return ByteTokenizer().vocab | self._ids

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        utf8(text)
        ids: list[int] = []
        for piece in lex(rename(text).text if self.renames else text):
            known = self._ids.get(piece.text)
            ids.extend(piece.text.encode() if known is None else (known,))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids; bytes that are not valid UTF-8 become U+FFFD."""
        ids = token_ids(ids, "Token ids", self.vocab_size)
        return b"".join(self._bytes[token] for token in ids).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        return list(self._bytes)


def frequent_words(texts: Iterable[str], number: int) -> tuple[str, ...]:
    """The identifiers of two letters or more that occur most often, at most `number`."""
    counts = collections.Counter(
        piece.text for text in texts for piece in lex(text) if piece.kind == "word"
    )
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return tuple(word for word in ranked if len(word) > 1)[:number]


def make_tokenizer(name: str, texts: Iterable[str] = (), vocab_size: int = 1024) -> Tokenizer:
    """A tokenizer by its name, trained on texts where it needs any.

    Args:
        name: "byte", "bpe", "lexer" or "lexer-renamed".
        texts: What a BPE learns its merges from, and a lexer its words.
        vocab_size: Of "bpe"; a lexer learns a quarter as many words.

    Raises:
        ValueError: An unknown name, or a BPE without texts.
    """
    texts = list(texts)
    if name == "byte":
        return ByteTokenizer()
    if name == "bpe":
        if not texts:
            raise ValueError("A BPE is trained on texts; give some.")
        return train_bpe(texts, vocab_size)
    if name == "lexer":
        return LexerTokenizer(frequent_words(texts, vocab_size // 4))
    if name == "lexer-renamed":
        return LexerTokenizer(renames=True)
    close = difflib.get_close_matches(name, NAMES, 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"No tokenizer is called {name!r}; there are {', '.join(NAMES)}.{hint}")


def save(tokenizer: Tokenizer, folder: str | pathlib.Path) -> None:
    """Writes a tokenizer into a folder, which is made, for `load`."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, LexerTokenizer):
        text = {"words": tokenizer.words, "renames": tokenizer.renames}
        (folder / _FILE).write_text(json.dumps(text) + "\n")
    else:
        save_tokenizer(tokenizer, folder)


def load(folder: str | pathlib.Path) -> Tokenizer:
    """Opens a folder of `save`, or one in a form of Hugging Face.

    Raises:
        FileNotFoundError: The folder holds no tokenizer.
    """
    file = pathlib.Path(folder) / _FILE
    if not file.exists():
        found: HuggingFaceTokenizer = load_tokenizer(folder)
        return found
    try:
        text = json.loads(file.read_text())
        return LexerTokenizer(text["words"], renames=text["renames"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as a lexer's vocabulary: {error}.") from None
