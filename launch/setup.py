"""What the scripts share: data and model from typed configs."""

from __future__ import annotations

import dataclasses
import difflib
import math
import pathlib
from typing import Any, Literal, get_args

from jaxfm import hub, tasks
from jaxfm.config import check, check_whole, option
from jaxfm.data.cifar import cifar10
from jaxfm.data.dealing import Data, Dealing, deal_out, with_validation
from jaxfm.data.idx import mnist
from jaxfm.data.loading import BUILT_IN, DataSet, kind_of, load
from jaxfm.data.scaling import Scale, load_scale
from jaxfm.data.standard_library import stdlib
from jaxfm.data.text import corpus, read_folder
from jaxfm.errors import naming
from jaxfm.model import Model
from jaxfm.models import DecoderConfig, EncoderConfig, decoder, encoder
from jaxfm.models.by_name import ImageFamily, image_classifier, small_clip
from jaxfm.plain_types import suggest
from jaxfm.run_folder import save_results
from jaxfm.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, padding_id

_ENCODING = "utf-8-sig"
_IN_FOLDER = ("text", "mnist", "cifar10")  # read from --data.folder


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learned from, and which client holds which rows."""

    source: str = option(
        "stdlib",
        "a file (CSV, TSV, JSON, JSONL, Parquet, npz, txt), a folder (of these, of images by "
        "class, of texts) or a name on the Hugging Face hub; stdlib: the running Python's own "
        "source; digits, captioned_digits: scikit-learn's; text, mnist, cifar10 with --data.folder",
    )
    folder: str = option("", "source=text, mnist, cifar10: path of the data")
    label: str = option(
        "",
        "column of the class, or of lists of tags; folder: texts lie in one folder for each class",
    )
    text: tuple[str, ...] = option(
        (), "column of the text, or several that are joined; or one of lists of words, to be tagged"
    )
    image: str = option("", "column of the image, or of its path")
    features: tuple[str, ...] = option((), "columns of numbers; the default is all of them")
    client: str = option("", "column of the owners, or a JSON or CSV file that names them")
    weight: str = option("", "column of the weights of rows")
    columns: tuple[str, ...] = option((), "names of the columns of a CSV file without a header")
    encoding: str = option(_ENCODING, "of text files")
    image_size: tuple[int, ...] = option((), "height and width that image files are scaled to")
    writers: str = option("", "mnist only: folder of QMNIST's labels, whose writers are clients")
    tokenizer: str = option(
        "auto",
        "text only: bytes, or a folder with a Hugging Face tokenizer; auto means that of the "
        "--model that is a folder, else bytes",
    )
    masked: bool = option(
        False, "text without labels only: learn to recover hidden tokens, by an encoder"
    )
    length: int = option(128, "text only: tokens of a row, at most where it is classified")
    standardize: bool = option(
        False,
        "columns of numbers only: mean 0 and deviation 1 in the training rows; a --model that is a "
        "folder has the scale that it was trained with",
    )
    partition: Dealing = option(
        "auto",
        "how examples are dealt to clients; natural means by package (stdlib), sub-folder (text), "
        "writer (mnist) or --data.client; auto means natural where rows have owners, dirichlet "
        "where they have labels, iid elsewhere",
    )
    beta: float = option(
        0.5, "concentration (often called alpha) of dirichlet (by label) and quantity (by size)"
    )
    shards_per_client: int = option(2, "of the shards partition")
    num_clients: int = option(24, "number of clients; of a natural partition the largest")
    local_test: float = option(0.1, "share of each client's rows held out as its local test set")
    local_validation: float = option(
        0.0,
        "share of the rest held out to validate clients' own models; 0 means they are only tested, "
        "at the end",
    )
    public: float = option(
        0.0, "share of the training rows that the server gets, unlabelled, for distillation"
    )
    synthetic: int = option(
        0, "images only: number of public images of smooth noise, for lack of real ones"
    )

    def __post_init__(self):
        check(self)
        if self.source in _IN_FOLDER and not self.folder:
            raise ValueError(f"data.source={self.source} is read from files: give --data.folder.")
        if self.source not in _IN_FOLDER and self.folder:
            raise ValueError(
                f"data.folder={self.folder!r} is read for data.source={', '.join(_IN_FOLDER)} "
                "only; other data are given by their path: --data.source=PATH."
            )
        _check_source(self)
        if self.source == "mnist" and self.partition == "natural" and not self.writers:
            raise ValueError(
                "data.partition=natural: the owners of mnist's images are QMNIST's writers; give "
                "--data.writers."
            )
        least = {"num_clients": 1, "shards_per_client": 1, "length": 1, "synthetic": 0}
        check_whole(self, least, "data.")
        if self.writers and self.source != "mnist":
            raise ValueError(f"data.writers={self.writers!r} is read for data.source=mnist only.")
        if self.shards_per_client != 2 and self.partition != "shards":
            raise ValueError(
                f"data.shards_per_client={self.shards_per_client} changes nothing: give "
                "--data.partition=shards, too."
            )
        if self.beta != 0.5 and self.partition in ("natural", "iid", "shards"):
            raise ValueError(
                f"data.beta={self.beta} changes nothing with data.partition={self.partition}; give "
                "dirichlet or quantity."
            )
        if not 0 < self.beta < math.inf:
            raise ValueError(f"data.beta={self.beta}: give a concentration above 0.")
        if not 0 < self.local_test < 1:
            raise ValueError(f"data.local_test={self.local_test}: give a share between 0 and 1.")
        if self.synthetic and self.public:
            raise ValueError(
                f"data.synthetic={self.synthetic} with data.public={self.public}: give a number of "
                "images, or a share of real ones."
            )
        if self.synthetic and self.source in ("stdlib", "text"):
            raise ValueError(f"data.synthetic makes images; data.source={self.source} is text.")
        for name in ("local_validation", "public"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"data.{name}={getattr(self, name)}: give a share from 0 and below 1."
                )


def _check_source(config: DataConfig) -> None:
    """Refuses options of files for sources that have their own form, and names of nothing."""
    own = (*_IN_FOLDER, *BUILT_IN)
    options = (
        *("label", "text", "image", "features", "client", "weight", "columns", "image_size"),
        "standardize",
    )
    if config.source in own:
        given = {name: getattr(config, name) for name in options}
        given["encoding"] = "" if config.encoding == _ENCODING else config.encoding
        for name, value in given.items():
            if value:
                raise ValueError(
                    f"data.{name}={value!r}: data.source={config.source} has its own form; this "
                    "is for files of yours."
                )
    elif len(config.image_size) not in (0, 2) or min(config.image_size, default=1) < 1:
        raise ValueError(f"data.image_size={config.image_size}: give height and width, as 32,32.")
    elif not pathlib.Path(config.source).exists() and difflib.get_close_matches(config.source, own):
        raise ValueError(
            f"data.source={config.source!r} is not a choice, file or folder. "
            f"{suggest(config.source, own)}"
        )


def load_data(config: DataConfig, seed: int, model: ModelConfig | None = None) -> Data:
    """Reads the data and deals them out; the same seed gives the same clients.

    Args:
      config: of the data.
      seed: of the clients.
      model: whose folder's tokenizer reads text, where the data's config names none, and whose
        folder's scale columns of numbers are brought to.
    Raises:
      FileNotFoundError, ValueError: as of `jaxfm.data.load` and `deal_out`; an option of text for
        data that are none.
    """
    data_set = read_data(config, seed, model)
    with naming(f"data.source={config.source}"):
        return deal_out(
            data_set.splits,
            tasks.task_for(data_set, masked=config.masked),
            num_clients=config.num_clients,
            how=config.partition,
            beta=config.beta,
            shards_per_client=config.shards_per_client,
            local_test=config.local_test,
            local_validation=config.local_validation,
            public=config.public,
            noise=config.synthetic,
            tokenizer=data_set.tokenizer,
            scale=data_set.scale,
            seed=seed,
        )


def read_data(config: DataConfig, seed: int, model: ModelConfig | None = None) -> DataSet:
    """Reads the data, which are not dealt out; arguments and errors as of `load_data`."""
    scale = load_scale(model.folder) if model and model.folder else None
    with naming(config.folder or config.source):
        data_set = _read(config, text_tokenizer(config, model), scale or config.standardize, seed)
    if data_set.tokenizer is None:
        _check_no_text(config)
    return data_set


def text_tokenizer(config: DataConfig, model: ModelConfig | None = None) -> Tokenizer:
    """The tokenizer that reads text: bytes, that of the model's folder, or that of the config."""
    name = "bytes" if config.tokenizer == "auto" else config.tokenizer
    if config.tokenizer == "auto" and model and model.folder and hub.reads_text(model.folder):
        name = model.folder
    return ByteTokenizer() if name == "bytes" else load_tokenizer(name)


