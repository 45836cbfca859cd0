"""What the scripts share: data, model and optimizer from typed configs."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Literal

import jax
import optax

from jaxfm import tasks
from jaxfm.config import check, option
from jaxfm.data.arrays import digits
from jaxfm.data.cifar import cifar10
from jaxfm.data.dealing import Data, Dealing, deal_out, with_validation
from jaxfm.data.idx import mnist
from jaxfm.data.source import Source
from jaxfm.data.standard_library import stdlib
from jaxfm.data.text import corpus, read_folder
from jaxfm.model import Model
from jaxfm.models import DecoderConfig, decoder
from jaxfm.models.by_name import image_classifier
from jaxfm.tokenizer import ByteTokenizer, Tokenizer, bytes_per_token, load_tokenizer

NUM_CLASSES = 10  # of all the sets of images


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learned from, and which client holds which rows."""

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
    partition: Dealing = option(
        "auto",
        "how examples are dealt to clients; natural means by package (stdlib), sub-folder (text) "
        "or writer (mnist); auto means natural where rows have owners, dirichlet elsewhere",
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
        if self.source in ("text", "mnist", "cifar10") and not self.folder:
            raise ValueError(f"data.source={self.source} is read from files: give --data.folder.")
        if self.source == "mnist" and self.partition == "natural" and not self.writers:
            raise ValueError(
                "data.partition=natural: the owners of mnist's images are QMNIST's writers; give "
                "--data.writers."
            )
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


def load_data(config: DataConfig, seed: int) -> Data:
    """Reads the data and deals them out; the same seed gives the same clients."""
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
    try:
        return deal_out(
            splits,
            task,
            num_clients=config.num_clients,
            how=config.partition,
            beta=config.beta,
            shards_per_client=config.shards_per_client,
            local_test=config.local_test,
            local_validation=config.local_validation,
            public=config.public,
            noise=config.synthetic,
            tokenizer=tokenizer,
            seed=seed,
        )
    except ValueError as error:
        raise ValueError(f"data.source={config.source}: {error}") from error


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
        return with_validation(mnist(config.folder, writers=config.writers or None), seed=seed)
    return with_validation(cifar10(config.folder), seed=seed)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which network; options that a family lacks are ignored."""

    family: Literal[
        "auto", "decoder", "cnn", "mlp", "vit", "resnet8", "resnet18", "resnet20", "resnet32",
        "resnet34", "resnet44", "resnet56", "resnet110", "vgg11", "vgg16",
    ] = option(
        "auto",
        "auto means decoder for text, cnn for images; resnet* and vgg* are those for 32x32 images",
    )  # fmt: skip
    embed_dim: int = option(128, "decoder, vit: width of the residual stream")
    num_layers: int = option(4, "decoder, vit: layers")
    num_heads: int = option(4, "decoder, vit: attention heads")
    mlp_dim: int = option(384, "decoder, vit: hidden width of each MLP")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of parameters and computation")
    remat: bool = option(False, "recompute layers in the backward pass: less memory, more time")

    def __post_init__(self):
        check(self)


def family_of(config: ModelConfig, data: Data) -> str:
    """Returns the family that "auto" stands for; raises ValueError if it does not fit the data."""
    text = "tokens" in data.validation
    family = ("decoder" if text else "cnn") if config.family == "auto" else config.family
    if (family == "decoder") != text:
        kind = "text" if text else "images"
        raise ValueError(f"model.family={family} does not fit {kind}; leave it at auto.")
    return family


def make_model(config: ModelConfig, data: Data) -> Model:
    """Returns a model that fits the data; raises ValueError if the family cannot."""
    family = family_of(config, data)
    if family == "decoder":
        assert data.tokenizer is not None
        rows = data.validation["tokens"]
        return decoder(
            DecoderConfig(
                vocab_size=data.tokenizer.vocab_size, embed_dim=config.embed_dim,
                num_layers=config.num_layers, num_heads=config.num_heads,
                mlp_dim=config.mlp_dim, max_len=max(2048, rows.shape[1]),
                dtype=config.dtype, remat=config.remat,
            )
        )  # fmt: skip
    return image_classifier(
        family, data.validation["image"].shape[1:], NUM_CLASSES, dtype=config.dtype,
        embed_dim=config.embed_dim, num_layers=config.num_layers, num_heads=config.num_heads,
        mlp_dim=config.mlp_dim,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of local (or central) training."""

    name: Literal["adam", "sgd"] = option("adam", "adam (b2 = 0.95) or sgd")
    learning_rate: float = option(0.0, "step size; 0 means 0.002 for adam and 0.1 for sgd")
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
    """Returns the optax chain of a config."""
    if config.name == "adam":
        step = optax.adam(config.learning_rate or 2e-3, b2=0.95)
    else:
        step = optax.sgd(config.learning_rate or 0.1, config.momentum or None)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), step)


def use_cores(most: int) -> None:
    """Makes each core of a CPU a device, up to `most`; call it before JAX is first used.

    More devices than cores would wait for each other in every collective. If XLA_FLAGS already sets
    the number of devices, it is left alone.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", max(1, min(most, os.cpu_count() or 1)))
