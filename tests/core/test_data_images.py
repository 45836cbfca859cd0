"""Laws of the image sources: what was written is read, what is damaged is named."""

import gzip
import pickle
import struct
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.data.arrays import digits, npz
from jaxfm.data.augment import image_transform, pad_crop_flip
from jaxfm.data.cifar import cifar10, cifar100, read_binary, read_python
from jaxfm.data.hub_datasets import huggingface, huggingface_documents
from jaxfm.data.idx import mnist, read_idx
from jaxfm.data.noise import smooth_noise
from jaxfm.data.source import Source, checked

RNG = np.random.default_rng(0)
CODES = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}


def idx_bytes(array: np.ndarray, code: str = "u1") -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, CODES[code], array.ndim, *array.shape)
    return header + array.astype(code).tobytes()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_reads_back_what_was_written(tmp_path: Path, code, zipped):
    array = np.arange(24).reshape(2, 3, 4).astype(code)
    data = idx_bytes(array, code)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(data) if zipped else data)
    read = read_idx(path)
    np.testing.assert_array_equal(read, array)
    assert read.dtype.isnative


def test_damaged_idx_files_are_named_with_sizes(tmp_path: Path):
    path = tmp_path / "digits-idx"
    data = idx_bytes(np.zeros((4, 5)))

    def error(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="digits-idx") as caught:
            read_idx(path)
        return str(caught.value)

    assert "should have 32 bytes for shape (4, 5) of uint8; 31 found" in error(data[:-1])
    assert "32 bytes for shape (4, 5) of uint8; 33 found" in error(data + b"x")
    assert "a header of 12 bytes expected, 7 found" in error(data[:7])
    assert "is not an IDX file" in error(b"GIF89a")
    assert "is not an IDX file" in error(b"")
    whole = gzip.compress(data)
    assert f"is damaged ({len(whole) - 9} bytes found)" in error(whole[:-9])


def write_mnist(folder: Path, num_train: int = 6, num_test: int = 3) -> dict[str, np.ndarray]:
    written = {}
    for split, prefix, size in (("train", "train", num_train), ("test", "t10k", num_test)):
        images = RNG.integers(0, 256, (size, 28, 28))
        labels = RNG.integers(0, 10, size)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        zipped = gzip.compress(idx_bytes(labels))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(zipped)
        # QMNIST's test part goes on after MNIST's.
        table = np.zeros((size + 2 * (split == "test"), 8), int)
        table[:size, 0] = labels
        table[:, 2] = 100 + np.arange(len(table)) // 2
        (folder / f"qmnist-{split}-labels-idx2-int").write_bytes(idx_bytes(table, ">i4"))
        written[split] = labels
    return written


def test_mnist_with_writers(tmp_path: Path):
    labels = write_mnist(tmp_path)
    splits = mnist(tmp_path, writers=tmp_path)
    train, test = splits["train"], splits["test"]
    assert train.examples["image"].shape == (6, 28, 28, 1)
    np.testing.assert_array_equal(test.examples["label"], labels["test"])
    assert train.client.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.clients == ("100", "101", "102")
    assert test.client.tolist() == [0, 0, 1]
    assert mnist(tmp_path)["train"].client is None


def test_mnist_files_that_do_not_fit_are_named(tmp_path: Path):
    write_mnist(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_mnist(other, num_train=7)
    with pytest.raises(ValueError, match="not the writers of this data set"):
        mnist(tmp_path, writers=other)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((5, 28, 28))))
    with pytest.raises(ValueError, match=r"train-images.*\(5, 28, 28\).*\(6,\) do not fit"):
        mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    write = tmp_path / "train-images-idx3-ubyte"
    write.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte nor .*\.gz exists"):
        mnist(tmp_path)