def _check_no_text(config: DataConfig) -> None:
    """Refuses options of text for data that have none."""
    for name in ("tokenizer", "length"):
        value = getattr(config, name)
        if value != type(config).__dataclass_fields__[name].default:
            raise ValueError(
                f"data.{name}={value} changes nothing: data.source={config.source} has no text."
            )


def _read(
    config: DataConfig, tokenizer: Tokenizer, standardize: bool | Scale, seed: int
) -> DataSet:
    if config.source in ("mnist", "cifar10"):
        images = (
            mnist(config.folder, writers=config.writers or None)
            if config.source == "mnist"
            else cifar10(config.folder)
        )
        return DataSet(with_validation(images, seed=seed))
    largest = config.num_clients if config.partition in ("auto", "natural") else None
    if config.source == "stdlib":
        splits = stdlib(tokenizer, length=config.length, num_clients=largest)
        return DataSet(splits, tokenizer)
    if config.source == "text":
        documents = read_folder(config.folder)
        splits = corpus(documents, tokenizer, length=config.length, num_clients=largest)
        return DataSet(splits, tokenizer)
    height_width = config.image_size
    return load(
        config.source,
        label=config.label or None,
        text=config.text,
        image=config.image or None,
        features=config.features,
        client=config.client or None,
        weight=config.weight or None,
        columns=config.columns,
        encoding=config.encoding,
        image_size=(height_width[0], height_width[1]) if height_width else None,
        tokenizer=tokenizer,
        length=config.length,
        standardize=standardize,
        seed=seed,
    )


