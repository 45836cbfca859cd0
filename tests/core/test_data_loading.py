"""`jaxfm.data.load`: files and folders of every kind, and what is refused at the door."""

import csv
import json
import re
import sys
import types

import numpy as np
import pytest
import tokenizers
import transformers

from jaxfm import tasks
from jaxfm.data import as_images, deal_out, load
from jaxfm.data.source import Source
from jaxfm.data.tables import read_table
from jaxfm.data.text import token_rows
from jaxfm.tokenizer import HuggingFaceTokenizer

RNG = np.random.default_rng(0)
NAMES = ("ant", "bee", "cat")  # 30 rows of each
LABELS = [NAMES[n % 3] for n in range(90)]
POINTS = np.stack([np.arange(90) % 3, RNG.permutation(90) / 8], 1)
IMAGES = (40 * (1 + np.arange(90) % 3)[:, None, None] * np.ones((90, 6, 5))).astype(np.uint8)
TEXTS = [f"{name} {number}" for number, name in enumerate(LABELS)]


def write_rows(path, header, rows, delimiter=","):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows] if header else rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def all_rows(data, leaf):
    return np.concatenate([source.examples[leaf] for source in data.splits.values()])


def write_csv(folder):
    rows = [[*point, name] for point, name in zip(POINTS.tolist(), LABELS)]
    return write_rows(folder / "points.csv", ["a", "b", "label"], rows)


def write_tsv(folder):
    rows = [[*point, name] for point, name in zip(POINTS.tolist(), LABELS)]
    return write_rows(folder / "points.tsv", ["a", "b", "label"], rows, "\t")


def write_json(folder):
    columns = {"a": POINTS[:, 0].tolist(), "b": POINTS[:, 1].tolist(), "label": LABELS}
    (folder / "points.json").write_text(json.dumps(columns))
    return folder / "points.json"


def write_lines(folder):
    rows = [{"point": p, "label": name} for p, name in zip(POINTS.tolist(), LABELS)]
    return write_jsonl(folder / "points.jsonl", rows)


def write_npz(folder):
    np.savez(folder / "points.npz", x=POINTS, y=np.array(LABELS))
    return folder / "points.npz"


def write_arrays(folder):
    np.save(folder / "x.npy", POINTS)
    np.save(folder / "y.npy", np.array(LABELS))
    return folder


def write_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"a": POINTS[:, 0], "b": POINTS[:, 1], "label": LABELS}
    parquet.write_table(pyarrow.table(columns), folder / "points.parquet")
    return folder / "points.parquet"


POINT_FILES = (
    *(write_csv, write_tsv, write_json, write_lines, write_npz, write_arrays, write_parquet),
)


@pytest.mark.parametrize("write", POINT_FILES)
def test_numbers_in_files_of_every_kind_are_the_same_examples(write, tmp_path):
    data = load(write(tmp_path))
    assert (data.kind, data.classes) == ("features", NAMES)
    assert [len(source.examples["label"]) for source in data.splits.values()] == [73, 8, 9]
    points, labels = all_rows(data, "features"), all_rows(data, "label")
    assert points.dtype == np.float32 and labels.dtype == np.int32
    order, expected = np.argsort(points[:, 1]), np.argsort(POINTS[:, 1])
    np.testing.assert_allclose(points[order], POINTS[expected], rtol=1e-6)
    assert [NAMES[label] for label in labels[order]] == [LABELS[row] for row in expected]
    again = load(write(tmp_path)).splits["test"].examples["features"]
    np.testing.assert_array_equal(again, data.splits["test"].examples["features"])
    assert (again != load(write(tmp_path), seed=1).splits["test"].examples["features"]).any()


def write_image_folder(folder, suffix=".npy", images=IMAGES):
    Image = pytest.importorskip("PIL.Image") if suffix != ".npy" else None
    for number, (image, name) in enumerate(zip(images, LABELS)):
        path = folder / ("test" if number < 30 else "train") / name / f"{number:02d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, image) if Image is None else Image.fromarray(image).save(path)
    return folder