def cifar_rows(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images = RNG.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
    labels = RNG.integers(0, 10, size).astype(np.uint8)
    return images, images.transpose(0, 3, 1, 2).reshape(size, 3072), labels


@pytest.mark.parametrize("binary", [False, True])
def test_cifar10_reads_both_published_forms(tmp_path: Path, binary):
    images, pixels, labels = cifar_rows(12)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        rows = slice(2 * number, 2 * number + 2)
        if binary:
            records = np.concatenate([labels[rows, None], pixels[rows]], axis=1)
            (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
        else:
            batch = {
                b"data": pixels[rows],
                b"labels": labels[rows].tolist(),
                b"batch_label": b"one of 5",
            }
            (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    splits = cifar10(tmp_path)
    np.testing.assert_array_equal(splits["train"].examples["image"], images[:10])
    np.testing.assert_array_equal(splits["test"].examples["image"], images[10:])
    np.testing.assert_array_equal(splits["train"].examples["label"], labels[:10])
    assert splits["train"].classes[9] == "truck"


def test_cifar100_takes_the_fine_labels(tmp_path: Path):
    images, pixels, labels = cifar_rows(4)
    coarse = np.full_like(labels, 3)
    records = np.concatenate([coarse[:, None], labels[:, None], pixels], axis=1)
    (tmp_path / "train.bin").write_bytes(records.tobytes())
    batch = {"data": pixels, "fine_labels": labels.tolist(), "coarse_labels": coarse.tolist()}
    (tmp_path / "test").write_bytes(pickle.dumps(batch))
    for source in cifar100(tmp_path).values():
        np.testing.assert_array_equal(source.examples["label"], labels)
        np.testing.assert_array_equal(source.examples["image"], images)


def test_python_2_pickles_are_read(tmp_path: Path):
    # As Python 2 wrote them: byte strings for keys and for the array's content.
    pixels = np.zeros((1, 3072), np.uint8)
    batch = pickle.dumps({b"data": pixels, b"labels": [7]}, protocol=2)
    old = batch.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "batch").write_bytes(old)
    assert old != batch
    read, labels = read_python(tmp_path / "batch")
    np.testing.assert_array_equal(read, pixels)
    assert labels.tolist() == [7]


def test_pickles_that_would_run_code_are_refused(tmp_path: Path):
    class Attack:
        def __reduce__(self):
            return (Path(tmp_path / "owned").touch, ())

    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": Attack(), "labels": []}))
    with pytest.raises(ValueError, match=r"data_batch_1.*which is not an array"):
        read_python(path)
    assert not (tmp_path / "owned").exists()


def test_damaged_cifar_files_are_named_with_sizes(tmp_path: Path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"\0" * 3000)
    with pytest.raises(
        ValueError, match=r"data_batch_1 should have a multiple of 3073 bytes.*3000 found"
    ):
        read_binary(path)
    path.write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8)})[:500])
    with pytest.raises(ValueError, match=r"data_batch_1 \(500 bytes found\) cannot be read"):
        read_python(path)
    path.write_bytes(pickle.dumps({"data": np.zeros((2, 9), np.uint8), "labels": [0, 1]}))
    with pytest.raises(ValueError, match=r"shape \(2, 3072\); found uint8 \(2, 9\)"):
        read_python(path)
    path.write_bytes(pickle.dumps({"names": []}))
    with pytest.raises(ValueError, match=r"'data' and 'labels'; found \['names'\]"):
        read_python(path)
    with pytest.raises(FileNotFoundError, match=r"data_batch_2 nor data_batch_2\.bin exists"):
        np.zeros(3073, np.uint8).tofile(tmp_path / "data_batch_1.bin")
        cifar10(tmp_path)


def test_npz_takes_leaves_by_name_and_narrows_numbers(tmp_path: Path):
    path = tmp_path / "file.npz"
    np.savez(path, x=np.ones((3, 2)), y=np.array([1, 2, 3]), who=np.array(["b", "a", "b"]))
    source = npz(path, {"image": "x", "label": "y", "client": "who"})
    assert source.examples["image"].dtype == np.float32
    assert source.examples["label"].dtype == np.int32
    assert (source.clients, source.client.tolist()) == (("a", "b"), [1, 0, 1])
    assert sorted(npz(path, {"a": "x", "b": "y"}).examples) == ["a", "b"]


def test_npz_that_cannot_serve_is_named(tmp_path: Path):
    path = tmp_path / "file.npz"
    np.savez(path, x=np.ones((3, 2)), y=np.array([1, 2**40]), z=np.array([{}], object))
    with pytest.raises(ValueError, match=r"file\.npz.*no \['w'\]; found \['x', 'y', 'z'\]"):
        npz(path, {"image": "w"})
    with pytest.raises(ValueError, match=r"file\.npz.*label holds 1\.\.1099511627776"):
        npz(path, {"label": "y"})
    with pytest.raises(ValueError, match=r"file\.npz.*allow_pickle"):
        npz(path, {"label": "z"})
    np.savez(path, x=np.ones((3, 2)), y=np.ones(2))
    with pytest.raises(ValueError, match=r"file\.npz: Every leaf must have the same leading size"):
        npz(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"file\.npz \(100 bytes found\)"):
        npz(path)
    with pytest.raises(FileNotFoundError, match=r"none\.npz does not exist"):
        npz(tmp_path / "none.npz")


