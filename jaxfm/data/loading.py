"""One door for data of any kind: a path or a name in, checked arrays by split out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from jaxfm.data import columns as cells
from jaxfm.data.arrays import digits
from jaxfm.data.captions import captioned_digits
from jaxfm.data.cifar import cifar10, cifar100
from jaxfm.data.columns import Roles
from jaxfm.data.dealing import take_rows, with_validation
from jaxfm.data.federation import leading_size
from jaxfm.data.folders import read_path
from jaxfm.data.hub_datasets import open_hub
from jaxfm.data.idx import mnist
from jaxfm.data.owners import Client, owners
from jaxfm.data.scaling import Scale, standardized
from jaxfm.data.source import Source, checked
from jaxfm.data.standard_library import stdlib
from jaxfm.data.tables import Table
from jaxfm.data.tags import holds_words, tagged
from jaxfm.data.text import Document, corpus, token_rows
from jaxfm.errors import naming
from jaxfm.tokenizer import ByteTokenizer, Tokenizer

Kind = Literal["images", "captions", "features", "text", "tags", "language", "other"]
BUILT_IN = ("stdlib", "digits", "captioned_digits")
_HUB_NAME = re.compile(r"[\w-]+(/[\w.-]+)?(:[\w.-]+)?")
SHARE = 0.1  # of rows that validate, and that test, where the data have no such splits


class DataSet(NamedTuple):
    """Data that were loaded; `deal_out` takes its splits and its tokenizer.

    Attributes:
      splits: "train", "validation" and "test", each with the same classes and clients.
      tokenizer: of text; None for anything else.
      scale: by which columns of numbers were standardised; None if they were not.
      roles: what the columns mean; None of data that have none.
    """

    splits: dict[str, Source]
    tokenizer: Tokenizer | None = None
    scale: Scale | None = None
    roles: Roles | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels, in order; none where text is to be continued."""
        return self.splits["train"].classes

    @property
    def kind(self) -> Kind:
        return kind_of(self.splits["train"].examples)


def kind_of(examples: Mapping[str, np.ndarray]) -> Kind:
    """Returns what a model is given.

    "images": leaf "image" [N, H, W, C]; "captions": that and "tokens" i32[N, T]; "features": leaf
    "features" f32[N, D]; "text", to be classified: leaves "tokens" i32[N, T] and "mask"
    bool[N, T]; "tags", whose words are: these and "tags" i32[N, T]; "language", to be continued:
    the leaf "tokens" i32[N, T + 1] alone; "other": none of these.
    """
    if "image" in examples:
        return "captions" if "tokens" in examples else "images"
    if "tags" in examples:
        return "tags"
    if "tokens" in examples:
        return "text" if "mask" in examples else "language"
    return "features" if "features" in examples else "other"


