"""Text: documents with an owner, split by file, packed into rows of tokens.

Each client has one stream of tokens per split: a separator, the first document, a separator,
the second document, ..., a separator. It is cut into rows of `length + 1` tokens that overlap by
one, so with `tokens[:, :-1]` as inputs and `tokens[:, 1:]` as targets every token is a target
exactly once: bits per byte are exact. The separator is the tokenizer's end-of-text token. The last
row is filled up with the padding token, or, where the tokenizer has none, dropped.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxfm.data.source import Source, checked
from jaxfm.tokenizer import Tokenizer, frame, padding_id

SPLITS = ("train", "validation", "test")


class Document(NamedTuple):
    """One text and its owner."""

    name: str  # the path below the root, with forward slashes; it decides the split
    client: str  # its owner
    text: str
    split: str = ""  # given by who has the files; otherwise the name decides


def split_of(name: str, held_out: float = 0.1) -> str:
    """Returns a document's split; "validation" and "test" each get a share `held_out` of names.

    Decided by a SHA-256 hash of the name alone, so it is the same on every machine, and a file
    does not change sides when others come or go.
    """
    if not 0 <= held_out < 0.5:
        raise ValueError(f"held_out must be in [0, 0.5), as two splits get it; got {held_out}.")
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < held_out else "validation" if place < 2 * held_out else "train"


def read_folder(
    folder: str | Path,
    pattern: str | Sequence[str] = "**/*.txt",
    *,
    client: Callable[[Path], str] | None = None,
    encoding: str = "utf-8",
) -> list[Document]:
    """Returns the text files below `folder`, sorted by path.

    Args:
      folder: the root.
      pattern: which files: a glob below the root, or several, as ("**/*.c", "**/*.f90").
      client: maps the path below the root to its owner's name; by default the top-level folder,
        or for a file right in the root the file itself, without its suffix.
      encoding: of the files; bytes that cannot be decoded become U+FFFD.
    Raises:
      NotADirectoryError, FileNotFoundError: no such folder, no such file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; give the root of the text files.")
    patterns = [pattern] if isinstance(pattern, str) else pattern
    found = {path for each in patterns for path in folder.glob(each)}
    paths = sorted(path for path in found if path.is_file())
    if not paths:
        raise FileNotFoundError(f"{folder} has no file that matches {pattern!r}.")
    names = [path.relative_to(folder) for path in paths]
    client = client or top_level
    return [
        Document(name.as_posix(), client(name), path.read_text(encoding, errors="replace"))
        for name, path in zip(names, paths, strict=True)
    ]


def top_level(name: Path) -> str:
    """Returns the first part of a path below the root, without the suffix if it is a file."""
    return name.parts[0] if len(name.parts) > 1 else name.stem


