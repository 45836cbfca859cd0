"""Trains a model that answers a task about HPC code, on generated and proved programs.

    python -m jaxfm.launch.hpc train --out=models/races
    python -m jaxfm.launch.hpc train --task=program-race --out=models/programs --graph=false
    python -m jaxfm.launch.hpc advise --model=models/races solver.c

Programs are drawn and labelled first, by --processes processes, and kept in --cache, if given. The
folder holds the model, its tokenizer, and how it was trained. The settings that are not changed
train on about 30,000 loops; on one core that takes less than 20 minutes.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time

from jaxfm.config import check as check_fields
from jaxfm.config import check_whole, option
from jaxfm.launch.hpc import training
from jaxfm.tasks.hpc import reader as readers
from jaxfm.tasks.hpc.reader import Reader, Reading
from jaxfm.tasks.hpc.stored import stored_splits
from jaxfm.tasks.hpc.tokenizers import make_tokenizer


@dataclasses.dataclass(frozen=True)
class EncoderShape:
    """The shape of the encoder; see `jaxfm.models.CodeEncoderConfig`."""

    embed_dim: int = option(64, "width")
    num_layers: int = option(2, "depth")
    num_heads: int = option(4, "heads of attention")
    mlp_dim: int = option(128, "width inside a layer's MLP")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which programs are drawn, and where they are kept."""

    items: int = option(30000, "programs drawn to train on; duplicates are left out")
    validation: int = option(1000, "programs drawn to choose the threshold of race-free on")
    cache: str = option("", "folder in which drawn programs are kept; empty: they are not")
    processes: int = option(1, "how many draw programs")
    seed: int = option(0, "of the programs")

    def __post_init__(self):
        check_fields(self)
        check_whole(self, {"items": 1, "validation": 1, "processes": 1, "seed": 0})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A model for a task."""

    out: str = option("", "folder to write, which must be new or empty")
    task: str = option("race-detection", "race-detection, program-race or cost")
    graph: bool = option(True, "read the dependence graph beside the tokens")
    tokenizer: str = option("lexer-renamed", "byte, bpe, lexer or lexer-renamed")
    max_len: int = option(160, "tokens that are read of a source")
    steps: int = option(3000, "of the optimizer")
    batch_size: int = option(32, "loops of a step")
    learning_rate: float = option(2e-3, "its peak")
    seed: int = option(0, "of parameters and batches")
    data: DataSettings = DataSettings()
    model: EncoderShape = EncoderShape()

    def __post_init__(self):
        check_fields(self)
        check_whole(self, {"max_len": 16, "steps": 1, "batch_size": 1, "seed": 0})
        if self.task not in training.HEADS:
            raise ValueError(f"task={self.task!r}: train one of {', '.join(training.HEADS)}.")


CONFIG = TrainConfig


def trained(config: TrainConfig, say=print) -> Reader:
    """Draws the programs of a config and trains on them."""
    began = time.perf_counter()
    data = config.data
    rows = stored_splits(
        config.task, data.seed, data.items, data.validation, ("train", "validation"),
        folder=data.cache, processes=data.processes,
    )  # fmt: skip
    say(f"{len(rows['train'])} different programs, {time.perf_counter() - began:.0f} s")
    tokenizer = make_tokenizer(config.tokenizer, (row.source for row in rows["train"]))
    reading = Reading(tokenizer, config.max_len, config.max_len if config.graph else 0)
    settings = training.Fit(
        steps=config.steps, batch_size=config.batch_size, learning_rate=config.learning_rate,
        seed=config.seed,
    )  # fmt: skip
    shape = dataclasses.asdict(config.model)
    reader = training.fit(
        config.task, rows["train"], rows["validation"], reading, shape, settings, say
    )
    facts = {"seed": config.seed, "data_seed": data.seed, "items": data.items}
    return dataclasses.replace(reader, facts=reader.facts | facts)


def main(config: TrainConfig) -> None:
    """Trains and writes the folder."""
    if not config.out:
        raise ValueError("Give a folder for the model: train --out=models/races.")
    folder = pathlib.Path(config.out)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"The folder {folder} is not empty; give a new one with --out.")
    reader = trained(config)
    readers.save(reader, folder)
    figures = reader.facts["validation"]
    print("validation: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    if "safe_precision" in reader.facts:
        print(
            f"race-free is said of {reader.facts['safe_recall']:.0%} of the race-free loops, and "
            f"{reader.facts['safe_precision']:.1%} of what is called so is"
        )
    print(f"The model is in {folder}.")
