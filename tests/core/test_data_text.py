"""Laws of text corpora: folders, the standard library, packing."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfm.data.source import Source, describe, federation_of
from jaxfm.data.standard_library import stdlib, stdlib_documents
from jaxfm.data.text import (
    SPLITS,
    Document,
    corpus,
    pack,
    read_folder,
    sizes_table,
    split_of,
)
from jaxfm.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def stream_of(rows: np.ndarray) -> list[int]:
    """Undo the packing: rows overlap by one token, padding goes at the end."""
    tokens = [int(rows[0, 0]), *rows[:, 1:].ravel().tolist()]
    return [token for token in tokens if token != BYTES.pad_id]


@given(st.lists(st.text(max_size=20), max_size=5), st.integers(1, 9))
def test_packing_makes_every_token_a_target_once(texts, length):
    rows = pack(texts, BYTES, length)
    expected = [BYTES.eos_id]
    for text in texts:
        expected += [*text.encode(), BYTES.eos_id]
    assert rows.dtype == np.int32
    assert rows.shape[1] == length + 1
    if len(expected) > 1:
        assert stream_of(rows) == expected
        np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])


def test_packing_without_padding_drops_the_short_row():
    class NoPadding(ByteTokenizer):
        pad_id = None

    assert pack(["abcdef"], NoPadding(), 3).tolist() == [[257, 97, 98, 99], [99, 100, 101, 102]]


def test_packing_needs_a_separator():
    class NoEnd(ByteTokenizer):
        eos_id = None

    with pytest.raises(ValueError, match="no end-of-text token"):
        pack(["a"], NoEnd(), 3)


def test_a_name_decides_its_split_forever():
    # Changing the hash would let yesterday's test set into today's training set.
    assert split_of("json/decoder.py") == "train"
    assert split_of("json/encoder.py") == "test"
    assert split_of("keyword.py") == "validation"
    share = np.mean([split_of(f"{n}.py") == "train" for n in range(4000)])
    assert abs(share - 0.8) < 0.03
    with pytest.raises(ValueError, match=r"held_out must be in \[0, 0.5\).*got 0.5"):
        split_of("a", 0.5)


def documents_of(sizes: dict[str, int]) -> list[Document]:
    """Files of 10 bytes until each owner has so much training text, and what falls aside."""
    documents = []
    for client, size in sizes.items():
        number = 0
        while size > 0:
            name = f"{client}/{number}"
            documents.append(Document(name, client, f"{client}{number:09d}"))
            size -= 10 * (split_of(name) == "train")
            number += 1
    return documents


def test_clients_are_the_largest_and_all_splits_number_them_alike():
    documents = documents_of({"a": 100, "b": 300, "c": 200})
    splits = corpus(documents, BYTES, length=16, num_clients=2)
    assert tuple(splits) == SPLITS
    assert {source.clients for source in splits.values()} == {("b", "c")}
    for split, source in splits.items():
        texts = {-1: "a", 0: "b", 1: "c"}
        for number in np.unique(source.client):
            text = bytes(
                token
                for token in stream_of(source.examples["tokens"][source.client == number])
                if token < 256
            ).decode()
            assert text == "".join(
                document.text
                for document in documents
                if split_of(document.name) == split and document.client == texts[int(number)]
            )
    assert splits["train"].client.min() == 0
    assert set(splits["test"].client) == {-1, 0, 1}


def test_a_corpus_that_cannot_be_made_says_why():
    documents = documents_of({"a": 10})
    with pytest.raises(ValueError, match=r"num_clients must be in 1\.\.1; got 2"):
        corpus(documents, BYTES, length=8, num_clients=2)
    with pytest.raises(ValueError, match="None of 0 documents is training text"):
        corpus([], BYTES, length=8)
    with pytest.raises(ValueError, match="length must be at least 1 token; got 0"):
        corpus(documents, BYTES, length=0)


def test_a_folder_gives_one_client_for_each_top_level_folder(tmp_path: Path):
    for name in ("b/1.txt", "b/deep/2.txt", "a.txt", "ignored.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "b/1.txt").write_bytes(b"not \xff utf-8")
    documents = read_folder(tmp_path)
    assert [(document.name, document.client) for document in documents] == [
        ("a.txt", "a"),
        ("b/1.txt", "b"),
        ("b/deep/2.txt", "b"),
    ]
    assert documents[1].text == "not \ufffd utf-8"
    assert len(read_folder(tmp_path, ["**/*.txt", "*.md", "a.*"])) == 4
    by_file = read_folder(tmp_path, client=lambda path: path.as_posix())
    assert by_file[2].client == "b/deep/2.txt"


def test_a_folder_without_text_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path))}.*'\\*\\*/\\*.txt'"):
        read_folder(tmp_path)
    with pytest.raises(NotADirectoryError, match="nowhere is not a folder"):
        read_folder(tmp_path / "nowhere")


@pytest.mark.smoke
def test_the_tiny_standard_library_has_every_split_and_unequal_clients():
    documents = stdlib_documents(tiny=True)
    splits = stdlib(length=128, tiny=True)
    assert splits["train"].clients == ("json", "abc", "email", "bisect")
    assert all(len(source.examples["tokens"]) > 5 for source in splits.values())
    sizes = sum(len(document.text.encode()) for document in documents)
    assert 30_000 < sizes < 100_000
    train, test = federation_of(splits["train"]), federation_of(splits["test"])
    assert train.count.tolist() == sorted(train.count, reverse=True)
    assert train.count.sum() == len(splits["train"].examples["tokens"])
    # Only json has a file in the test split; others' test text is nobody's.
    assert (test.count > 0).tolist() == [True, False, False, False]
    # Every byte of training text is in the rows, and comes back.
    rows = splits["train"].examples["tokens"]
    assert (rows[:, 1:] < 256).sum() == sum(
        len(document.text.encode()) for document in documents if split_of(document.name) == "train"
    )
    assert "train" in describe(splits)
    assert "json" in sizes_table(documents)


def test_only_owned_examples_have_natural_clients():
    with pytest.raises(ValueError, match="no natural owners"):
        federation_of(Source({"label": np.zeros(2)}))


def test_the_standard_library_holds_programs_and_no_tests():
    documents = stdlib_documents()
    names = [document.name for document in documents]
    assert names == sorted(names, key=Path)
    assert {"asyncio/base_events.py", "typing.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert parts.isdisjoint({"test", "tests", "site-packages", "encodings", "idlelib"})
    assert len({document.client for document in documents}) > 100
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_a_library_without_sources_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no Python source files"):
        stdlib_documents(tmp_path)


def test_undecodable_sources_do_not_stop_the_corpus(tmp_path: Path):
    (tmp_path / "module.py").write_bytes(b"# caf\xe9\r\nx = 1\r\n")
    (document,) = stdlib_documents(tmp_path)
    assert document == Document("module.py", "module", "# caf\ufffd\nx = 1\n")
