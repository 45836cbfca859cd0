r"""What wants an accelerator, in parts that fit into minutes and go on where they stopped.

    python benchmarks/accelerator.py --part=0,1,2 --folder=FOLDER
    python benchmarks/accelerator.py --part=3 --folder=FOLDER --data_dir=CIFAR10
    python benchmarks/accelerator.py --part=4 --folder=FOLDER --data_dir=CIFAR10 \
        --weights=resnet56.npz
    python benchmarks/accelerator.py --dry_run

The parts, in the order in which they are wanted:

- 0: what machine this is, and its two ceilings: bytes copied and bf16 operations a second;
- 1: decoding and speculative decoding of 100 M to 1 B parameters, as shares of the bandwidth;
- 2: rounds of 1000 tiny clients and of 100 clients with a CNN, against jitted loops over clients;
- 3: SPATL, FedAvg and SCAFFOLD with ResNet-20 at the papers' setting on CIFAR-10;
- 4: a search on ResNet-56, and 40 epochs of training of what it finds;
- 5: FedKEMF with residual networks of three depths, against FedAvg;
- 6: 15,000 candidates scored by one masked program, against slices one by one.

A call stops by its own clock, `--minutes` after it began, and keeps what it has in the folder;
called again, it goes on. Every part prints one line of JSON, which `lines.jsonl` in the folder
keeps, too; `docs/accelerator.md` says how to read it. `--dry_run` runs all parts in miniature on
any machine.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import sys
import traceback

import jax
from accelerator_parts.frame import Clock, Part, Setting, commit_of, run_part
from accelerator_parts.images import decoded

from jaxfm import config as configs
from jaxfm.config import check, option

MODULES = ("ceilings", "decoding", "clients", "paper", "shrinking", "knowledge", "candidates")
NEED_IMAGES, NEED_WEIGHTS = (3, 4, 5, 6), (4, 6)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run, and for how long."""

    part: tuple[int, ...] = option(tuple(range(len(MODULES))), "parts to run, in this order")
    folder: str = option("runs/accelerator", "what is done, and where to go on")
    minutes: float = option(9.0, "for this call, dealt out evenly over its parts")
    dry_run: bool = option(False, "all parts in miniature, on any machine")
    quick: bool = option(False, "only say which cases there are")
    data_dir: str = option("", "CIFAR-10: an npz file, or a folder of its published files")
    weights: str = option("", "PyTorch's state dict of ResNet-56 trained on CIFAR-10")
    num_rounds: int = option(60, "most rounds of parts 3 and 5")
    rate: float = option(0.01, "learning rate of clients in parts 3 and 5, the papers' own")
    seed: int = option(0, "of weights, partitions and searches")
    commit: str = option("", "of the code, where git cannot say it")

    def __post_init__(self):
        check(self)
        if not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes}: give a time above 0.")
        if unknown := sorted(set(self.part) - set(range(len(MODULES)))):
            raise ValueError(f"part={unknown}: choose from 0 to {len(MODULES) - 1}.")
        if self.dry_run or self.quick:
            return
        if not self.data_dir and set(self.part) & set(NEED_IMAGES):
            raise ValueError(f"Parts {NEED_IMAGES} need CIFAR-10: give --data_dir, or other parts.")
        if not self.weights and set(self.part) & set(NEED_WEIGHTS):
            raise ValueError(f"Parts {NEED_WEIGHTS} need a network: give --weights=resnet56.npz.")


def part_of(number: int) -> Part:
    return importlib.import_module(f"accelerator_parts.{MODULES[number]}").PART


def run(config: Config) -> list[dict]:
    """Runs the parts, prints the line of each, and returns the lines."""
    whole, folder = Clock(60 * config.minutes), pathlib.Path(config.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    # A program compiled once serves later calls; part 6, which times compilation, goes without.
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache" / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    commit, lines = commit_of(config.commit), []
    images = decoded(config.data_dir, folder / "cache") if config.data_dir else None
    for place, number in enumerate(config.part):
        clock = Clock(whole.left() / (len(config.part) - place))
        setting = Setting(
            dry=config.dry_run,
            folder=folder,
            clock=clock,
            images=images,
            weights=pathlib.Path(config.weights) if config.weights else None,
            num_rounds=min(config.num_rounds, 3) if config.dry_run else config.num_rounds,
            rate=config.rate,
            seed=config.seed,
        )
        try:
            line = run_part(part_of(number), setting, commit)
        except ImportError as error:  # a package that is not there: the other parts still run
            traceback.print_exc()
            line = {"name": f"accelerator_part{number}", "complete": False, "ratio": None,
                    "failed": {"import": str(error)}, "commit": commit}  # fmt: skip
        print(json.dumps(line), flush=True)
        with (folder / "lines.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        lines.append(line)
    return lines


def listed(config: Config) -> dict:
    """The names of all cases of the parts."""
    folder = pathlib.Path(config.folder)
    setting = Setting(True, folder, Clock(0), None, None, config.num_rounds, config.rate, 0)
    parts = map(part_of, config.part)
    return {"name": "accelerator", "cases": {p.name: list(p.cases(setting)) for p in parts}}


def main(config: Config) -> None:
    if config.quick:
        print(json.dumps(listed(config)))
        return
    if any(line["failed"] for line in run(config)):
        sys.exit(1)


if __name__ == "__main__":
    configs.run(main, Config)
