"""Malformed files and folders: each is refused before any training, in one sentence of our own."""

import gzip
import io
import json
import pickle
import shutil
import struct

import jax
import numpy as np
import pytest
from refusals import check_refused, no_training
from safetensors.numpy import load_file, save_file

from jaxfm import hub
from jaxfm.testing import tiny_decoder
from jaxfm.tokenizer import ByteTokenizer

TABLE = "a,b,class\n" + "".join(f"{i / 7},{i % 5},{'xyz'[i % 3]}\n" for i in range(60))
ROWS = {"x": np.ones((60, 3)), "y": np.arange(60) % 3}
IMAGES, LABELS = np.zeros((40, 4, 4), np.uint8), (np.arange(40) % 4).astype(np.uint8)
PAIRS = "text,label\n" + "".join(f"{'ab'[i % 2]},{'xy'[i % 2]}\n" for i in range(60))


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def idx(array, code=8):
    return bytes([0, 0, code, array.ndim]) + struct.pack(
        f">{array.ndim}I", *array.shape
    ) + array.tobytes()  # fmt: skip


def write(folder, files):
    """Writes text or bytes by name; None makes a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def rows(**last):
    """JSON rows, with changes of the last."""
    some = [{"a": i, "label": "xy"[i % 2]} for i in range(40)]
    return [*some[:-1], some[-1] | last]


# A file that is given as --data.source, its content, and what the answer says beside its name.
SOURCES = [
    ("empty.csv", "", "empty"),
    ("header.csv", "a,b,class\n", "no rows"),
    ("blank.csv", " \n \n", "no column"),
    ("ragged.csv", TABLE + "1,2\n", "row 61"),
    ("open.csv", TABLE + '"abc', "row 61"),
    ("binary.csv", bytes(range(128, 256)) * 9, "not utf-8"),
    ("latin.csv", TABLE.replace("x", "é").encode("latin-1"), "byte"),
    ("missing.csv", TABLE.replace(",x\n", ",\n"), "row 1"),
    ("one.csv", TABLE.replace("y", "x").replace("z", "x"), "only the label x"),
    ("names.csv", "a,class\n" + "".join(f"{i},n{i}\n" for i in range(60)), "60 different"),
    ("word.csv", TABLE.replace("0.0,0,x", "oops,0,x"), "'oops'"),
    ("nan.csv", TABLE.replace("0.0,0,x", "nan,0,x"), "nan"),
    ("large.csv", TABLE.replace("0.0,0,x", "1e300,0,x"), "1e300"),
    ("double.csv", TABLE.replace("a,b,", "a,a,"), "['a']"),
    ("only.csv", "class\n" + "x\ny\n" * 30, "'class'"),
    ("few.csv", "\n".join(TABLE.split("\n")[:12]), "11 training rows"),
    ("other.csv", TABLE.replace("class", "foo"), "'foo'"),
    ("cut.json", '[{"a": 1, "label": "x"}, {"a"', "not JSON"),
    ("number.json", "5", "int"),
    ("null.json", "null", "NoneType"),
    ("list.json", "[1, 2, 3]", "row 1"),
    ("uneven.json", '{"a": [1, 2], "label": ["x"]}', "equally long"),
    ("none.json", "[]", "no rows"),
    ("deep.json", "[" * 100_000, "deep"),
    ("nan.json", json.dumps(rows(a=float("nan"))), "row 40"),
    ("mixed.json", json.dumps(rows(a=[1, 2])), "row 40"),
    ("utf16.json", b"\xff\xfe[\x00", "byte 0"),
    ("cut.jsonl", '{"a": 1, "label": "x"}\n{"a": 2', "line 2"),
    ("lists.jsonl", "[1]\n[2]\n", "row 1"),
    ("blank.jsonl", "\n\n", "no rows"),
    ("empty.parquet", "", "empty"),
    ("words.parquet", "words" * 20, "arquet"),
    ("marks.parquet", b"PAR1" + bytes(50) + b"PAR1", "arquet"),
    ("cut.npz", npz(**ROWS)[:300], "NumPy"),
    ("short.npz", npz(**ROWS)[:-10], "NumPy"),
    ("words.npz", TABLE, "NumPy"),
    ("empty.npz", "", "empty"),
    ("objects.npz", npz(x=np.array([{}] * 60, object), y=ROWS["y"]), "NumPy"),
    ("nothing.npz", npz(), "no arrays"),
    ("numbers.npz", npz(x=np.float32(1), y=np.float32(2)), "'x'"),
    ("uneven.npz", npz(x=ROWS["x"], y=ROWS["y"][1:]), "59"),
    ("nan.npz", npz(x=np.full((60, 4, 4), np.nan), y=ROWS["y"]), "NaN"),
    ("bright.npz", npz(x=np.full((60, 4, 4), 1e9), y=ROWS["y"]), "1000000000"),
    ("complex.npz", npz(x=ROWS["x"].astype(complex), y=ROWS["y"]), "complex"),
    ("axes.npz", npz(x=np.zeros((60, 3, 3, 3, 3)), y=ROWS["y"]), "(60, 3, 3, 3, 3)"),
    ("parts.npz", npz(x=ROWS["x"], y=np.arange(60) / 7), "0.14"),
    ("narrow.npz", npz(x=ROWS["x"][:, :0], y=ROWS["y"]), "no numbers"),
    ("nobody.npz", npz(x=ROWS["x"][:0], y=ROWS["y"][:0]), "no rows"),
    ("cut.npy", npy(ROWS["x"])[:90], "NumPy"),
    ("header.npy", npy(ROWS["x"]).replace(b"'shape': (60, 3)", b"'shape': (60, (("), "NumPy"),
    ("vector.npy", npy(np.zeros(60)), "(60,)"),
    ("pickle.npy", npy(np.array([{}], object)), "NumPy"),
    ("empty.txt", "", "no rows"),
    ("word.txt", "word", "split is empty"),
    ("pickle.pkl", pickle.dumps(1), "*.pkl"),
    ("name", "a", "folder"),
]


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    no_training(monkeypatch)
    return tmp_path


def check_data(folder, files, words, says, name):
    """Asserts that a federated run on the files is refused, and says a text and a name."""
    write(folder, files)
    command = f"--data.num_clients=2 --cohort_size=2 --data.partition=iid {words}"
    check_refused("federate", command, says)
    check_refused("federate", command, name)


@pytest.mark.parametrize("name, content, says", SOURCES, ids=lambda x: str(x)[:20])
def test_a_malformed_file_of_data_is_refused(tmp_path, name, content, says):
    check_data(tmp_path, {name: content}, f"--data.source={name}", says, name)


FLAGS = [
    ("--data.label=none", "'none'"),
    ("--data.features=none", "'none'"),
    ("--data.features=class", "'x'"),
    ("--data.text=none", "'none'"),
    ("--data.weight=class", "'x'"),
    ("--data.client=none.json", "'none.json'"),
    ("--data.columns=a", "1 expected"),
    ("--data.columns=a,a,b", "['a']"),
    ("--data.encoding=none", "'none'"),
    ("--data.encoding=utf-16", "utf-16"),
    ("--data.label=folder", "folder"),
    ("--data.image_size=8,0", "(8, 0)"),
    ("--data.synthetic=5", "5"),
    ("--data.public=0.999", "0.999"),
    ("--model.family=cnn", "cnn"),
    ("--data.num_clients=60", "60 clients"),
]


@pytest.mark.parametrize("words, says", FLAGS)
def test_a_flag_that_does_not_fit_the_data_is_refused(tmp_path, words, says):
    check_data(tmp_path, {"good.csv": TABLE}, f"--data.source=good.csv {words}", says, says)


CLIENTS = [
    ("cut.json", "{", "not JSON"),
    ("row.json", '{"a": [999]}', "row 999"),
    ("twice.json", '{"a": [0], "b": [0]}', "Row 0"),
    ("few.json", "[1, 2]", "2 clients"),
    ("word.json", '{"a": ["x"]}', "row 'x'"),
    ("number.json", "7", "7"),
    ("binary.json", b"\xff\xfe", "not JSON"),
    ("files.json", '{"f.png": "a"}', "names no files"),
    ("table.csv", "x,y\n1,2\n", "'client'"),
]


@pytest.mark.parametrize("name, content, says", CLIENTS, ids=lambda x: str(x)[:20])
def test_a_malformed_file_of_clients_is_refused(tmp_path, name, content, says):
    words = f"--data.source=good.csv --data.client={name}"
    check_data(tmp_path, {"good.csv": TABLE, name: content}, words, says, name)


def images(**changes):
    """Folders of images by class, one a file."""
    files = {f"{'ab'[i % 2]}/{i}.npy": npy(IMAGES[0]) for i in range(30)}
    return {f"images/{name}": x for name, x in (files | changes).items()}


def mnist(**changes):
    """The four files of MNIST."""
    files = {
        "train-images-idx3-ubyte": idx(IMAGES), "train-labels-idx1-ubyte": idx(LABELS),
        "t10k-images-idx3-ubyte": idx(IMAGES), "t10k-labels-idx1-ubyte": idx(LABELS),
    }  # fmt: skip
    files |= {name.replace("_", "-"): x for name, x in changes.items()}
    return {f"mnist/{name}": x for name, x in files.items()}


FOLDERS = [
    ({"none": None}, "--data.source=none", "no data"),
    ({"none": None}, "--data=text --data.folder=none", "none"),
    ({"a.txt": "x"}, "--data=text --data.folder=a.txt", "not a folder"),
    ({f"texts/{i}.txt": "hi" for i in range(3)}, "--data.source=texts", "texts"),
    (images(**{"b/7.npy": b"no image"}), "--data.source=images", "b/7.npy"),
    (images(**{"b/7.npy": b""}), "--data.source=images", "b/7.npy"),
    (images(**{"b/7.npy": npy(IMAGES[0, :3])}), "--data.source=images", "(3, 4)"),
    ({f"one/a/{i}.npy": npy(IMAGES[0]) for i in range(30)}, "--data.source=one", "label a"),
    ({f"flat/x{i}.npy": npy(IMAGES[0]) for i in range(30)}, "--data.source=flat", "flat"),
    (mnist(train_images_idx3_ubyte=idx(IMAGES)[:-5]), "--data=mnist --data.folder=mnist", "651"),
    (mnist(train_images_idx3_ubyte=b"abcd"), "--data=mnist --data.folder=mnist", "61 62 63"),
    (mnist(train_images_idx3_ubyte=b""), "--data=mnist --data.folder=mnist", "IDX"),
    (mnist(train_images_idx3_ubyte=b"\0\0\x08\xff"), "--data=mnist --data.folder=mnist", "cut"),
    (mnist(train_labels_idx1_ubyte=idx(LABELS[1:])), "--data=mnist --data.folder=mnist", "(39,)"),
    (mnist(train_images_idx3_ubyte=gzip.compress(idx(IMAGES), mtime=0)[:-9]),
     "--data=mnist --data.folder=mnist", "damaged"),
    ({"none": None}, "--data=mnist --data.folder=none", "train-images"),
    ({"none": None}, "--data=cifar10 --data.folder=none", "data_batch_1"),
    ({"c.npz": npz(**ROWS)[:300]}, "--data=cifar10 --data.folder=c.npz", "NumPy"),
    ({"c.npz": npz(**ROWS)}, "--data=cifar10 --data.folder=c.npz", "train_images"),
    ({"c/data_batch_1.bin": b"x" * 99}, "--data=cifar10 --data.folder=c", "99"),
    ({"c/data_batch_1": pickle.dumps(print)}, "--data=cifar10 --data.folder=c", "print"),
    ({"saved/dataset_dict.json": "words"}, "--data.source=saved", "datasets"),
    ({"p.csv": PAIRS, "t/tokenizer.json": "words"}, "--data.source=p.csv --data.tokenizer=t", "t "),
    ({"p.csv": PAIRS, "t/vocab.txt": ""}, "--data.source=p.csv --data.tokenizer=t", "t "),
    ({"p.csv": PAIRS, "t.json": "["}, "--data.source=p.csv --data.tokenizer=t.json", "t.json"),
    ({"p.csv": PAIRS, "t": None}, "--data.source=p.csv --data.tokenizer=t", "tokenizer.json"),
    ({"p.csv": PAIRS}, "--data.source=p.csv --data.length=1", "length=1"),
    ({"p.csv": PAIRS}, "--data.source=p.csv --model.num_heads=3", "num_heads=3"),
]  # fmt: skip


@pytest.mark.parametrize("files, words, says", FOLDERS, ids=lambda x: str(x)[:40])
def test_a_malformed_folder_of_data_is_refused(tmp_path, files, words, says):
    check_data(tmp_path, files, words, says, says)


def config(**changes):
    return {"config.json": lambda folder: json.dumps(
        json.loads((folder / "config.json").read_text()) | changes
    )}  # fmt: skip


def weights(**changes):
    """The tensors of the model with changes; None leaves one out."""

    def made(folder):
        tensors = load_file(folder / "model.safetensors") | changes
        save_file({k: x for k, x in tensors.items() if x is not None}, folder / "new")
        return (folder / "new").read_bytes()

    return {"model.safetensors": made}


def cut(length):
    whole = lambda folder: (folder / "model.safetensors").read_bytes()
    return {"model.safetensors": lambda folder: whole(folder)[:length]}


def index(text):
    return {"model.safetensors": None, "model.safetensors.index.json": text}


NORM = "model.norm.weight"
MODELS = [
    ({"config.json": None}, "config.json"),
    ({"config.json": ""}, "config.json"),
    ({"config.json": '{"a": '}, "config.json"),
    ({"config.json": "[]"}, "config.json"),
    ({"config.json": b"\xff\xfe"}, "config.json"),
    ({"config.json": "[" * 100_000}, "config.json"),
    ({"config.json": "{}"}, "'unknown'"),
    (config(architectures=["Foo"]), "'Foo'"),
    (config(architectures="LlamaForCausalLM"), "'LlamaForCausalLM'"),
    (config(hidden_size=-16), "-16"),
    (config(hidden_size="16"), "config.json"),
    (config(hidden_size=None), "config.json"),
    (config(num_attention_heads=0), "config.json"),
    (config(num_key_value_heads=3), "num_kv_heads=3"),
    (config(num_hidden_layers=3), "layers.2"),
    (config(num_hidden_layers=0), "num_layers"),
    (config(vocab_size=100), "(100, 16)"),
    (config(hidden_act="foo"), "'foo'"),
    (config(rope_scaling={"rope_type": "foo", "factor": 2.0}), "'foo'"),
    (config(rope_scaling={"rope_type": "linear", "factor": "x"}), "'x'"),
    (config(rope_scaling=5), "config.json"),
    (config(quantization_config={"bits": 4}), "quantization_config"),
    (config(max_position_embeddings=-5), "-5"),
    (config(eos_token_id=99_999), "99999"),
    ({"model.safetensors": None}, "model.safetensors"),
    ({"model.safetensors": ""}, "model.safetensors"),
    ({"model.safetensors": "words" * 50}, "model.safetensors"),
    (cut(20), "model.safetensors"),
    (cut(9000), "model.safetensors"),
    (weights(**{NORM: None}), NORM),
    (weights(**{NORM: np.zeros(3, np.float32)}), "(3,)"),
    (weights(**{NORM: np.zeros(16, np.int8)}), "I8"),
    (weights(**{"foo.weight": np.zeros(3, np.float32)}), "foo.weight"),
    (index("{"), "index.json"),
    (index('{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors"),
    (index('{"weight_map": {"a": 5}}'), "index.json"),
    (index("[]"), "index.json"),
    ({"tokenizer.json": None, "tokenizer_config.json": None}, "tokenizer.json"),
    ({"tokenizer.json": "words"}, "tokenizer"),
    ({"tokenizer.json": "{}"}, "tokenizer"),
    ({"tokenizer_config.json": "{"}, "tokenizer"),
    ({"generation_config.json": "{"}, "generation_config.json"),
    ({"generation_config.json": '{"eos_token_id": "x"}'}, "'x'"),
    ({"generation_config.json": '{"eos_token_id": [-1]}'}, "-1"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "good"
    made = tiny_decoder(vocab_size=260)
    hub.save(made, made.init(jax.random.key(0)), folder, tokenizer=ByteTokenizer())
    return folder


@pytest.mark.parametrize("files, says", MODELS, ids=lambda x: str(x)[:40])
def test_a_malformed_folder_of_a_model_is_refused(tmp_path, model, files, says):
    shutil.copytree(model, tmp_path / "bad")
    for name, content in files.items():
        if content is None:
            (tmp_path / "bad" / name).unlink()
        else:
            text = content(model) if callable(content) else content
            write(tmp_path / "bad", {name: text})
    check_refused("generate", "--model=bad --prompt=a --max_new_tokens=2", says)


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors", "w.pth"])
def test_malformed_weights_and_policies_are_refused(tmp_path, name):
    write(tmp_path, {name: "words"})
    check_refused("search", f"--weights={name} --model=resnet20", name)
    check_refused("search", f"--policy={name}", name)


def test_a_prompt_that_is_no_text_is_refused(tmp_path, model):
    write(tmp_path, {"p.txt": b"\xff\xfe"})
    check_refused("generate", f"--model={model} --prompt_file=p.txt", "p.txt")


RUN_FILES = [
    ("metrics.jsonl", "words\n"),
    ("metrics.jsonl", b"\xff\xfe\n"),
    ("metrics.jsonl", '{"step": "x"}\n'),
    ("metrics.jsonl", '{"step": 1, "loss": "low"}\n'),
    ("metrics.jsonl", '{"step": 1, "loss": [1]}\n'),
    ("config.json", "{"),
    ("config.json", "[]"),
    ("results.json", '{"a": '),
    ("results.json", '{"federate": 5}'),
]


@pytest.mark.parametrize("name, content", RUN_FILES, ids=lambda x: str(x)[:30])
def test_a_damaged_run_folder_is_refused(tmp_path, name, content):
    write(tmp_path, {"run/config.json": "{}", "run/results.json": "{}", f"run/{name}": content})
    check_refused("report", "--run_dir=run", name)