def load(
    path_or_name: str | Path,
    *,
    label: str | None = None,
    text: str | Sequence[str] = (),
    image: str | None = None,
    features: Sequence[str] = (),
    client: Client | None = None,
    weight: str | None = None,
    columns: Sequence[str] = (),
    encoding: str = "utf-8-sig",
    image_size: tuple[int, int] | None = None,
    tokenizer: Tokenizer | None = None,
    length: int = 128,
    standardize: bool | Scale = False,
    classes: Sequence[str] = (),
    draw_splits: bool = True,
    seed: int = 0,
) -> DataSet:
    """Returns data from a file, a folder or the Hugging Face hub, checked and split.

    What lies at the path is recognised: a CSV, TSV, JSON, JSONL, Parquet, npz, npy, conll or txt
    file; a folder of these (also as the hub lays them out, or as `datasets` saved them), of images
    by class, of texts, or of MNIST's or CIFAR's own files. Files or folders called train,
    validation and test are splits; where there is no test or no validation split, a tenth of the
    training rows is drawn for it. Columns are found by name (label, class, target; text; image;
    client; tokens and ner_tags) or by what they hold, and need an option only where that is not
    enough. All columns of numbers that have no other role are the features, but for "id" and
    "index".

    Args:
      path_or_name: a path; "digits", "captioned_digits" or "stdlib"; or a name on the hub,
        "name:config" where it has several configurations.
      label: column of the class; or "folder" where texts lie in one folder for each class; or of
        lists of tags, one for each word.
      text: column of the text, or several, which are joined by line breaks. Without a label the
        text is to be continued, with one it is classified. Or a column of lists of words, which
        are tagged.
      image: column of paths (counted from the file's folder), encoded images or arrays.
      features: columns of numbers.
      client: column of the owners; or a file or a mapping that says whose each row is, see
        `jaxfm.data.owners.owners`.
      weight: column of the rows' weights, 0 or more.
      columns: names for the columns of a CSV or TSV file without a header; without a header and
        without names they are called 0, 1, 2, ...
      encoding: of text files.
      image_size: height and width that image files are scaled to.
      tokenizer: of text; bytes by default.
      length: tokens of a row. Longer texts are cut; rows of labelled texts are as long as the
        longest needs.
      standardize: subtract the mean of each column of numbers and divide by its deviation, both of
        the training rows; a constant column is 0. Or a scale, which is applied.
      classes: the names of the labels, in order, where others have given them; a table whose rows
        have another label is refused. The default is whatever labels there are.
      draw_splits: draw the splits that the data do not have; without it they are missing.
      seed: of the rows that are drawn for splits.
    Raises:
      FileNotFoundError, ValueError: in one sentence that names file, row and column.
      ImportError: a format needs a library that is not installed.
    """
    if not str(path_or_name):
        raise ValueError("The path is empty; give a file, a folder or a name on the hub.")
    tokenizer = tokenizer or ByteTokenizer()
    path = Path(path_or_name)
    if str(path_or_name) in BUILT_IN:
        return _built_in(str(path_or_name), tokenizer, length, seed)
    if known := _known_folder(path):
        return DataSet(with_splits(known, seed=seed))
    given = Roles(
        None if label == "folder" else label,
        (text,) if isinstance(text, str) else tuple(text),
        image, tuple(features), None, weight,
    )  # fmt: skip
    if path.exists():
        table = read_path(path, columns=columns, encoding=encoding, label_folders=label == "folder")
    elif not _HUB_NAME.fullmatch(str(path_or_name)):
        raise FileNotFoundError(f"{path_or_name}: there is no such file or folder.")
    else:
        table = open_hub(str(path_or_name))
    if isinstance(client, str) and client in table.columns:
        given, client = given._replace(client=client), None
    with naming(path):
        roles = cells.find_roles(table, given)
        if roles.text and not roles.label:
            data = _language(table, roles, client, tokenizer, length, SHARE if draw_splits else 0)
        else:
            source = _labelled(table, roles, client, tokenizer, length, image_size, classes)
            parts = _parts(checked(source, table.origin), table)
            splits = with_splits(parts, seed=seed) if draw_splits else parts
            data = DataSet(splits, tokenizer if roles.text else None)
        data = data._replace(roles=roles)
        if standardize is False:
            return data
        own = None if standardize is True else standardize
        splits, scale = standardized(data.splits, own)
        return data._replace(splits=splits, scale=scale)


def _built_in(name: str, tokenizer: Tokenizer, length: int, seed: int) -> DataSet:
    if name == "digits":
        return DataSet(digits(seed=seed))
    if name == "captioned_digits":
        return DataSet(captioned_digits(tokenizer, seed=seed), tokenizer)
    return DataSet(stdlib(tokenizer, length=length), tokenizer)


def _known_folder(path: Path) -> dict[str, Source] | None:
    """Returns a data set that is recognised by its files' names."""
    if any(path.glob("train-images-idx3-ubyte*")):
        return mnist(path)
    if any(path.glob("data_batch_1*")):
        return cifar10(path)
    if (path / "meta").is_file() and (path / "train").is_file():
        return cifar100(path)
    return None


