"""Laws of tokenizers: text comes back, ids mean what they say."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfm.data.standard_library import stdlib_documents
from jaxfm.parallel.stop import Detokenizer
from jaxfm.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    bytes_per_token,
    decode_stream,
    load_tokenizer,
    same_vocabulary,
    save_tokenizer,
    train_bpe,
)

TEXT = 'def f(x):\n\treturn "naïve – 漢字 🎉 <|eos|> \u2581 <0x0A>"  # twice  \r\n'


@pytest.fixture(scope="module")
def bpe() -> HuggingFaceTokenizer:
    return train_bpe((document.text for document in stdlib_documents(tiny=True)), 400)


@pytest.fixture(scope="module", params=["bytes", "saved bytes", "bpe", "saved bpe"])
def tokenizer(request, bpe, tmp_path_factory) -> Tokenizer:
    chosen = ByteTokenizer() if "bytes" in request.param else bpe
    if "saved" in request.param:
        folder = tmp_path_factory.mktemp("tokenizer")
        save_tokenizer(chosen, folder)
        chosen = load_tokenizer(folder)
    return chosen


def test_all_keep_the_protocol(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.vocab_size == max(tokenizer.vocab.values()) + 1 == len(tokenizer.vocab)
    specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]
    assert tokenizer.special_ids == set(specials)
    assert len(set(specials)) == 4
    assert tokenizer.decode([*specials, *tokenizer.encode("x"), *specials]) == "x"


@given(text=st.text(max_size=60) | st.sampled_from([TEXT, "<|eos|>", "<|mask|><|pad|>", " a"]))
def test_text_comes_back_and_specials_cannot_be_written(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.special_ids.isdisjoint(ids)


@given(text=st.text(max_size=60))
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer, text):
    table = tokenizer.token_bytes()
    ids = tokenizer.encode(text)
    assert b"".join(table[token] for token in ids) == text.encode()
    assert bytes_per_token(tokenizer)[ids].sum() == len(text.encode())


@given(
    text=st.text(max_size=40) | st.just("a\ufffd"), cuts=st.lists(st.integers(0, 40), max_size=6)
)
def test_a_stream_joins_to_the_whole_and_takes_nothing_back(tokenizer, text, cuts):
    ids = tokenizer.encode(text)
    cuts = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    blocks = [ids[start:stop] for start, stop in pairwise(cuts)]
    pieces = list(decode_stream(tokenizer, blocks))
    assert "".join(pieces) == text
    assert len(blocks) <= len(pieces) <= len(blocks) + 1


def test_a_stream_shows_no_half_characters():
    party = list("🎉".encode())
    blocks = [[97, *party[:2]], party[2:3], party[3:], [98]]
    assert list(decode_stream(ByteTokenizer(), blocks)) == ["a", "", "🎉", "b"]
    # What never becomes a character is shown at the end.
    assert list(decode_stream(ByteTokenizer(), [[97], party[:2]])) == ["a", "", "\ufffd"]


def test_a_trained_bpe_is_shorter_than_bytes(bpe):
    text = stdlib_documents(tiny=True)[0].text
    assert bpe.vocab_size == 400
    assert len(bpe.encode(text)) < 0.6 * len(text.encode())
    with pytest.raises(ValueError, match="vocab_size must be at least 260; got 100"):
        train_bpe(["a"], 100)


def test_vocabularies_are_compared_by_content(bpe, tmp_path: Path):
    save_tokenizer(ByteTokenizer(), tmp_path)
    assert same_vocabulary(ByteTokenizer(), load_tokenizer(tmp_path))
    assert not same_vocabulary(ByteTokenizer(), bpe)
    other = train_bpe(["zyx wvu " * 50, "xyz uvw " * 50], 264)
    another = train_bpe(["hello you " * 50, "world " * 50], 264)
    assert other.vocab_size == another.vocab_size
    assert not same_vocabulary(other, another)


@pytest.mark.smoke
def test_byte_ids_are_byte_values_everywhere(tmp_path: Path):
    save_tokenizer(ByteTokenizer(), tmp_path)
    opened = load_tokenizer(tmp_path)
    assert opened.encode(TEXT) == ByteTokenizer().encode(TEXT) == list(TEXT.encode())
    assert opened.token_bytes() == ByteTokenizer().token_bytes()
    assert (opened.bos_id, opened.eos_id, opened.pad_id, opened.mask_id) == (256, 257, 258, 259)


def test_transformers_opens_what_was_saved(bpe, tmp_path: Path):
    from transformers import AutoTokenizer

    save_tokenizer(bpe, tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened.encode(TEXT, add_special_tokens=False, split_special_tokens=True) == bpe.encode(
        TEXT
    )
    assert opened.eos_token_id == bpe.eos_id


def test_a_bare_tokenizer_file_is_opened(bpe, tmp_path: Path):
    save_tokenizer(bpe, tmp_path)
    assert same_vocabulary(load_tokenizer(tmp_path / "tokenizer.json"), bpe)


def sentencepiece_style(tmp_path: Path) -> HuggingFaceTokenizer:
    """A tokenizer as Llama 2's: a mark for spaces, and bytes for what the vocabulary lacks."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b"]
    vocab = {token: number for number, token in enumerate([*letters, "\u2581a"])}
    backend = Backend(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path / "tokenizer.json")