@pytest.mark.parametrize("suffix", [".npy", ".png"])
def test_a_folder_of_images_by_class(suffix, tmp_path):
    data = load(write_image_folder(tmp_path, suffix))
    assert (data.kind, data.classes) == ("images", NAMES)
    train, _, test = (source.examples for source in data.splits.values())
    assert train["image"].shape == (54, 6, 5, 1) and train["image"].dtype == np.uint8
    for part in (train, test):
        np.testing.assert_array_equal(part["image"][:, 0, 0, 0], 40 * (1 + part["label"]))
    assert len(test["label"]) == 30


def test_colour_images_scale_to_a_size(tmp_path):
    colours = np.repeat(IMAGES[..., None], 3, 3)
    data = load(write_image_folder(tmp_path, ".png", colours), image_size=(4, 8))
    assert data.splits["train"].examples["image"].shape == (54, 4, 8, 3)


def test_a_table_of_image_paths(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(IMAGES):
        np.save(tmp_path / "pictures" / f"{number}.npy", image)
    rows = [[f"pictures/{number}.npy", name] for number, name in enumerate(LABELS)]
    path = write_rows(tmp_path / "metadata.csv", ["file_name", "label"], rows)
    data = load(path)
    np.testing.assert_array_equal(
        all_rows(data, "image")[:, 0, 0, 0], 40 * (1 + all_rows(data, "label"))
    )
    (tmp_path / "pictures" / "7.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"pictures/7.npy does not exist\."):
        load(path)


def text_rows():
    return [{"text": text, "label": name} for text, name in zip(TEXTS, LABELS)]


def write_text_csv(folder):
    return write_rows(folder / "t.csv", ["text", "label"], zip(TEXTS, LABELS))


def write_text_lines(folder):
    return write_jsonl(folder / "t.jsonl", text_rows())


def write_text_folder(folder):
    for number, (text, name) in enumerate(zip(TEXTS, LABELS)):
        path = folder / ("test" if number < 30 else "train") / name / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize("write", [write_text_csv, write_text_lines, write_text_folder])
def test_labelled_text(write, tmp_path):
    data = load(write(tmp_path))
    assert (data.kind, data.classes) == ("text", NAMES)
    tokens, mask = all_rows(data, "tokens"), all_rows(data, "mask")
    decode = lambda row: data.tokenizer.decode(row.tolist())
    assert sorted(map(decode, tokens)) == sorted(TEXTS)
    for row, seen, label in zip(tokens, mask, all_rows(data, "label")):
        assert decode(row).startswith(NAMES[label])
        assert seen.sum() == 2 + len(decode(row)) and seen[: seen.sum()].all()
    inputs, _, _ = tasks.task_for(data).prepare(data.splits["test"].examples)
    assert set(inputs) == {"tokens", "mask"}
    assert load(write(tmp_path), length=5).splits["test"].examples["tokens"].shape[1] == 5


def test_folders_of_texts_are_clients_or_labels(tmp_path):
    for number, (text, name) in enumerate(zip(TEXTS, LABELS)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{number}.txt").write_text(text)
    data = load(tmp_path, length=8)
    assert data.kind == "language" and sorted(data.splits["train"].clients) == list(NAMES)
    assert load(tmp_path, label="folder").classes == NAMES


def test_text_without_labels_is_to_be_continued(tmp_path):
    rows = [{"text": text, "client": name} for text, name in zip(TEXTS, LABELS)]
    data = load(write_jsonl(tmp_path / "t.jsonl", rows), length=8)
    assert data.kind == "language" and data.splits["train"].clients != ()
    plain = load(write_jsonl(tmp_path / "u.jsonl", [{"text": text} for text in TEXTS]), length=8)
    assert plain.splits["train"].client is None
    (tmp_path / "v.txt").write_text("\n\n".join(TEXTS))
    blocks = load(tmp_path / "v.txt", length=8)
    count = lambda data: sum(len(part.examples["tokens"]) for part in data.splits.values())
    assert abs(count(blocks) - count(plain)) < 4
    dealt = deal_out(blocks.splits, tasks.task_for(blocks), num_clients=3)  # no owners, no labels
    assert len(dealt.train.count) == 3


def bert_tokenizer():
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", *NAMES, *map(str, range(90))]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return HuggingFaceTokenizer(
        transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **names)
    )


def test_a_tokenizers_own_special_tokens_stand_around_texts():
    tokenizer = bert_tokenizer()
    texts = ["ant 7", "bee", "cat 1 2 3"]
    for length in (4, 8):
        tokens, mask = token_rows(texts, tokenizer, length)
        expected = tokenizer.inner(
            texts, padding=True, truncation=True, max_length=length, return_tensors="np"
        )
        np.testing.assert_array_equal(tokens, expected["input_ids"])
        np.testing.assert_array_equal(mask, expected["attention_mask"])
    with pytest.raises(ValueError, match="length=2 leaves no room for text beside 2 special"):
        token_rows(texts, tokenizer, 2)


def test_files_named_after_splits(tmp_path):
    (tmp_path / "data").mkdir()
    rows = list(zip(TEXTS, LABELS))
    for name, part in (("train-00000", rows[:60]), ("test-00000", rows[60:])):
        write_rows(tmp_path / "data" / f"{name}.csv", ["text", "label"], part)
    splits = load(tmp_path).splits
    assert {name: len(part.examples["label"]) for name, part in splits.items()} == {
        "train": 54, "validation": 6, "test": 30,
    }  # fmt: skip
    arrays = {"x_train": POINTS[:60], "y_train": np.arange(60) % 3, "x_test": POINTS[60:]}
    np.savez(tmp_path / "a.npz", y_test=np.arange(60, 90) % 3, **arrays)
    assert len(load(tmp_path / "a.npz").splits["test"].examples["label"]) == 30


def test_a_table_without_a_header_numbers_its_columns(tmp_path):
    rows = [["3", "one, two", "x"], ["4", "three", "y"]]
    path = write_rows(tmp_path / "t.csv", None, rows)
    assert list(read_table(path).columns) == ["0", "1", "2"]
    assert read_table(path, columns=("a", "b", "c")).columns["b"] == ["one, two", "three"]
    path = write_rows(tmp_path / "u.csv", None, [["label", "0", "1"], ["7", "0.5", "1"]])
    assert list(read_table(path).columns) == ["label", "0", "1"]


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["b", "a", "c"], ("a", "b", "c")),
        ([3, 1, 10], ("1", "3", "10")),
        ([1.0, 0.0, 2.0], ("0", "1", "2")),
        ([-1, 1, 0], ("-1", "0", "1")),
        ([[2], [0], [1]], ("0", "1", "2")),
    ],
)
def test_labels_of_all_forms_are_numbered_from_zero(values, classes, tmp_path):
    np.savez(tmp_path / "d.npz", x=POINTS, label=np.array(values * 30))
    data = load(tmp_path / "d.npz")
    assert data.classes == classes
    named = [classes[n] for n in all_rows(data, "label")]
    order = {
        float(p[1]): str(np.ravel(v)[0]).removesuffix(".0") for p, v in zip(POINTS, values * 30)
    }
    rows = all_rows(data, "features")
    assert named == [order[float(np.round(row[1], 3))] for row in rows.astype(np.float64)]