def save_classes(run_dir: pathlib.Path, data: Data) -> None:
    """Writes the classes' names, in the order of logits, into the results."""
    if data.classes:
        save_results(run_dir, "data", {"classes": data.classes})


_SIZES = ("embed_dim", "num_layers", "num_heads", "mlp_dim")
FAMILIES = ("auto", "decoder", "encoder", "clip", *get_args(ImageFamily))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which network; options that a family lacks are ignored."""

    family: str = option(
        "auto",
        f"{', '.join(FAMILIES)}; or a model that is trained further: a folder, or a name on the "
        "Hugging Face hub; its head is replaced where it does not fit the data. auto means decoder "
        "for text, encoder for labelled text, cnn for images, clip for captioned ones and mlp for "
        "other columns; resnet* and vgg* are those for 32x32 images",
    )
    embed_dim: int = option(128, "decoder, encoder, vit, clip: width of the residual stream")
    num_layers: int = option(4, "decoder, encoder, vit: layers")
    num_heads: int = option(4, "decoder, encoder, vit: attention heads")
    mlp_dim: int = option(384, "decoder, encoder, vit: hidden width of each MLP")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of parameters and computation")
    remat: bool = option(False, "recompute layers in the backward pass: less memory, more time")

    def __post_init__(self):
        check(self)
        check_whole(self, dict.fromkeys(("embed_dim", "num_layers", "num_heads", "mlp_dim"), 1))
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}."
            )
        if self.family in FAMILIES:
            return
        if not pathlib.Path(self.family).is_dir() and "/" not in self.family:
            raise ValueError(
                f"model.family={self.family!r} is not a choice, nor a folder. "
                f"{suggest(self.family, FAMILIES)}"
            )
        for name in _SIZES:
            if (value := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"model.{name}={value} changes nothing: the model of a folder has its size."
                )

    @property
    def folder(self) -> str:
        """Returns the folder or hub name that the model comes from; "" for a new one."""
        return "" if self.family in FAMILIES else self.family


_FITTING: dict[str, tuple[str, ...]] = {  # to data of a kind; the first is "auto"
    "language": ("decoder",),
    "masked": ("encoder",),
    "text": ("encoder", "decoder"),
    "tags": ("encoder",),
    "features": ("mlp",),
    "captions": ("clip",),
    "images": ("cnn", *(family for family in get_args(ImageFamily) if family != "cnn")),
}
_KIND_NAMES = {
    "language": "text", "masked": "text with hidden tokens", "text": "labelled text",
    "tags": "tagged words", "features": "columns of numbers", "images": "images",
    "captions": "captioned images",
}  # fmt: skip


def family_of(config: ModelConfig, data: Data) -> str:
    """Returns the family that "auto" stands for; raises ValueError if it does not fit the data."""
    kind = "masked" if data.task.draws else kind_of(data.validation)
    fitting = _FITTING[kind]
    family = fitting[0] if config.family == "auto" else config.family
    if family not in fitting:
        raise ValueError(
            f"model.family={family} does not fit {_KIND_NAMES[kind]}; leave it at auto."
        )
    return family


def make_model(config: ModelConfig, data: Data) -> Model:
    """Returns a model whose inputs and outputs fit the data; raises ValueError if none can.

    The `init` of a folder's model gives its numbers, and draws only what its head lacks.
    """
    if config.folder:
        fitted = hub.load_for(data, config.folder, dtype=config.dtype, remat=config.remat)
        for sentence in fitted.notes:
            print(sentence)
        return hub.pretrained(fitted.model, fitted.variables)
    family = family_of(config, data)
    sizes: dict[str, Any] = {name: getattr(config, name) for name in _SIZES}
    if family in ("decoder", "encoder"):
        return _text_model(family, config, data, sizes)
    if family == "clip":
        sizes |= {"dtype": config.dtype, "remat": config.remat}
        return small_clip(data.validation, data.tokenizer, **sizes)
    leaf = "image" if "image" in data.validation else "features"
    return image_classifier(
        family, data.validation[leaf].shape[1:], len(data.classes), dtype=config.dtype, **sizes
    )


def _text_model(family: str, config: ModelConfig, data: Data, sizes: dict[str, Any]) -> Model:
    assert data.tokenizer is not None
    length = data.validation["tokens"].shape[1]
    text: dict[str, Any] = {
        "vocab_size": data.tokenizer.vocab_size, "dtype": config.dtype, "remat": config.remat,
    }  # fmt: skip
    if data.classes:
        text |= {
            "head": "tag" if kind_of(data.validation) == "tags" else "classify",
            "num_classes": len(data.classes), "pad_id": padding_id(data.tokenizer),
        }  # fmt: skip
    if family == "decoder":
        return decoder(DecoderConfig(max_len=max(2048, length), **sizes, **text))
    return encoder(EncoderConfig(max_len=max(512, length), **sizes, **text))