def corpus(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    length: int,
    num_clients: int | None = None,
    held_out: float = 0.1,
) -> dict[str, Source]:
    """Returns documents as rows of tokens: a `Source` each of "train", "validation" and "test".

    All splits share `clients`: those with the most bytes of training text first, and a client's
    rows together. A client may have no row in a held-out split, as files are never divided.

    Args:
      documents: in a fixed order.
      tokenizer: see `jaxfm.tokenizer`.
      length: T; rows are i32[T + 1].
      num_clients: how many of the largest owners become clients. The others' training text is left
        out; their held-out text stays in without an owner (-1): text from sources never trained on.
      held_out: as in `split_of`.
    Raises:
      ValueError: no training text, fewer owners than `num_clients`.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1 token; got {length}.")
    documents = list(documents)
    sides = _sides(documents, held_out)
    sizes = Counter[str]()
    for document, side in zip(documents, sides, strict=True):
        if side == "train" and document.text:
            sizes[document.client] += len(document.text.encode("utf-8", "surrogatepass"))
    if not sizes:
        raise ValueError(f"None of {len(documents)} documents is training text; give more.")
    if num_clients is not None and not 1 <= num_clients <= len(sizes):
        raise ValueError(f"num_clients must be in 1..{len(sizes)}; got {num_clients}.")
    ranked = sorted(sizes, key=lambda name: (-sizes[name], name))[:num_clients]
    number = {name: place for place, name in enumerate(ranked)}

    splits = {}
    for split in SPLITS:
        groups: dict[int, list[str]] = {}
        for document, side in zip(documents, sides, strict=True):
            owner = number.get(document.client, -1)
            if side == split and document.text and (owner >= 0 or split != "train"):
                groups.setdefault(owner, []).append(document.text)
        # Text without an owner comes last.
        owners = sorted(groups, key=lambda owner: (owner < 0, owner))
        rows = [pack(groups[owner], tokenizer, length) for owner in owners]
        tokens = np.concatenate(rows) if rows else np.zeros((0, length + 1), np.int32)
        client = np.repeat(np.array(owners, np.int32), [len(part) for part in rows])
        splits[split] = checked(Source({"tokens": tokens}, client, tuple(ranked)), split)
    return splits


def _sides(documents: Sequence[Document], held_out: float) -> list[str]:
    """Returns each document's split: the given one, or that of its name.

    If only some splits are given, the others are drawn from training documents by name.
    """
    given = {document.split for document in documents} - {""}
    sides = []
    for document in documents:
        drawn = split_of(document.name, held_out)
        free = document.split in ("", "train") and drawn not in given
        sides.append(drawn if free else document.split or "train")
    return sides


def token_rows(
    texts: Sequence[str], tokenizer: Tokenizer, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns one row of tokens for each text: tokens i32[N, T] and mask bool[N, T].

    Each text stands between the special tokens that its tokenizer puts around a text, and is cut
    where it is longer than `length` with them. T is what the longest text needs. The mask is true
    where there is a token; the rest is padding.

    >>> from jaxfm.tokenizer import ByteTokenizer
    >>> tokens, mask = token_rows(["ab", "a"], ByteTokenizer(), 8)
    >>> tokens.tolist(), mask.sum(1).tolist()
    ([[256, 97, 98, 257], [256, 97, 257, 258]], [4, 3])
    """
    return framed([tokenizer.encode(text) for text in texts], tokenizer, length)


def framed(
    rows: Sequence[Sequence[int]], tokenizer: Tokenizer, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of ids as `token_rows` returns texts.

    Raises:
      ValueError: a length that the special tokens alone fill.
    """
    before, after = frame(tokenizer)
    room = length - len(before) - len(after)
    if room < 1:
        raise ValueError(
            f"length={length} leaves no room for text beside {len(before) + len(after)} special "
            "tokens; give more."
        )
    whole = [[*before, *row[:room], *after] for row in rows]
    width = max(map(len, whole), default=0)
    tokens = np.full((len(whole), width), padding_id(tokenizer), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for number, row in enumerate(whole):
        tokens[number, : len(row)] = row
        mask[number, : len(row)] = True
    return tokens, mask


def pack(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> np.ndarray:
    """Returns texts in one stream, cut into rows i32[n, length + 1] that overlap by one token."""
    separator = tokenizer.eos_id
    if separator is None:
        raise ValueError("The tokenizer has no end-of-text token (eos_id) to separate documents.")
    stream = [separator]
    for text in texts:
        stream.extend(tokenizer.encode(text))
        stream.append(separator)
    num_rows, rest = divmod(len(stream) - 1, length)
    if rest and tokenizer.pad_id is not None:
        stream.extend([tokenizer.pad_id] * (length - rest))
        num_rows += 1
    flat = np.array(stream[: num_rows * length + 1], np.int32)
    starts = length * np.arange(num_rows)[:, None]
    return flat[starts + np.arange(length + 1)]


def sizes_table(documents: Sequence[Document], held_out: float = 0.1, num_largest: int = 10) -> str:
    """Returns a readable table of files and bytes, by split and by the largest owners."""
    files: Mapping[str, Counter[str]] = {split: Counter() for split in SPLITS}
    sizes: Mapping[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for document in documents:
        if not document.text:
            continue
        split = split_of(document.name, held_out)
        files[split][document.client] += 1
        sizes[split][document.client] += len(document.text.encode("utf-8", "surrogatepass"))
    lines = [f"{'':<20}" + "".join(f"{split + ' (bytes)':>24}" for split in SPLITS)]
    lines.append(
        f"{'all':<20}"
        + "".join(f"{files[s].total():>6} files {sizes[s].total():>11,}" for s in SPLITS)
    )
    for name, _ in sizes["train"].most_common(num_largest):
        lines.append(
            f"  {name:<18}"
            + "".join(f"{files[s][name]:>6} files {sizes[s][name]:>11,}" for s in SPLITS)
        )
    return "\n".join(lines)