def test_clients_by_column_by_rows_and_by_file(tmp_path):
    rows = [[*p, n, f"user {k % 4}"] for k, (p, n) in enumerate(zip(POINTS.tolist(), LABELS))]
    path = write_rows(tmp_path / "d.csv", ["a", "b", "label", "who"], rows)
    options = {"features": ("a", "b")}
    owner = {round(row[1], 3): row[3] for row in rows}

    def held(data):
        source = data.splits["train"]
        points = source.examples["features"][:, 1].astype(np.float64).round(3)
        return {float(p): source.clients[c] for p, c in zip(points, source.client) if c >= 0}

    by_column = load(path, client="who", **options)
    assert by_column.splits["train"].clients == tuple(f"user {k}" for k in range(4))
    assert held(by_column) == {p: owner[p] for p in held(by_column)}
    some = {name: [k for k in range(90) if rows[k][3] == name] for name in ("user 3", "user 0")}
    mapped = load(path, client=some, **options)
    assert held(mapped) == {p: w for p, w in held(by_column).items() if w in some}
    (tmp_path / "who.json").write_text(json.dumps(some))
    assert held(load(path, client=str(tmp_path / "who.json"), **options)) == held(mapped)
    listed = write_rows(tmp_path / "list.csv", ["client"], [[row[3]] for row in rows])
    assert held(load(path, client=listed, **options)) == held(by_column)
    folder = write_image_folder(tmp_path / "images")
    owners = {f"train/ant/{n}.npy": "anna" for n in range(30, 90, 3)}
    source = load(folder, client=owners).splits["train"]
    assert source.clients == ("anna",)
    np.testing.assert_array_equal(source.client == 0, source.examples["label"] == 0)


