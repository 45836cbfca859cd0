"""The options of `jaxfm.launch.supernet`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxfm.config import check, check_whole, option
from jaxfm.launch.optimizers import OptimizerConfig
from jaxfm.launch.setup import DataConfig, ModelConfig
from jaxfm.run_folder import RUN_DIR_HELP

_LEAST = {
    "multiple": 1, "dense_steps": 1, "steps": 1, "num_random": 0, "score_examples": 0,
    "calibration_batches": 1, "batch_size": 1, "save_every": 1, "seed": 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SupernetConfig:
    """What is elastic, how it is trained, and for whom."""

    run_dir: str = option("", RUN_DIR_HELP)
    axes: tuple[str, ...] = option(
        (), "elastic axes of the model, layer for depth; empty: all widths of its family"
    )
    kernels: tuple[int, ...] = option(
        (), "sizes of elastic kernels, such as 5,3; empty: kernels are not elastic"
    )
    alike: bool = option(
        False, "all layers keep equal numbers, which Hugging Face's format requires"
    )
    multiple: int = option(1, "members keep multiples of this number of channels")
    smallest: float = option(0.25, "share of each axis that every member keeps")
    shares: tuple[float, ...] = option(
        (0.2, 0.4, 0.7), "budgets, as shares of the dense model's cost"
    )
    cost: Literal["parameters", "macs"] = option("parameters", "the cost that is budgeted")
    dense_steps: int = option(200, "steps of training before channels are ordered")
    steps: int = option(400, "steps in which members train together")
    num_random: int = option(2, "random members per step, beside the largest and the smallest")
    scored: int = option(64, "number of members whose scores the predictor learns from")
    score_examples: int = option(512, "validation rows that score a member; 0: all of them")
    calibration_batches: int = option(
        8, "batches of training rows that a member's statistics are estimated on"
    )
    batch_size: int = option(32, "examples per step")
    save_every: int = option(50, "steps between checkpoints")
    seed: int = option(0, "seed of data, parameters, training and search")
    data: DataConfig = DataConfig(source="digits", partition="iid")
    network: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        check(self)
        check_whole(self, _LEAST)
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares={self.shares} must be shares above 0 and up to 1; give some.")
        if self.scored < 10:
            raise ValueError(
                f"scored={self.scored} must be at least 10 for the predictor to learn."
            )
        if self.cost == "macs" and "layer" in self.axes:
            raise ValueError(
                "cost=macs cannot be computed for elastic depth; give --cost=parameters."
            )
