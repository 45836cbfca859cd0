"""What the scripts share: data, model and optimizer from typed configs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import numpy as np
import optax

from jaxfm import config as configs
from jaxfm import tasks
from jaxfm.config import check, option
from jaxfm.data import partition
from jaxfm.data.arrays import digits
from jaxfm.data.cifar import cifar10
from jaxfm.data.federation import Federation, federate, leading_size
from jaxfm.data.idx import mnist
from jaxfm.data.noise import smooth_noise
from jaxfm.data.source import Source
from jaxfm.data.standard_library import stdlib
from jaxfm.data.text import corpus, read_folder
from jaxfm.model import Model
from jaxfm.models import (
    CnnConfig,
    DecoderConfig,
    VitConfig,
    build,
    resnet_config,
    vgg_config,
)
from jaxfm.models.families.cnn import mlp
from jaxfm.tokenizer import ByteTokenizer, Tokenizer, bytes_per_token, load_tokenizer

NUM_CLASSES = 10  # of all the sets of images


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learned, and who holds which part of it."""

    source: Literal["stdlib", "text", "digits", "mnist", "cifar10"] = option(
        "stdlib",
        "stdlib: the running Python's own source code, and digits: scikit-learn's, need no files; "
        "text, mnist and cifar10 are read from --data.folder",
    )
    folder: str = option(
        "", "path of the data's folder, in its standard format; of cifar10 also of an .npz file"
    )
    writers: str = option("", "mnist only: folder of QMNIST's labels, whose writers are clients")
    tokenizer: str = option("bytes", "text only: bytes, or a folder with a Hugging Face tokenizer")
    length: int = option(128, "text only: tokens of a row")
    partition: Literal["auto", "natural", "iid", "dirichlet", "shards", "quantity"] = option(
        "auto",
        "how examples are dealt to clients; natural: by package (stdlib), sub-folder (text), "
        "writer (mnist); auto: natural where there are owners, else dirichlet",
    )
    beta: float = option(
        0.5, "concentration (often called alpha) of dirichlet (by label) and quantity (by size)"
    )
    shards_per_client: int = option(2, "of the shards partition")
    num_clients: int = option(24, "clients; of a natural partition the largest")
    local_test: float = option(0.1, "share of each client's rows held out as its local test set")
    local_validation: float = option(
        0.0, "share of the rest held out to watch clients' own models by; 0: only tested at the end"
    )
    public: float = option(
        0.0, "share of the training rows that the server gets, unlabelled, for distillation"
    )
    synthetic: int = option(0, "images only: smooth noise for public rows, where nobody has any")

    def __post_init__(self):
        check(self)
        if self.source in ("text", "mnist", "cifar10") and not self.folder:
            raise ValueError(f"data.source={self.source} is read from files: give --data.folder.")
        for name in ("num_clients", "shards_per_client", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}: give at least 1.")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"data.beta={self.beta}: give a concentration above 0.")
        if not 0 < self.local_test < 1:
            raise ValueError(f"data.local_test={self.local_test}: give a share between 0 and 1.")
        if self.synthetic < 0 or (self.synthetic and self.public):
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


class Data(NamedTuple):
    """Everything that a run reads.

    Attributes:
      train, local_validation, local_test: of the clients; no local validation rows unless asked.
      validation, test: of the server; selection looks at validation only.
      names: of the clients.
      task: what is learned.
      tokenizer: of text; None for images.
      public: rows that belong to no client, without labels, or noise; None unless asked for.
    """

    train: Federation
    local_validation: Federation | None
    local_test: Federation
    validation: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    names: tuple[str, ...]
    task: tasks.Task
    tokenizer: Tokenizer | None
    public: Mapping[str, np.ndarray] | None


def load_data(config: DataConfig, seed: int) -> Data:
    """Reads and deals out the data; the same seed gives the same clients."""
    tokenizer = None
    if config.source in ("stdlib", "text"):
        tokenizer = (
            ByteTokenizer() if config.tokenizer == "bytes" else load_tokenizer(config.tokenizer)
        )
        splits = _text(config, tokenizer)
        task = tasks.causal_lm(bytes_per_token(tokenizer), tokenizer.pad_id)
    else:
        splits = _images(config, seed)
        task = tasks.classification(NUM_CLASSES)
    train, public = _publish(splits["train"], config.public, seed)
    if config.synthetic:
        like = train.examples["image"]
        high = float(like.max())
        public = {
            "image": smooth_noise(
                config.synthetic, like.shape[1:], dtype=like.dtype, high=high, seed=seed
            )
        }
    parts, names = _deal(config, train, seed)
    parts, held_out = partition.holdout(parts, config.local_test, seed=seed)
    watched = None
    if config.local_validation:
        parts, rows = partition.holdout(parts, config.local_validation, seed=seed + 1)
        watched = federate(train.examples, rows)
    return Data(
        federate(train.examples, parts), watched, federate(train.examples, held_out),
        splits["validation"].examples, splits["test"].examples, names, task, tokenizer, public,
    )  # fmt: skip