def test_weights_are_a_column(tmp_path):
    rows = [[k + 0.5, *p, n] for k, (p, n) in enumerate(zip(POINTS.tolist(), LABELS))]
    path = write_rows(tmp_path / "d.csv", ["w", "a", "b", "label"], rows)
    data = load(path, weight="w")
    assert sorted(all_rows(data, "weight")) == [k + 0.5 for k in range(90)]
    assert all_rows(data, "features").shape == (90, 2)


GREY = RNG.integers(0, 256, (4, 6, 5)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (4, 6, 5, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (GREY, GREY[..., None]),
        (COLOUR, COLOUR),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR),
        (COLOUR.astype(np.int64), COLOUR),
        (COLOUR.astype(np.float64), COLOUR.astype(np.float32) / np.float32(255)),
        (COLOUR / 255, (COLOUR / 255).astype(np.float32)),
        (COLOUR.astype(np.uint16) * 257, COLOUR.astype(np.uint16) * 257 / np.float32(65535)),
        (COLOUR / 255 - 0.5, (COLOUR / 255 - 0.5).astype(np.float32)),
        (GREY > 99, (GREY > 99)[..., None].astype(np.float32)),
    ],
)
def test_images_get_one_layout_and_one_scale(given, expected):
    images = as_images(given)
    assert images.dtype == (np.uint8 if expected.dtype == np.uint8 else np.float32)
    np.testing.assert_allclose(images, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 6)), r"shape \(4, 6\) are neither"),
        (np.zeros((4, 6, 6, 9)), "are neither"),
        (np.full((2, 6, 6), np.nan), r"image 1 holds NaN or infinity\."),
        (np.full((2, 6, 6), 4095.0), r"images hold 4095\.0\.\.4095\.0; give"),
        (np.full((2, 6, 6), -1), "images hold -1..-1; give"),
    ],
)
def test_what_is_no_image_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        as_images(images)


