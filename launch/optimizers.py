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
    weight_decay: float = option(0.0, "of adam, decoupled from the gradient (AdamW)")

    def __post_init__(self):
        check(self)
        for name, fits, wanted in (
            ("learning_rate", 0 <= self.learning_rate < math.inf, "one above 0, or 0 for its own"),
            ("momentum", 0 <= self.momentum < 1, "a number from 0 and below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or a number above"),
            ("clip_norm", self.clip_norm > 0, "a norm above 0; inf clips nothing"),
        ):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)}: give {wanted}.")
        if self.weight_decay and self.name != "adam":
            raise ValueError(
                f"weight_decay={self.weight_decay} changes nothing with {self.name}; give "
                "--local=adam, or leave it out."
            )
        if self.momentum and self.name == "adam":
            raise ValueError(
                f"momentum={self.momentum} changes nothing with adam, which has its own; give "
                "--local=sgd, or leave it out."
            )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns the optax chain of a config."""
    if config.name == "adam":
        rate = config.learning_rate or 2e-3
        if config.weight_decay:
            step = optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay)
        else:
            step = optax.adam(rate, b2=0.95)
    else:
        step = optax.sgd(config.learning_rate or 0.1, config.momentum or None)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), step)
