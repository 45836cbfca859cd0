"""Trains a model that answers a task about HPC code, on generated and proved programs.

    python -m jaxfm.launch.hpc train --out=models/races
    python -m jaxfm.launch.hpc train --task=pragma --out=models/pragmas
    python -m jaxfm.launch.hpc train --task=program-race --out=models/programs --graph=false
    python -m jaxfm.launch.hpc advise --model=models/races --model=models/pragmas solver.c

Programs are drawn and labelled first, by --data.processes processes, and kept in --data.cache, if
given. The folder holds the model, its tokenizer, and how it was trained. The settings that are not
changed train an encoder on about 30,000 loops in less than 20 minutes of one core, and the decoder
of --task=pragma, which writes directives, on 34,500 in 25.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import NamedTuple

from jaxfm.config import check as check_fields
from jaxfm.config import check_whole, option
from jaxfm.launch.hpc import pragmas, training
from jaxfm.launch.hpc.completions import Completer
from jaxfm.tasks.hpc import reader as readers
from jaxfm.tasks.hpc.reader import Reader, Reading
from jaxfm.tasks.hpc.records import Example
from jaxfm.tasks.hpc.stored import stored_splits
from jaxfm.tasks.hpc.tokenizers import make_tokenizer
from jaxfm.tokenizer import Tokenizer


class Recipe(NamedTuple):
    """With what the results of a task in docs/results were measured."""

    items: int
    steps: int
    learning_rate: float
    max_len: int
    tokenizer: str
    shape: tuple[int, int, int, int]


_ENCODER = 64, 2, 4, 128
RECIPES = {
    "race-detection": Recipe(30000, 3000, 2e-3, 160, "lexer-renamed", _ENCODER),
    "program-race": Recipe(30000, 3000, 2e-3, 256, "lexer-renamed", _ENCODER),
    "cost": Recipe(30000, 3000, 2e-3, 200, "lexer-renamed", _ENCODER),
    "tuning": Recipe(30000, 1500, 2e-3, 200, "lexer-renamed", _ENCODER),
    "similarity": Recipe(12000, 3000, 2e-3, 200, "lexer-renamed", _ENCODER),
    pragmas.TASK: Recipe(36000, 2000, 3e-3, 160, "lexer", (96, 3, 4, 240)),
}
_OWN = "; 0: the task's own"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of the model: an encoder, or the decoder of the task pragma."""

    embed_dim: int = option(0, f"width{_OWN}")
    num_layers: int = option(0, f"depth{_OWN}")
    num_heads: int = option(0, f"heads of attention{_OWN}")
    mlp_dim: int = option(0, f"width inside a layer's MLP{_OWN}")

    def __post_init__(self):
        check_fields(self)
        check_whole(self, {"embed_dim": 0, "num_layers": 0, "num_heads": 0, "mlp_dim": 0})


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which programs are drawn, and where they are kept."""

    items: int = option(0, f"programs drawn to train on; duplicates are left out{_OWN}")
    validation: int = option(1000, "programs drawn to choose the threshold of race-free on")
    cache: str = option("", "folder in which drawn programs are kept; empty: they are not")
    processes: int = option(1, "how many draw programs")
    seed: int = option(0, "of the programs")

    def __post_init__(self):
        check_fields(self)
        check_whole(self, {"items": 0, "validation": 1, "processes": 1, "seed": 0})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A model for a task."""

    out: str = option("", "folder to write, which must be new or empty")
    task: str = option(
        "race-detection", "race-detection, program-race, cost, tuning, similarity or pragma"
    )
    graph: bool = option(True, "read the dependence graph beside the tokens")
    tokenizer: str = option("", "byte, bpe, lexer or lexer-renamed; empty: the task's own")
    max_len: int = option(0, f"tokens that are read of a source{_OWN}")
    steps: int = option(0, f"of the optimizer{_OWN}")
    batch_size: int = option(32, "loops of a step")
    learning_rate: float = option(0.0, f"its peak{_OWN}")
    seed: int = option(0, "of parameters and batches")
    data: DataSettings = DataSettings()
    model: Shape = Shape()

    def __post_init__(self):
        check_fields(self)
        check_whole(self, {"max_len": 0, "steps": 0, "batch_size": 1, "seed": 0})
        if self.task not in RECIPES:
            raise ValueError(f"task={self.task!r}: train one of {', '.join(RECIPES)}.")
        if 0 < self.max_len < 16:
            raise ValueError(f"max_len={self.max_len}: give 16 tokens or more, or 0.")
        if not 0 <= self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate}: give 0 or more.")

    def complete(self) -> TrainConfig:
        """The same with the task's own values where none is given."""
        own = RECIPES[self.task]
        items, given = self.data.items or own.items, dataclasses.astuple(self.model)
        return dataclasses.replace(
            self,
            tokenizer=self.tokenizer or own.tokenizer,
            max_len=self.max_len or own.max_len,
            steps=self.steps or own.steps,
            learning_rate=self.learning_rate or own.learning_rate,
            data=dataclasses.replace(self.data, items=items),
            model=Shape(*(value or usual for value, usual in zip(given, own.shape))),
        )


