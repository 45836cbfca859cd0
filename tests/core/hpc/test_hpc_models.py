import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm import hub
from jaxfm.models import CodeEncoderConfig, code_encoder
from jaxfm.tasks.hpc import encoding
from jaxfm.tasks.hpc.graph import RELATIONS, edges
from jaxfm.tasks.hpc.lexer import lex
from jaxfm.tasks.hpc.subscripts import linear
from jaxfm.tasks.hpc.tokenizers import LexerTokenizer, make_tokenizer

KEY = jax.random.key(0)
TOKENIZER = LexerTokenizer()
LOOP = "for (int i = 0; i < 20; i++) {\n    a[2*i + 4] = a[i] + s;\n}\n"
SMALL = {"vocab_size": 300, "embed_dim": 8, "num_layers": 2, "num_heads": 2, "mlp_dim": 8}


def relation(text, first, second):
    places = [p.start for p in lex(text) if p.text == "a"]
    wanted = (places[first], places[second])
    return next(RELATIONS[e.relation] for e in edges(text) if (e.first, e.second) == wanted)


def test_relations_agree_with_enumeration_where_they_decide():
    coefficients = list(itertools.product((0, 1, 2, 3), (0, 1, 2, 5), repeat=2))
    for a, b, c, d in coefficients:
        text = f"for (int i = 0; i < 8; i++) {{\n  a[{a}*i+{b}] = a[{c}*i+{d}];\n}}"
        said = relation(text, 0, 1)
        pairs = itertools.product(range(8), repeat=2)
        met = {j - i for i, j in pairs if a * i + b == c * j + d}
        if said == "independent":
            assert not met - {0} or not met, text
        elif said == "same iteration":
            assert met == {0}, text
        elif said == "always":
            assert len(met) == 15, text
        elif said.startswith("distance"):
            assert len(met - {0}) == 1, text
        else:
            assert said == "maybe"


def test_fortran_and_c_have_the_same_relation():
    c = "for (int i = 1; i < n; i++) {\n  a[i] = a[i - 1];\n}"
    fortran = "do i = 1, n - 1\n  a(i) = a(i - 1)\nend do"
    assert relation(c, 0, 1) == relation(fortran, 0, 1) == "distance 1"


@pytest.mark.parametrize(
    "text", ["", "a[", "for (", "do i =", "a[i][", "))]]", "#pragma omp", "a[2*"]
)
def test_any_text_has_a_graph(text):
    assert isinstance(edges(text), list)


def test_only_linear_subscripts_are_linear():
    assert linear(tuple(lex("3*(i - 2) + j"))) == ({"i": 3, "j": 1}, -6)
    for text in ("i*j", "b[i]", "i % 2", "f(i)", "2**i", ""):
        assert linear(tuple(lex(text))) is None or text == ""


def test_edges_join_the_tokens_in_which_their_pieces_begin():
    for name in ("lexer", "byte"):
        tokenizer = make_tokenizer(name)
        rows = encoding.encode([LOOP], tokenizer, max_len=96, max_edges=64)
        text, table = LOOP.encode(), tokenizer.token_bytes()
        pairs = [tuple(int(rows["start"][0, i]) for i in edge[:2]) for edge in rows["edges"][0]
                 if edge[2]]  # fmt: skip
        assert pairs == [(e.first, e.second) for e in edges(LOOP)][:64]
        ids, start = rows["tokens"][0], rows["start"][0]
        for token, place in zip(ids[start >= 0], start[start >= 0]):
            assert text.startswith(table[token], place)
        lines = encoding.line_of(LOOP, start, tokenizer)
        assert set(lines[start >= 0]) == {1, 2, 3}


@pytest.mark.parametrize("head", ["classify", "locate", "embed"])
def test_padding_and_absent_edges_change_nothing(head):
    model = code_encoder(CodeEncoderConfig(**SMALL, num_relations=5, head=head))
    variables = model.init(KEY)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 300, (2, 6)).astype(np.int32)
    links = np.array([[[0, 3, 2], [3, 0, 1]], [[1, 5, 4], [0, 0, 0]]], np.int32)
    rows = {"tokens": tokens, "mask": np.ones((2, 6), bool), "edges": links}
    longer = {
        "tokens": np.pad(tokens, ((0, 0), (0, 3)), constant_values=7),
        "mask": np.pad(rows["mask"], ((0, 0), (0, 3))),
        "edges": np.pad(links, ((0, 0), (0, 4), (0, 0))),
    }
    cut = lambda y: {**y, "tokens": y["tokens"][:, :6]} if head == "locate" else y
    one, two = (cut(model.apply(variables, x)[0]) for x in (rows, longer))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        np.testing.assert_allclose(x, y, atol=2e-5)
    biased = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 1.5 if "bias" in str(path[-1]) and x.shape[-1] == 2 else x,
        variables.params["layers"],
    )
    moved = variables._replace(params={**variables.params, "layers": biased})
    changed = cut(model.apply(moved, rows)[0])
    assert not np.allclose(jax.tree.leaves(one)[0], jax.tree.leaves(changed)[0])


def test_a_model_is_saved_and_loaded(tmp_path):
    model = code_encoder(CodeEncoderConfig(**SMALL, num_relations=3))
    variables = model.init(KEY)
    hub.save(model, variables, tmp_path / "model")
    again, loaded = hub.load(tmp_path / "model")[:2]
    rows = {"tokens": jnp.ones((1, 4), jnp.int32), "edges": jnp.ones((1, 1, 3), jnp.int32)}
    np.testing.assert_array_equal(model.apply(variables, rows)[0], again.apply(loaded, rows)[0])


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="twice num_heads"):
        CodeEncoderConfig(vocab_size=8, embed_dim=12, num_heads=4)
    with pytest.raises(ValueError, match="num_relations"):
        CodeEncoderConfig(vocab_size=8, num_relations=-1)
    with pytest.raises(ValueError, match="max_len"):
        encoding.encode(["a"], TOKENIZER, max_len=2)
