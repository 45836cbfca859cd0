"""Text to token ids and back.

`ByteTokenizer` (the default) needs no training: ids 0..255 are the bytes of the UTF-8 text, then
come four special tokens. `load_tokenizer` opens Hugging Face tokenizers, `train_bpe` trains one.

Two rules hold for all: `encode` adds no special tokens and reads none into the text (a document
that happens to contain "<|eos|>" stays text), and `decode` leaves special tokens out, so for
byte-level tokenizers decode(encode(text)) == text.
"""

import importlib.util
import json
import operator
import reprlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxfm.token_bytes import byte_characters, token_reader

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>")
ROLES = ("bos_token", "eos_token", "pad_token", "mask_token")


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer."""

    @property
    def vocab(self) -> dict[str, int]:
        """Returns a dict from each token, as its tokenizer writes it, to its id."""

    @property
    def vocab_size(self) -> int:
        """Returns the largest id plus one."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Returns the ids that stand for no text."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int | None: ...
    @property
    def mask_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self) -> list[bytes]:
        """Returns for each id the bytes of text that it stands for; b"" for special tokens."""


class ByteTokenizer:
    """Bytes as tokens: id = byte value, then bos 256, eos 257, pad 258, mask 259."""

    bos_id, eos_id, pad_id, mask_id = 256, 257, 258, 259
    special_ids = frozenset((bos_id, eos_id, pad_id, mask_id))
    vocab_size = 260

    @property
    def vocab(self) -> dict[str, int]:
        characters = {character: byte for byte, character in enumerate(byte_characters())}
        return characters | {token: 256 + n for n, token in enumerate(SPECIAL_TOKENS)}

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids; bytes that are not valid UTF-8 become U+FFFD.

        Raises:
          TypeError: an id that is no whole number.
          ValueError: an id that is not in 0..259.
        """
        ids = token_ids(ids, "Token ids", self.vocab_size)
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        return [bytes([byte]) for byte in range(256)] + [b""] * len(SPECIAL_TOKENS)


class HuggingFaceTokenizer:
    """A tokenizer of `transformers` with a Rust backend, seen through the protocol."""

    def __init__(self, inner: Any):
        if getattr(inner, "backend_tokenizer", None) is None:
            raise TypeError(
                f"A tokenizer with a Rust backend is needed; got {type(inner).__name__}."
            )
        self.inner = inner
        self.vocab: dict[str, int] = inner.get_vocab()
        # Given files that it does not know, transformers makes an empty tokenizer without an error.
        if len(self.vocab) <= len(inner.all_special_ids):
            raise ValueError(
                f"The vocabulary is empty: {inner.name_or_path!r} has no tokenizer files."
            )
        self.vocab_size: int = max(self.vocab.values()) + 1
        self.bos_id: int | None = inner.bos_token_id
        self.eos_id: int | None = inner.eos_token_id
        self.pad_id: int | None = inner.pad_token_id
        self.mask_id: int | None = inner.mask_token_id
        spec = json.loads(inner.backend_tokenizer.to_str())
        special = [token["id"] for token in spec["added_tokens"] if token["special"]]
        self.special_ids = frozenset([*inner.all_special_ids, *special])

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return self.inner.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        ids = token_ids(ids, "Token ids", self.vocab_size)
        return self.inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token_bytes(self) -> list[bytes]:
        plain = {token: i for token, i in self.vocab.items() if i not in self.special_ids}
        to_bytes = token_reader(self.inner.backend_tokenizer, plain)
        table = [b""] * self.vocab_size
        for token, number in plain.items():
            table[number] = to_bytes(token)
        return table


def utf8(text: str) -> bytes:
    """Returns the bytes of a text.

    Raises:
      TypeError: it is no string.
      ValueError: it holds half a surrogate pair, which stands for no character.
    """
    if not isinstance(text, str):
        raise TypeError(f"A text must be a string, got {reprlib.repr(text)}.")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text has half a surrogate pair, {text[error.start]!r}, at place {error.start}; "
            "it stands for no character."
        ) from None


def token_ids(values: Iterable[int], what: str, vocab_size: int) -> list[int]:
    """Returns ids as a list of int.

    Args:
      values: a sequence or an array of one axis.
      what: they are, for the message.
      vocab_size: ids are below this.
    Raises:
      TypeError: no such sequence, or ids that are no whole numbers.
      ValueError: an id outside the vocabulary.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    try:
        ids = [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(
            f"{what} must be a sequence of whole numbers, got {reprlib.repr(values)}."
        ) from None
    if wrong := [token for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(f"{what} must be in 0..{vocab_size - 1}; got {wrong[0]}.")
    return ids


def bytes_per_token(tokenizer: Tokenizer) -> np.ndarray:
    """Returns i32[V]: the bytes of text of each id, 0 for special ones, for exact bits per byte."""
    return np.array([len(piece) for piece in tokenizer.token_bytes()], np.int32)


def frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the special tokens before and after a text that is to be classified.

    Those that a Hugging Face tokenizer adds by itself, as [CLS] and [SEP]; bos and eos of others.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        whole = tokenizer.inner.encode("a", add_special_tokens=True)
        text = tokenizer.inner.encode("a", add_special_tokens=False)
        start = next(n for n in range(len(whole)) if whole[n : n + len(text)] == text)
        return whole[:start], whole[start + len(text) :]
    around = ([tokenizer.bos_id], [tokenizer.eos_id])
    return tuple([token for token in part if token is not None] for part in around)  # type: ignore


def padding_id(tokenizer: Tokenizer) -> int:
    """Returns the id that fills up rows: of padding; else of the end of a text; else 0."""
    ends = 0 if tokenizer.eos_id is None else tokenizer.eos_id
    return ends if tokenizer.pad_id is None else tokenizer.pad_id


def same_vocabulary(a: Tokenizer, b: Tokenizer) -> bool:
    """Returns whether every id means the same token in both, not only whether sizes agree."""
    return a is b or a.vocab == b.vocab


def decode_stream(tokenizer: Tokenizer, blocks: Iterable[Sequence[int]]) -> Iterator[str]:
    """Yields text as it grows, one piece for each block of ids, and one more if text was held back.

    A character is held back until all of its bytes are there, so no piece is ever revoked and the
    pieces join to `decode` of all ids.

    >>> tokenizer = ByteTokenizer()
    >>> list(decode_stream(tokenizer, [[72, 195], [169], [33]]))
    ['H', 'é', '!']
    """
    # Only a window is decoded: tokens up to `seen`, whose text was yielded and which stay because
    # the text of the next ones may depend on them (a space is dropped at the start of a text), and
    # newer ones.
    window: list[int] = []
    seen = shown = 0
    text = ""
    for block in blocks:
        window.extend(int(token) for token in block)
        text = tokenizer.decode(window)
        whole = text.rstrip("\ufffd")
        piece, shown = whole[shown:], max(shown, len(whole))
        yield piece
        if piece and whole == text:
            window = window[seen:]
            text = tokenizer.decode(window)
            seen, shown = len(window), len(text)
    if text[shown:]:
        yield text[shown:]


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Trains a byte-level BPE on texts; any text can be encoded and round-trips exactly.

    The ids are four special tokens, the 256 bytes, then merges; there are fewer than asked for if
    the texts have too few repeated pairs.

    Raises:
      ValueError: fewer than the 260 ids that every such tokenizer has.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}; got {vocab_size}.")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _wrap(backend)


def bpe_words(text: str) -> list[str]:
    """The words inside which `train_bpe` merges, spelled in the characters of its bytes."""
    from tokenizers import pre_tokenizers

    utf8(text)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [word for word, _ in split.pre_tokenize_str(text)]


def bpe_alphabet() -> list[str]:
    """The first 260 tokens of `train_bpe`, by id: special ones, then the characters of bytes."""
    return [*SPECIAL_TOKENS, *sorted(byte_characters())]


def bpe_of_merges(merges: Iterable[tuple[str, str]]) -> HuggingFaceTokenizer:
    """The byte-level BPE of given merges, as `train_bpe` would make it had it learnt them."""
    merges = list(merges)
    tokens = dict.fromkeys([*bpe_alphabet(), *(left + right for left, right in merges)])
    return _byte_level({token: number for number, token in enumerate(tokens)}, merges)


def load_tokenizer(path_or_name: str | Path) -> HuggingFaceTokenizer:
    """Opens a tokenizer in one of Hugging Face's forms.

    Args:
      path_or_name: a folder with tokenizer.json or a SentencePiece tokenizer.model, such a file
        itself, or a name on the Hugging Face hub (needs the network, or the hub's local cache).
    Raises:
      FileNotFoundError: no such path, or a name that cannot be fetched.
      ValueError: a file that cannot be read as a tokenizer.
      ImportError: a SentencePiece file without the package of that name.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(path_or_name)
    try:
        if path.is_dir() and not any(path.glob("tokenizer*")) and not (path / "vocab.txt").exists():
            raise FileNotFoundError(f"{path} holds no tokenizer.json and no tokenizer.model.")
        if path.is_file() and path.suffix == ".json":
            return HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_file=str(path)))
        model = path if path.suffix == ".model" else path / "tokenizer.model"
        if model.is_file() and not (model.parent / "tokenizer.json").exists():
            _check_sentencepiece(model)
        if model.is_file() and not any(model.parent.glob("tokenizer*.json")):
            return _load_sentencepiece(model)
        return HuggingFaceTokenizer(AutoTokenizer.from_pretrained(str(path_or_name)))
    except (FileNotFoundError, ImportError):
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"No tokenizer {str(path_or_name)!r}: it is neither a folder here nor in the local "
            f"cache of the Hugging Face hub, and could not be fetched ({_first_line(error)})."
        ) from error
    except Exception as error:
        raise ValueError(
            f"{path_or_name} cannot be read as a tokenizer: {_first_line(error).rstrip('.: ')}."
        ) from error


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes a folder that `load_tokenizer` and `transformers.AutoTokenizer` open."""
    if isinstance(tokenizer, ByteTokenizer):
        tokenizer = _byte_backend(tokenizer)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise TypeError(
            f"Only ByteTokenizer and HuggingFaceTokenizer have a form that Hugging Face reads; "
            f"got {type(tokenizer).__name__}."
        )
    tokenizer.inner.save_pretrained(str(folder))


def _check_sentencepiece(model: Path) -> None:
    """Raises ImportError where transformers would ask for another package, tiktoken."""
    with model.open("rb") as file:
        is_message = file.read(1) == b"\n"  # a protobuf's first field; tiktoken's files are text
    if is_message and importlib.util.find_spec("sentencepiece") is None:
        raise ImportError(
            f"{model} is a SentencePiece model: install 'jaxfm[data]', or save the tokenizer as "
            "tokenizer.json."
        )


def _load_sentencepiece(model: Path) -> HuggingFaceTokenizer:
    from transformers import LlamaTokenizer

    # Without a configuration AutoTokenizer forgets the space that SentencePiece puts in front, and
    # transformers looks for one file name only.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(model, Path(folder) / "tokenizer.model")
        return HuggingFaceTokenizer(LlamaTokenizer.from_pretrained(folder))


def _byte_backend(tokenizer: ByteTokenizer) -> HuggingFaceTokenizer:
    """Returns the byte tokenizer as a BPE without merges."""
    letters = {token: number for token, number in tokenizer.vocab.items() if number < 256}
    return _byte_level(letters, [], use_regex=False)


def _byte_level(
    vocab: dict[str, int], merges: list[tuple[str, str]], use_regex: bool = True
) -> HuggingFaceTokenizer:
    """A byte-level BPE; `use_regex` splits texts into words first."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return _wrap(backend)


def _wrap(backend: Any) -> HuggingFaceTokenizer:
    from transformers import PreTrainedTokenizerFast

    roles = dict(zip(ROLES, SPECIAL_TOKENS, strict=True))
    return HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **roles))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