def _labelled(
    table: Table,
    roles: Roles,
    client: Client | None,
    tokenizer: Tokenizer,
    length: int,
    image_size: tuple[int, int] | None,
    known: Sequence[str],
) -> Source:
    if roles.label is None:
        raise ValueError(
            f"{table.origin} has no column of labels; say with label which of "
            f"{', '.join(map(repr, table.columns))} it is."
        )
    examples, classes = _leaves(table, roles, tokenizer, length, image_size, known)
    if roles.weight:
        examples["weight"] = cells.weights(table, roles.weight)
    return Source(examples, *owners(table, roles, client), classes)


def _leaves(
    table: Table, roles: Roles, tokenizer: Tokenizer, length: int,
    image_size: tuple[int, int] | None, known: Sequence[str],
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:  # fmt: skip
    """Returns inputs and labels, and the names of the classes."""
    assert roles.label is not None
    if len(roles.text) == 1 and holds_words(table.columns[roles.text[0]]):
        return tagged(table, roles.text[0], roles.label, tokenizer, length)
    label, classes = cells.labels(table, roles.label, known)
    examples = {"label": label}
    if roles.image:
        examples["image"] = cells.images(table, roles.image, image_size)
    elif roles.text:
        texts = cells.texts(table, roles.text)
        examples["tokens"], examples["mask"] = token_rows(texts, tokenizer, length)
    else:
        examples["features"] = cells.features(table, roles.features)
    return examples, classes


def _parts(source: Source, table: Table) -> dict[str, Source]:
    """Returns the rows of each split that the table's files name; rows of no split train."""
    names = [piece.split or "train" for piece in table.pieces]
    side = np.repeat(names, [piece.size for piece in table.pieces])
    if "train" not in names:
        side[:] = "train"  # a lone test.csv is all there is
    return {str(name): take_rows(source, np.flatnonzero(side == name)) for name in np.unique(side)}


def with_splits(splits: Mapping[str, Source], *, seed: int) -> dict[str, Source]:
    """Returns all three splits; those that are missing are drawn from the training rows.

    Raises:
      ValueError: there are too few rows to draw from.
    """
    splits = dict(splits)
    missing = [name for name in ("test", "validation") if name not in splits]
    size = leading_size(splits["train"].examples)
    if size < 10 * len(missing):
        raise ValueError(
            f"There are only {size} training rows, from which the {' and '.join(missing)} rows "
            f"should be drawn; give {10 * len(missing)}, or these splits."
        )
    if "test" in missing:
        drawn = with_validation(splits | {"test": splits["train"]}, SHARE, seed=seed + 1)
        splits |= {"train": drawn["train"], "test": drawn["validation"]}
    if "validation" in missing:
        splits = with_validation(splits, SHARE, seed=seed)
    return splits


def _language(
    table: Table, roles: Roles, client: Client | None, tokenizer: Tokenizer, length: int,
    held_out: float,
) -> DataSet:  # fmt: skip
    """Returns text to be continued, as rows of tokens; each row of the table is a document."""
    number, names = owners(table, roles, client)
    owner = ["" if number is None or n < 0 else names[n] for n in _each(number, table.size)]
    files = table.columns.get("file")
    documents = []
    for row, content in enumerate(cells.texts(table, roles.text)):
        piece, place = table.piece_of(row)
        name = f"{Path(piece.origin).name}/{place}" if files is None else files[row]
        documents.append(Document(name, owner[row], content, piece.split))
    splits = corpus(documents, tokenizer, length=length, held_out=held_out)
    if number is None:
        splits = {name: part._replace(client=None, clients=()) for name, part in splits.items()}
    return DataSet(splits, tokenizer)


def _each(number: np.ndarray | None, size: int) -> list[int]:
    return [-1] * size if number is None else number.tolist()