def test_digits_split_once_and_apart():
    splits = digits()
    assert [len(source.examples["label"]) for source in splits.values()] == [1297, 250, 250]
    images = np.concatenate([source.examples["image"] for source in splits.values()])
    assert images.shape == (1797, 8, 8, 1)
    assert (images.min(), images.max()) == (0, 1)
    np.testing.assert_array_equal(digits()["test"].examples["image"], images[-250:])


def test_labels_outside_the_classes_are_found():
    source = Source({"label": np.array([0, 3])}, classes=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"here: labels must be in 0\.\.2; found 0\.\.3"):
        checked(source, "here")


class FakeDataset:
    column_names = ("img", "label", "user", "text")
    features = {"label": types.SimpleNamespace(names=["no", "yes"])}  # noqa: RUF012
    rows = {  # noqa: RUF012
        "img": [np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)],
        "label": [1, 0],
        "user": ["u2", "u1"],
        "text": ["one", "two"],
    }

    def __getitem__(self, column):
        return self.rows[column]

    def __len__(self):
        return 2


@pytest.fixture
def fake_datasets(monkeypatch):
    def load_dataset(name, config, *, split):
        if name != "known":
            raise ConnectionError("no network")
        return FakeDataset()

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.usefixtures("fake_datasets")
def test_hub_columns_become_leaves_and_owners():
    source = huggingface("known", columns={"image": "img", "label": "label"}, client="user")
    assert source.examples["image"].shape == (2, 4, 4, 1)
    assert source.examples["label"].dtype == np.int32
    assert source.clients == ("u1", "u2")
    assert source.client.tolist() == [1, 0]
    assert source.classes == ("no", "yes")
    documents = huggingface_documents("known", client="user")
    assert [(document.client, document.text) for document in documents] == [
        ("u2", "one"),
        ("u1", "two"),
    ]


@pytest.mark.usefixtures("fake_datasets")
def test_hub_errors_name_what_was_asked_for():
    with pytest.raises(ValueError, match=r"Cannot load data set 'other' .*no network"):
        huggingface("other", columns={"label": "label"})
    with pytest.raises(ValueError, match=r"known has no column \['age'\]; it has"):
        huggingface("known", columns={"label": "age"})
    with pytest.raises(ValueError, match=r"column 'text' holds .*not numbers or images"):
        huggingface("known", columns={"tokens": "text"})


def test_a_missing_datasets_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxfm\[data\]'"):
        huggingface("known", columns={"label": "label"})


def test_cropping_shifts_and_flipping_mirrors():
    image = jnp.arange(64, dtype=jnp.uint8).reshape(8, 8, 1)
    images = jnp.broadcast_to(image, (32, 8, 8, 1))
    moved = pad_crop_flip(images, jax.random.key(0), pad=2)
    assert moved.dtype == jnp.uint8
    padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)), mode="reflect")
    windows = [padded[y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    allowed = {window.tobytes() for window in windows}
    allowed |= {np.ascontiguousarray(window[:, ::-1]).tobytes() for window in windows}
    found = {np.asarray(image).tobytes() for image in moved}
    assert found <= allowed
    assert len(found) > 10
    with pytest.raises(ValueError, match="8 x 8 are too small to reflect 8 pixels"):
        pad_crop_flip(images, jax.random.key(0), pad=8)


def test_a_transform_augments_only_with_a_key():
    images = jnp.arange(2 * 64 * 3, dtype=jnp.uint8).reshape(2, 8, 8, 3)
    transform = image_transform(mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1], pad=2, flip=True)
    expected = (np.asarray(images) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.2, 0.1]
    np.testing.assert_allclose(transform(images, None), expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(transform(images, jax.random.key(1)), expected)
    with pytest.raises(ValueError, match="both of mean and std or neither"):
        image_transform(mean=[0.5])


def test_smooth_noise_is_blobs_on_zeros():
    noise = smooth_noise(20, (9, 8, 3), dtype=np.uint8, high=255)
    assert noise.shape == (20, 9, 8, 3) and noise.dtype == np.uint8
    assert ((noise == 0) | (noise >= 127)).all() and 0.2 < (noise == 0).mean() < 0.8
    np.testing.assert_array_equal(noise, smooth_noise(20, (9, 8, 3), dtype=np.uint8, high=255))
    with pytest.raises(ValueError, match="at least one image of 2x2"):
        smooth_noise(1, (1, 8, 3))