def _publish(
    train: Source, share: float, seed: int
) -> tuple[Source, Mapping[str, np.ndarray] | None]:
    """The rows that clients keep, and those that the server gets, without their labels."""
    if not share:
        return train, None
    size = leading_size(train.examples)
    cut = max(1, round(share * size))
    order = np.random.default_rng((seed, 1)).permutation(size)
    public = _rows(train, np.sort(order[:cut])).examples
    public = {name: leaf for name, leaf in public.items() if name != "label"}
    return _rows(train, np.sort(order[cut:])), public


def _text(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Source]:
    largest = config.num_clients if config.partition in ("auto", "natural") else None
    if config.source == "stdlib":
        return stdlib(tokenizer, length=config.length, num_clients=largest)
    documents = read_folder(config.folder)
    return corpus(documents, tokenizer, length=config.length, num_clients=largest)


def _images(config: DataConfig, seed: int) -> dict[str, Source]:
    if config.source == "digits":
        return digits(seed=seed)
    if config.source == "mnist":
        splits = mnist(config.folder, writers=config.writers or None)
    else:
        splits = cifar10(config.folder)
    train = splits["train"]
    # A tenth of the training rows becomes the server's validation set: test rows choose nothing.
    order = np.random.default_rng(seed).permutation(leading_size(train.examples))
    cut = len(order) // 10
    return {
        "train": _rows(train, np.sort(order[cut:])),
        "validation": _rows(train, np.sort(order[:cut])),
        "test": splits["test"],
    }


def _rows(source: Source, rows: np.ndarray) -> Source:
    client = None if source.client is None else source.client[rows]
    return source._replace(
        examples={name: leaf[rows] for name, leaf in source.examples.items()}, client=client
    )


def _deal(config: DataConfig, train: Source, seed: int) -> tuple[list[np.ndarray], tuple[str, ...]]:
    size, clients = leading_size(train.examples), config.num_clients
    numbered = tuple(f"client {i}" for i in range(clients))
    kind = config.partition
    if kind == "auto":
        kind = "dirichlet" if train.client is None else "natural"
    if kind == "natural":
        if train.client is None:
            raise ValueError(
                f"data.partition=natural: {config.source} has no natural owners; choose iid, "
                "dirichlet, shards or quantity (for mnist, --data.writers gives owners)."
            )
        parts = partition.natural(train.client, len(train.clients))
        largest = np.argsort([-len(rows) for rows in parts], kind="stable")[:clients]
        if len(largest) < clients:
            raise ValueError(f"data.num_clients={clients}: there are only {len(parts)} owners.")
        return [parts[i] for i in largest], tuple(train.clients[i] for i in largest)
    if kind == "iid":
        return partition.iid(size, clients, seed=seed), numbered
    if kind == "quantity":
        return partition.quantity(size, clients, beta=config.beta, seed=seed), numbered
    if "label" not in train.examples:
        raise ValueError(
            f"data.partition={kind} deals by label, which {config.source} lacks; "
            "choose natural, iid or quantity."
        )
    labels = train.examples["label"]
    if kind == "dirichlet":
        return partition.dirichlet(labels, clients, beta=config.beta, seed=seed), numbered
    per_client = config.shards_per_client
    return partition.shards(labels, clients, shards_per_client=per_client, seed=seed), numbered


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which network; sizes that a family does not have are not looked at."""

    family: Literal[
        "auto", "decoder", "cnn", "mlp", "vit", "resnet8", "resnet18", "resnet20", "resnet32",
        "resnet34", "resnet44", "resnet56", "resnet110", "vgg11", "vgg16",
    ] = option(
        "auto",
        "auto: decoder for text, cnn for images; resnet* and vgg* as they are for 32x32 images",
    )  # fmt: skip
    embed_dim: int = option(128, "decoder, vit: width of the residual stream")
    num_layers: int = option(4, "decoder, vit: layers")
    num_heads: int = option(4, "decoder, vit: attention heads")
    mlp_dim: int = option(384, "decoder, vit: hidden width of each MLP")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of parameters and computation")
    remat: bool = option(False, "recompute layers in the backward pass: less memory, more time")

    def __post_init__(self):
        check(self)


def width_axes(family: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes that tiers of a width cut; `sizes` are those of all axes of the model."""
    if family in ("decoder", "vit"):
        return ("embed", "mlp", "kv_heads")
    return tuple(sorted(sizes.keys() - {"input", "channel", "class"}))


