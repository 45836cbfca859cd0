"""Rows of words and tags: from files to tokens, a task and a Hugging Face folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm import hub
from jaxfm.data import load
from jaxfm.tasks import evaluate, tagging, task_for
from jaxfm.testing import random_variables, tiny_encoder

ROWS = [(["ab", "c"], ["X", "O"]), (["c", "d", "ab"], ["O", "O", "X"])] * 12


def write(path, rows):
    lines = [json.dumps({"tokens": words, "ner_tags": tags}) for words, tags in rows]
    path.write_text("\n".join(lines))
    return path


def test_a_words_tag_stands_at_its_first_token_alone(tmp_path):
    data = load(write(tmp_path / "rows.jsonl", ROWS), seed=1)
    assert data.kind == "tags" and data.classes == ("O", "X")
    train = data.splits["train"].examples
    row = next(n for n in range(2) if train["mask"][n].sum() == 6)  # bos, a, b, space, c, eos
    assert train["tokens"][row, :6].tolist() == [256, 97, 98, 32, 99, 257]
    assert train["tags"][row].tolist() == [-100, 1, -100, 0, -100, -100, -100, -100]
    short = load(tmp_path / "rows.jsonl", length=4).splits["train"].examples
    assert short["tokens"].shape[1] == 4 and (short["tags"] != -100).any(1).all()


@pytest.mark.parametrize("kind", ["conll", "parquet", "ints", "datasets"])
def test_the_same_rows_in_other_files(kind, tmp_path):
    expected = load(write(tmp_path / "rows.jsonl", ROWS)).splits["train"]
    names = {"O": 0, "X": 1}
    ints = [(words, [names[tag] for tag in tags]) for words, tags in ROWS]
    path = tmp_path / f"rows.{kind}"
    if kind == "conll":
        blocks = ["\n".join(f"{w} _ {t}" for w, t in zip(*row)) for row in ROWS]
        path.write_text("-DOCSTART- _ O\n\n" + "\n\n".join(blocks) + "\n")
    elif kind == "ints":
        path = write(tmp_path / "ints.jsonl", ints)
    elif kind == "parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = dict(zip(("words", "tags"), map(list, zip(*ROWS))))
        parquet.write_table(pa.table(columns), path)
    else:
        datasets = pytest.importorskip("datasets")
        value, tag = datasets.Value("string"), datasets.ClassLabel(names=["O", "X"])
        features = {"tokens": datasets.Sequence(value), "ner_tags": datasets.Sequence(tag)}
        columns = dict(zip(features, map(list, zip(*ints))))
        rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        rows.save_to_disk(path)
    found = load(path).splits["train"]
    assert found.classes == (("0", "1") if kind == "ints" else ("O", "X"))
    jax.tree.map(np.testing.assert_array_equal, found.examples, expected.examples)


@pytest.mark.parametrize(
    "row, message",
    [
        ((["a", "b"], ["O"]), "row 25, column 'ner_tags': 1 tags found for 2 words."),
        (([], []), "row 25, column 'tokens': the row has no words."),
        ((None, ["O"]), "row 25, column 'tokens': the row has no words."),
        ((["a", " "], ["O", "O"]), "row 25, column 'tokens': ' ' is no word."),
        ((["a"], "O"), "row 25, column 'ner_tags': 'O' is no list of tags, one for each word."),
        ((["a"], [0.5]), "row 25, column 'ner_tags': the tag 0.5 is no text or whole number."),
    ],
)
def test_rows_that_do_not_fit_are_named(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "rows.jsonl", [*ROWS, row]))


def test_other_faults_are_one_sentence(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", [(["a"], ["NEW"])])
    with pytest.raises(ValueError, match=r"test.jsonl, row 1, .* the tag 'NEW' is in no training"):
        load(tmp_path)
    with pytest.raises(ValueError, match="has only the tag O; there must be two"):
        load(write(tmp_path / "one.jsonl", [(["a"], ["O"])] * 30))
    with pytest.raises(ValueError, match="'ner_tags' cannot be the text and the label"):
        load(tmp_path / "train.jsonl", text="ner_tags")
    (tmp_path / "bad.conll").write_text("a O\nb\n")
    with pytest.raises(ValueError, match=r"bad.conll, line 2: 'b' has no tag."):
        load(tmp_path / "bad.conll")
    with pytest.raises(ValueError, match=r"A tag of row 0 is 7; tags are in 0..2, or -100"):
        tagging(3).check({"tags": np.full((2, 3), 7)})


def test_metrics_are_over_words(tmp_path):
    data = load(write(tmp_path / "rows.jsonl", ROWS))
    rows = data.splits["train"].examples

    def apply(variables, inputs, *, train):  # always the second tag
        logits = jnp.broadcast_to(jnp.array([0.0, 1.0]), (*inputs["tokens"].shape, 2))
        return logits, {}

    found = evaluate(apply, {}, task_for(data), rows, 8)
    tags = rows["tags"][rows["tags"] >= 0]
    assert found["accuracy"] == pytest.approx((tags == 1).mean(), rel=1e-6)
    nats = np.log(1 + np.e) - tags.mean()
    assert found["loss"] == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_transformers_reopens_a_tagger_with_equal_logits(family, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    model = tiny_encoder(family=family, pad_id=1, head="tag", num_classes=3)
    variables = random_variables(model)
    hub.save(model, variables, tmp_path / "m", classes=("O", "B", "I"))
    name = {"bert": "BertForTokenClassification", "roberta": "RobertaForTokenClassification"}
    theirs, info = getattr(transformers, name[family]).from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not any(info.values()) and theirs.config.id2label == {0: "O", 1: "B", 2: "I"}
    tokens = np.random.default_rng(0).integers(2, 20, (2, 7))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    read, numbers = hub.load(tmp_path / "m")
    output = read.apply(numbers, {"tokens": jnp.asarray(tokens, jnp.int32)})[0]
    assert output.shape == (2, 7, 3)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)