CONFIG = TrainConfig


def drawn(config: TrainConfig, say=print) -> tuple[dict[str, list[Example]], Tokenizer]:
    """The rows "train" and "validation" of a complete config, and its tokenizer."""
    began, data = time.perf_counter(), config.data
    rows = stored_splits(
        config.task, data.seed, data.items, data.validation, ("train", "validation"),
        folder=data.cache, processes=data.processes,
    )  # fmt: skip
    say(f"{len(rows['train'])} different programs, {time.perf_counter() - began:.0f} s")
    # A decoder of directives reads names by their order, so a lexer has no words to learn.
    words = config.task != pragmas.TASK or config.tokenizer == "bpe"
    texts = (row.source for row in rows["train"]) if words else ()
    return rows, make_tokenizer(config.tokenizer, texts)


def _facts(config: TrainConfig) -> dict[str, int]:
    return {"seed": config.seed, "data_seed": config.data.seed, "items": config.data.items}


def trained(config: TrainConfig, say=print) -> Reader:
    """Draws the programs of a config and trains an encoder on them."""
    config = config.complete()
    rows, tokenizer = drawn(config, say)
    reading = Reading(tokenizer, config.max_len, config.max_len if config.graph else 0)
    settings = training.Fit(
        steps=config.steps, batch_size=config.batch_size, learning_rate=config.learning_rate,
        seed=config.seed,
    )  # fmt: skip
    shape = dataclasses.asdict(config.model)
    reader = training.fit(
        config.task, rows["train"], rows["validation"], reading, shape, settings, say
    )
    return dataclasses.replace(reader, facts=reader.facts | _facts(config))


def trained_decoder(config: TrainConfig, say=print) -> Completer:
    """Draws the loops of a config of the task pragma and trains a decoder on them."""
    config = config.complete()
    rows, tokenizer = drawn(config, say)
    made = pragmas.fit(
        rows["train"], rows["validation"], tokenizer, noted=config.graph, max_len=config.max_len,
        shape=dataclasses.asdict(config.model), steps=config.steps, batch_size=config.batch_size,
        learning_rate=config.learning_rate, seed=config.seed, say=say,
    )  # fmt: skip
    return made._replace(facts={**made.facts, **_facts(config)})


def main(config: TrainConfig) -> None:
    """Trains and writes the folder."""
    if not config.out:
        raise ValueError("Give a folder for the model: train --out=models/races.")
    folder = pathlib.Path(config.out)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"The folder {folder} is not empty; give a new one with --out.")
    if config.task == pragmas.TASK:
        decoder = trained_decoder(config)
        pragmas.save(decoder, folder)
        facts = decoder.facts
    else:
        reader = trained(config)
        readers.save(reader, folder)
        facts = reader.facts
    figures = facts.get("validation", {})
    print("validation: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    if "safe_precision" in facts:
        print(
            f"race-free is said of {facts['safe_recall']:.0%} of the race-free loops, and "
            f"{facts['safe_precision']:.1%} of what is called so is"
        )
    print(f"The model is in {folder}.")