def points_with(column, value, row=4):
    columns = {"a": POINTS[:, 0].tolist(), "label": list(LABELS), "w": [1.0] * 90}
    columns[column][row] = value
    return columns


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (points_with("a", "x"), {}, "d.json, row 5, column 'a': 'x' is not a number."),
        (points_with("a", None), {}, "d.json, row 5, column 'a': a number is missing."),
        (points_with("a", float("nan")), {}, "d.json, row 5, column 'a': nan is not finite."),
        (points_with("a", 10**400), {}, "00 is not a number."),
        (points_with("a", 1e300), {}, "row 5, column 'a': 1e+300 is not finite."),
        (points_with("a", 1), {"client": 5}, "client=5 is no column, file, mapping or sequence"),
        (points_with("a", 1), {"encoding": "no"}, "encoding='no' is unknown; give one such as"),
        (points_with("label", None), {}, "d.json, row 5, column 'label': the label is missing."),
        (points_with("label", ""), {}, "d.json, row 5, column 'label': the label is missing."),
        (points_with("label", {}), {}, "row 5, column 'label': {} is not a label."),
        ({"a": [1, 2] * 20, "label": [0.5, 1] * 20}, {}, "row 1, column 'label': the label 0.5 is"),
        ({"a": [1, 2] * 20, "label": [1] * 40}, {}, "has only the label 1; there must be two."),
        ({"a": [1] * 40, "label": list(range(40))}, {}, "has 40 different values in 40 rows"),
        (points_with("w", -1), {"weight": "w"}, "row 5, column 'w': the weight -1.0 is negative."),
        (points_with("w", None), {"weight": "w"}, "row 5, column 'w': a number is missing."),
        ({"a": [1, 2], "label": [1]}, {}, "columns must be equally long; found {'a': 2, 'la"),
        ({"a": [], "label": []}, {}, "d.json has no rows."),
        ({"a": [1, 2], "label": [0, 1]}, {}, "There are only 2 training rows"),
        ({"a": [1, 2] * 20}, {}, "d.json has no column of labels; say with label which of 'a' it"),
        (points_with("a", 1), {"label": "lable"}, "label='lable' is not a column; it has 'a'"),
        (points_with("a", 1), {"client": [1]}, "1 clients are given for 90 rows; give one each."),
        (points_with("a", 1), {"client": "who"}, "client='who' is neither a file nor a column"),
        (points_with("a", 1), {"client": {"x": [90]}}, "Client 'x': row 90 is not in 0..89."),
        (points_with("a", 1), {"client": {"x": [1], "y": [1]}}, "Row 1 belongs to two clients"),
        (
            {"one": TEXTS, "two": POINTS[:, 0].tolist(), "label": LABELS}, {},
            "any of 'one', 'two' could be the input; choose with text, image or features.",
        ),
    ],
)  # fmt: skip
def test_malformed_tables_are_refused_in_one_sentence(columns, options, message, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps(columns))
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as caught:
        load(tmp_path / "d.json", **options)
    assert str(caught.value).count("\n") == 0 and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "", "d.csv is empty."),
        ("d.csv", "a,label\n", "d.csv has no rows."),
        ("d.csv", "a,label\n1,x\n2\n", "d.csv, row 2: 1 cells found, 2 expected."),
        ("d.csv", "a,a\n1,x\n", "several columns are called ['a']"),
        ("d.csv", b"a,label\n1,caf\xe9\n", "d.csv is not utf-8 text at byte"),
        ("d.jsonl", '{"a": 1}\n{"a": \n', "d.jsonl, line 2 is not JSON"),
        ("d.jsonl", '{"a": 1}\n3\n', "d.jsonl, row 2 should be an object; found int."),
        ("d.json", "3", "should hold a list of objects; found int."),
        ("d.npz", b"PK\x03\x04 cut off", "d.npz cannot be read as a NumPy file"),
        ("d.json", "[" * 100_000, "d.json is nested too deeply to be a table."),
        ("d.npz", b"PK\x05\x06" + bytes(18), "d.npz holds no arrays."),
        ("d.npy", b"\x93NUMPY", "d.npy cannot be read as a NumPy file"),
        ("d.xml", "<a/>", "files called *.xml cannot be read; give a CSV"),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        load(path)