def family_of(config: ModelConfig, data: Data) -> str:
    """The family that "auto" stands for; raises ValueError where family and data do not fit."""
    text = "tokens" in data.validation
    family = ("decoder" if text else "cnn") if config.family == "auto" else config.family
    if (family == "decoder") != text:
        kind = "text" if text else "images"
        raise ValueError(f"model.family={family} does not fit {kind}; leave it at auto.")
    return family


def make_model(config: ModelConfig, data: Data) -> Model:
    """A model that fits the data; raises ValueError where the family cannot."""
    family = family_of(config, data)
    if family == "decoder":
        assert data.tokenizer is not None
        rows = data.validation["tokens"]
        return build(
            DecoderConfig(
                vocab_size=data.tokenizer.vocab_size, embed_dim=config.embed_dim,
                num_layers=config.num_layers, num_heads=config.num_heads,
                mlp_dim=config.mlp_dim, max_len=max(2048, rows.shape[1]),
                dtype=config.dtype, remat=config.remat,
            )
        )  # fmt: skip
    height, width, channels = data.validation["image"].shape[1:]
    image = {
        "image_size": (height, width), "num_channels": channels, "num_classes": NUM_CLASSES,
        "dtype": config.dtype,
    }  # fmt: skip
    if family == "cnn":
        return build(CnnConfig(**image))
    if family == "mlp":
        return mlp((height * width * channels, 200, NUM_CLASSES))
    if family == "vit":
        return build(
            VitConfig(
                **image, patch_size=max(2, height // 8), embed_dim=config.embed_dim,
                num_layers=config.num_layers, num_heads=config.num_heads, mlp_dim=config.mlp_dim,
            )
        )  # fmt: skip
    kind = family.rstrip("0123456789")
    depth = int(family.removeprefix(kind))
    if kind == "resnet":
        del image["image_size"]  # any will do
        return build(resnet_config(depth, stem="cifar", **image))
    if height != width or height < 32:
        raise ValueError(
            f"model.family={family} halves its images five times: it takes squares of 32x32 or "
            f"more, and these are {height}x{width}. Choose a resnet, or cnn."
        )
    return build(vgg_config(depth, cifar=True, **(image | {"image_size": height})))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters move in local (or central) training."""

    name: Literal["adam", "sgd"] = option("adam", "adam (b2 = 0.95) or sgd")
    learning_rate: float = option(0.0, "of each step; 0: 0.002 for adam, 0.1 for sgd")
    momentum: float = option(0.0, "of sgd")
    clip_norm: float = option(1.0, "largest norm of a gradient")

    def __post_init__(self):
        check(self)
        for name, fits, wanted in (
            ("learning_rate", 0 <= self.learning_rate < math.inf, "one above 0, or 0 for its own"),
            ("momentum", 0 <= self.momentum < 1, "a number from 0 and below 1"),
            ("clip_norm", self.clip_norm > 0, "a norm above 0; inf clips nothing"),
        ):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)}: give {wanted}.")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optax chain of a config."""
    if config.name == "adam":
        step = optax.adam(config.learning_rate or 2e-3, b2=0.95)
    else:
        step = optax.sgd(config.learning_rate or 0.1, config.momentum or None)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), step)


def spread(examples: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """About `count` examples (0: all), spread evenly over all of them."""
    size = leading_size(examples)
    stride = max(1, size // count) if count else 1
    return {name: leaf[::stride] for name, leaf in examples.items()}


def use_cores(most: int) -> None:
    """On a CPU, makes each core a device, up to `most`; to be called before JAX is first used.

    More devices than cores would wait for each other in every collective. Where XLA_FLAGS already
    says how many devices there are, that stands.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", max(1, min(most, os.cpu_count() or 1)))


def open_run(config, run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Makes the run folder and writes its config.json.

    Raises:
      ValueError: the folder holds a run of another config, whose results this one would mix with.
    """
    folder = pathlib.Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    if path.exists():
        old = json.loads(path.read_text())
        new = json.loads(json.dumps(configs.to_dict(config)))
        names = sorted(old.keys() | new.keys())
        changed = [name for name in names if old.get(name) != new.get(name)]
        if set(changed) - {"rounds", "steps", "seeds", "compare"}:  # a longer run goes on
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(changed)} differ); give "
                "another --run_dir, or remove it."
            )
    configs.save(config, path)
    return folder


def save_results(run_dir: pathlib.Path, part: str, values: Mapping) -> None:
    """Puts one part of a run's results into its results.json, in one step."""
    path = run_dir / "results.json"
    known = load_results(run_dir)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(known | {part: values}, indent=2) + "\n")
    temporary.replace(path)


def load_results(run_dir: pathlib.Path) -> dict:
    """The parts of a run's results so far."""
    path = run_dir / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}
