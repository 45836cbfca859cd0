"""The options of `jaxfm.launch.search`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxfm.config import check, check_whole, option
from jaxfm.launch.optimizers import OptimizerConfig
from jaxfm.launch.setup import DataConfig, ModelConfig
from jaxfm.run_folder import RUN_DIR_HELP
from jaxfm.search.strategies.named import STRATEGY_NAMES

_LEAST = {
    "train_steps": 1, "channel_multiple": 1, "evaluations": 1, "reward_examples": 0,
    "finalists": 0, "calibration_examples": 1, "finetune_epochs": 0, "batch_size": 1, "seed": 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """What is shrunk, to what, and how."""

    run_dir: str = option("", RUN_DIR_HELP)
    model: str = option(
        "auto",
        "auto: as --network.* says; a network by name, such as resnet20, resnet56, vgg11, "
        "mobilenet2 or shufflenet2; or a folder in Hugging Face format",
    )
    weights: str = option("", "PyTorch state dict of a named network (.npz, .safetensors, .th)")
    normalise: Literal["none", "imagenet"] = option(
        "none", "how images are normalised after scaling to 0..1"
    )
    train_steps: int = option(300, "steps of dense training, where no weights are given")
    strategy: Literal[STRATEGY_NAMES] = option("gnn_rl", "strategy that proposes candidates")  # type: ignore[valid-type]
    policy: str = option(
        "", "gnn_rl only: policy.safetensors of a run on any network, to start from"
    )
    importance: Literal["l1", "l2", "taylor", "scale", "l2_scale", "activation"] = option(
        "l2", "which units of a group stay"
    )
    macs: float = option(0.5, "share of the multiply-adds that remains; 0: no such budget")
    parameters: float = option(0.0, "share of the parameters that remains; 0: no such budget")
    activation_bytes: float = option(
        0.0, "share of the peak activation memory that remains; 0: no such budget"
    )
    latency: float = option(
        0.0,
        "share of the dense latency at batch 32 that remains, by a fitted table; 0: no such budget",
    )
    channel_multiple: int = option(1, "groups keep multiples of this number of channels")
    evaluations: int = option(256, "candidates that the strategy may try")
    reward_examples: int = option(
        512, "rows that score a candidate; 0: all that are set aside for it"
    )
    finalists: int = option(
        8, "how many of the best candidates are judged again, on 4 and 16 times the rows; 0: none"
    )
    calibration_examples: int = option(512, "training rows that statistics are estimated on")
    score_repaired: bool = option(
        False,
        "score candidates after least squares: slower, but predicts the final accuracy better",
    )
    repair: bool = option(
        True, "repair the pruned weights by least squares on the calibration rows"
    )
    finetune_epochs: int = option(
        3, "passes over the training rows after the cut; 0: no fine-tuning"
    )
    batch_size: int = option(64, "examples per step of training and per batch of evaluation")
    seed: int = option(0, "seed of data, parameters, search and training")
    data: DataConfig = DataConfig(source="digits", partition="iid")
    network: ModelConfig = ModelConfig()
    finetune: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        check(self)
        shares = ("macs", "parameters", "activation_bytes", "latency")
        if not any(getattr(self, name) for name in shares):
            raise ValueError("Give a budget: --macs=0.5, --parameters=0.5 or --latency=0.5.")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a share from 0 to 1.")
        if self.strategy == "gnn_rl_published" and not self.macs:
            raise ValueError(
                "strategy=gnn_rl_published needs a budget of multiply-adds; give --macs."
            )
        check_whole(self, _LEAST)
        if self.policy and self.strategy != "gnn_rl":
            raise ValueError(f"policy={self.policy!r} requires --strategy=gnn_rl.")
