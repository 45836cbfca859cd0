"""The optimizer of a script, from a typed config."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import optax

from jaxfm.config import check, option


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
        if self.momentum and self.name == "adam":
            raise ValueError(
                f"momentum={self.momentum} changes nothing with adam, which has its own; give "
                "--local=sgd, or leave it out."
            )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns the optax chain of a config."""
    if config.name == "adam":
        step = optax.adam(config.learning_rate or 2e-3, b2=0.95)
    else:
        step = optax.sgd(config.learning_rate or 0.1, config.momentum or None)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), step)
