import random

import pytest

from jaxfm.tasks.hpc import tokenizers
from jaxfm.tasks.hpc.lexer import lex, normalized, rename, restore
from jaxfm.tokenizer import Tokenizer

C = "#pragma omp parallel for private(tmp)\nfor (int i = 0; i < n; i++) {\n\ttmp = a[12*i-3];\n}\n"
FORTRAN = "!$OMP PARALLEL DO\nDO i = 1, n\n  b(i) = 1.5d0 * b(i + 1) ** 2 ! note\nEND DO\n"
ODD = 'x = "i, \\" j"; /* keep i */ // i\n#include <stdio.h>\nchar c = \'i\'; é \u2028 0x1F 1e-5'
TEXTS = (C, FORTRAN, ODD, "", " ", "\r\n\r\n  a", "/* open", '"open', "{" * 50)


def made():
    return {name: tokenizers.make_tokenizer(name, [C, FORTRAN], 400) for name in tokenizers.NAMES}


TOKENIZERS = made()


@pytest.mark.parametrize("name", tokenizers.NAMES)
def test_texts_round_trip(name):
    tokenizer = TOKENIZERS[name]
    assert isinstance(tokenizer, Tokenizer)
    draw = random.Random(0)
    wild = ["".join(chr(draw.choice((draw.randrange(128), draw.randrange(0xD800))))
                    for _ in range(60)) for _ in range(50)]  # fmt: skip
    for text in (*TEXTS, *wild):
        expected = rename(text).text if name == "lexer-renamed" else text
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == expected
        assert b"".join(tokenizer.token_bytes()[i] for i in ids) == expected.encode()
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("name", tokenizers.NAMES)
def test_any_bytes_decode_and_what_is_saved_is_loaded(name, tmp_path):
    tokenizer = TOKENIZERS[name]
    tokenizers.save(tokenizer, tmp_path / "made")
    again = tokenizers.load(tmp_path / "made")
    draw = random.Random(1)
    ids = [draw.randrange(tokenizer.vocab_size) for _ in range(300)]
    assert again.decode(ids) == tokenizer.decode(ids)
    assert again.encode(C) == tokenizer.encode(C)
    assert again.vocab_size == tokenizer.vocab_size == len(tokenizer.token_bytes())


def test_pieces_join_to_the_text():
    for text in TEXTS:
        pieces = lex(text)
        assert "".join(piece.text for piece in pieces) == text
        assert all(text.startswith(piece.text, piece.start) for piece in pieces)


def test_digits_are_tokens_of_their_own_and_keywords_are_one():
    tokenizer = TOKENIZERS["lexer"]
    assert tokenizer.encode("12") == [ord("1"), ord("2")]
    assert len(tokenizer.encode("for")) == len(tokenizer.encode("reduction")) == 1
    assert len(tokenizer.encode("tmp")) == 1  # learned from the texts


def test_renaming_is_consistent_injective_and_taken_back():
    renamed = rename(C)
    assert renamed.text.count("v0") == 2 and "tmp" not in renamed.text
    assert len(set(renamed.names.values())) == len(renamed.names)
    for text in TEXTS:
        assert restore(rename(text).text, rename(text).names) == text
    swapped = rename("v1 = v0 + v1;")
    assert (
        swapped.text == "v0 = v1 + v0;" and restore(swapped.text, swapped.names) == "v1 = v0 + v1;"
    )
    assert '"i, \\" j"' in rename(ODD).text and "<stdio.h>" in rename(ODD).text


def test_the_normal_form_forgets_names_layout_and_comments():
    assert normalized("s+=a[i] ; // sum") == normalized("  t += x[k];\n")
    assert normalized("s += a[i];") != normalized("s += a[i+1];")


def test_wrong_names_and_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'lexer'"):
        tokenizers.make_tokenizer("lexr")
    with pytest.raises(ValueError, match="trained on texts"):
        tokenizers.make_tokenizer("bpe")
    (tmp_path / "lexer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a lexer's vocabulary"):
        tokenizers.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        tokenizers.load(tmp_path / "nothing")