def test_folders_that_hold_nothing_to_learn_from(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no data: no table"):
        load(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    with pytest.raises(ValueError, match="has no column of labels"):
        load(tmp_path)
    (tmp_path / "b.txt").write_text("x")


def test_several_arrays_in_a_file_called_npy_are_named(tmp_path):
    with (tmp_path / "x.npy").open("wb") as file:
        np.savez(file, x=POINTS, y=np.array(LABELS))
    with pytest.raises(ValueError, match=r"x\.npy holds several arrays; call it x\.npz\."):
        load(tmp_path)


def test_files_of_other_sizes_are_named(tmp_path):
    folder = write_image_folder(tmp_path)
    np.save(folder / "train" / "cat" / "89.npy", IMAGES[0][:3])
    with pytest.raises(
        ValueError, match=r"89\.npy has shape \(3, 5\), .* has \(6, 5\); give an im"
    ):
        load(folder)


class Split(dict):
    """A `datasets.Dataset`: columns and what they mean."""

    features = types.MappingProxyType({"label": types.SimpleNamespace(names=["no", "yes"])})
    column_names = property(list)


def fake_datasets(monkeypatch, splits):
    module = types.SimpleNamespace(
        load_from_disk=lambda path: splits, load_dataset=lambda name, config, split: splits
    )
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_data_sets_of_the_hub_keep_their_classes(monkeypatch, tmp_path):
    train = Split(sentence=TEXTS, idx=list(range(90)), label=[1, 0] * 45)
    splits = {"train": train, "validation": train}
    fake_datasets(monkeypatch, splits)
    (tmp_path / "dataset_dict.json").write_text("{}")
    for source in ("owner/name:config", tmp_path):
        data = load(source)
        assert data.classes == ("no", "yes") and data.kind == "text"
        assert len(data.splits["validation"].examples["label"]) == 90
    splits["test"] = Split(train, label=[-1] * 90)  # as the hub hides labels
    with pytest.raises(ValueError, match=r"row 1, column 'label': the label -1 is not one of"):
        load("name")


def test_names_need_a_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="no file or folder 'nothing'; data sets of the Hugging"):
        load("nothing")
    with pytest.raises(FileNotFoundError, match=r"nothing\.csv: there is no such file or folder"):
        load("nothing.csv")


def test_the_task_follows_the_data(tmp_path):
    data = load(write_npz(tmp_path))
    task = tasks.task_for(data)
    examples = data.splits["test"].examples
    inputs, targets, _ = task.prepare(examples)
    np.testing.assert_array_equal(inputs, examples["features"])
    with pytest.raises(ValueError, match=r"row 0 is 3; labels of 3 classes are in 0\.\.2"):
        task.check({**examples, "label": np.full_like(targets, 3)})


def test_labels_and_weights_are_refused_before_anything_is_compiled():
    task = tasks.classification(3, inputs="x")

    def splits(**leaves):
        rows = {"x": np.zeros((40, 2), np.float32), "label": np.arange(40, dtype=np.int32) % 3}
        return dict.fromkeys(("train", "validation", "test"), Source({**rows, **leaves}))

    for leaves, message in (
        ({"label": np.arange(40, dtype=np.int32) % 4}, "row 3 is 3; labels of 3 classes"),
        ({"label": np.full(40, -1, np.int32)}, "row 0 is -1; labels"),
        ({"label": np.arange(40) % 3 / 2}, "whole numbers .N., one for each row; got float64"),
        ({"label": np.zeros((40, 1), np.int32)}, r"got int32 of shape \(40, 1\)"),
        ({"weight": np.full(40, np.nan)}, "weight of row 0 is nan; weights must be finite"),
        ({"weight": np.full(40, -2.0)}, r"weight of row 0 is -2\.0"),
        ({"weight": np.ones((40, 2))}, "one for each row"),
    ):
        with pytest.raises(ValueError, match=message):
            deal_out(splits(**leaves), task, num_clients=2, how="iid")
    empty = splits() | {"test": Source({"x": np.zeros((0, 2)), "label": np.zeros(0, np.int32)})}
    with pytest.raises(ValueError, match="The test split is empty; give more data"):
        deal_out(empty, task, num_clients=2, how="iid")


def test_standardised_columns_are_numpys_by_the_training_rows(tmp_path):
    rng = np.random.default_rng(0)
    rows = np.stack([rng.normal(5e4, 1e3, 60), rng.normal(0, 1e-4, 60), np.full(60, 0.1)], 1)
    lines = [f"{a},{b},{c},{'xy'[n % 2]}" for n, (a, b, c) in enumerate(rows)]
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,c,label", *lines]))
    plain = load(tmp_path / "rows.csv")
    data = load(tmp_path / "rows.csv", standardize=True)
    train = plain.splits["train"].examples["features"].astype(np.float64)
    np.testing.assert_allclose(data.scale.mean, train.mean(0), rtol=1e-6)
    for split, source in data.splits.items():
        before = plain.splits[split].examples["features"].astype(np.float64)
        expected = (before - train.mean(0))[:, :2] / train.std(0)[:2]
        np.testing.assert_allclose(source.examples["features"][:, :2], expected, rtol=1e-5)
        assert not source.examples["features"][:, 2].any()  # a constant
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *["ab,x", "cd,y"] * 20]))
    with pytest.raises(ValueError, match="standardize is for columns of numbers; these rows have"):
        load(tmp_path / "texts.csv", standardize=True)