def test_sentencepiece_tokens_have_their_bytes(tmp_path: Path):
    tokenizer = sentencepiece_style(tmp_path)
    text = "a é 🎉 ba  b"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    table = tokenizer.token_bytes()
    assert b"".join(table[token] for token in ids) == b" " + text.encode()
    assert "".join(decode_stream(tokenizer, [[token] for token in ids])) == text


def test_wordpiece_tokens_have_their_bytes(tmp_path: Path):
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "run", "##ning", "fast"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = HuggingFaceTokenizer(BertTokenizerFast(str(tmp_path / "vocab.txt")))
    assert tokenizer.encode("running fast") == [5, 6, 7]
    assert b"".join(tokenizer.token_bytes()) == b" running fast"
    assert tokenizer.mask_id == 4


def test_what_cannot_be_opened_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="No tokenizer 'jaxfm-tests/no-such-model'"):
        load_tokenizer("jaxfm-tests/no-such-model")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": "nonsense"}))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.259; got 260"):
        ByteTokenizer().decode([65, 260])
    with pytest.raises(TypeError, match="a Rust backend is needed; got object"):
        HuggingFaceTokenizer(object())
    with pytest.raises(TypeError, match="have a form that Hugging Face reads; got object"):
        save_tokenizer(object(), tmp_path)


def test_a_sentencepiece_model_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(
            ImportError, match=r"tokenizer\.model is a SentencePiece .*jaxfm\[data\]"
        ):
            load_tokenizer(path)


def other_kinds(tmp_path: Path) -> dict[str, HuggingFaceTokenizer]:
    """Small tokenizers of the other forms that Hugging Face files have."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import BertTokenizerFast, PreTrainedTokenizerFast

    wrap = lambda backend, **roles: HuggingFaceTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    )
    words = Backend(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##ning", "fast", ".", "n't"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    unigram = Backend(models.Unigram([("<unk>", 0.0), ("\u2581a", -1.0), ("b", -2.0)], unk_id=0))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    suffix = Backend(models.BPE({"a</w>": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"))
    suffix.decoder = decoders.BPEDecoder(suffix="</w>")
    holes = Backend(models.BPE({"a": 0, "漢": 2, "z": 7}, []))
    holes.decoder = decoders.ByteLevel()
    grown = train_bpe(["aab " * 9], 264)
    grown.inner.add_tokens([AddedToken("<tool é>"), AddedToken("<reserved>", special=True)])
    return {
        "words": wrap(words),
        "pieces": HuggingFaceTokenizer(BertTokenizerFast(str(tmp_path / "vocab.txt"))),
        "unigram": wrap(unigram, unk_token="<unk>"),
        "suffix": wrap(suffix),
        "holes": wrap(holes),
        "grown": HuggingFaceTokenizer(grown.inner),
    }


def test_decoding_bytes_and_generated_text_agree_for_every_id(bpe, tmp_path: Path):
    """After any text, an id adds the bytes that its table says; special ids add none."""
    sentencepiece = sentencepiece_style(tmp_path)
    everything = {"bytes": ByteTokenizer(), "bpe": bpe, "sentencepiece": sentencepiece}
    for name, tokenizer in (everything | other_kinds(tmp_path)).items():
        table, start = tokenizer.token_bytes(), tokenizer.encode("a")
        before = tokenizer.decode(start)
        assert before == "a" and len(table) == tokenizer.vocab_size
        for token, piece in enumerate(table):
            decoded = tokenizer.decode([*start, token])
            assert decoded == "a" + piece.decode(errors="replace"), (name, token)
            generated = Detokenizer(table).add([*start, token], last=True)
            assert generated.lstrip() == decoded, (name, token)
            assert not piece or token not in tokenizer.special_ids


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_what_is_no_text_and_no_token_is_named(kind, bpe):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    with pytest.raises(TypeError, match="A text must be a string, got None"):
        tokenizer.encode(None)
    with pytest.raises(ValueError, match=r"half a surrogate pair, .*, at place 1"):
        tokenizer.encode("a\ud800")
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"must be in 0\.\.\d+; got {wrong}\."):
            tokenizer.decode([65, wrong])
    with pytest.raises(TypeError, match=r"sequence of whole numbers, got \[65.5\]"):
        tokenizer.decode([65.5])
