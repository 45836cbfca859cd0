"""The adapter of a script, from a typed config."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxfm.adapters import bitfit, bottleneck, dora, head_only, lora, prefix_tuning, soft_prompt
from jaxfm.config import check, check_whole, option
from jaxfm.data.dealing import Data
from jaxfm.model import Model

_READ_BY = {  # options that not every kind of adapter reads
    "rank": ("lora", "dora", "bottleneck"),
    "targets": ("lora", "dora", "bottleneck"),
    "alpha": ("lora", "dora"),
    "dropout": ("lora", "dora"),
    "rank_stabilized": ("lora", "dora"),
    "tokens": ("prompt", "prefix"),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What is trained of a model; the rest is frozen, sent once and never uploaded."""

    kind: Literal["none", "lora", "dora", "bottleneck", "bitfit", "head", "prompt", "prefix"] = (
        option(
            "none",
            "none: all of the model; lora or dora: low-rank matrices beside kernels; bottleneck: "
            "small networks beside them; bitfit: biases; head: the last layer; prompt: vectors "
            "before the tokens; prefix: keys and values before them in every layer",
        )
    )
    rank: int = option(8, "lora, dora: the rank; bottleneck: the width")
    alpha: float = option(0.0, "lora, dora: alpha / rank is the factor of the matrices; 0: 1")
    targets: tuple[str, ...] = option(
        (),
        "lora, dora, bottleneck: which kernels, such as attention, mlp, linear, q_proj or "
        "layers.mlp.*; none given: attention, or mlp.down for bottleneck",
    )
    dropout: float = option(0.0, "lora, dora: of their inputs in training")
    rank_stabilized: bool = option(False, "lora, dora: divide alpha by the square root of the rank")
    tokens: int = option(20, "prompt, prefix: how many stand before each input")
    trained: tuple[str, ...] = option(
        (), "beginnings of names of the model's own parameters that are trained, too; none given: "
        "the head of a classifier"
    )  # fmt: skip

    def __post_init__(self):
        check(self)
        check_whole(self, {"rank": 1, "alpha": 0, "tokens": 1}, "adapter.")
        for field in dataclasses.fields(self):
            given = getattr(self, field.name) != field.default
            readers = _READ_BY.get(field.name, ())
            if given and readers and self.kind not in readers:
                raise ValueError(
                    f"adapter.{field.name}={getattr(self, field.name)} changes nothing with "
                    f"--adapter={self.kind}; {', '.join(readers)} read it."
                )
        if self.trained and self.kind in ("none", "head"):
            raise ValueError(
                f"adapter.trained={','.join(self.trained)} changes nothing with "
                f"--adapter={self.kind}."
            )


def adapted(config: AdapterConfig, model: Model, data: Data) -> Model:
    """Returns the model with the adapter of a config around it."""
    if config.kind == "none":
        return model
    if config.kind == "head":
        return head_only(model)
    tops = model.axes.params.keys() | model.axes.frozen.keys()
    heads = [name for name in ("head", "classifier") if name in tops and data.classes]
    trained = config.trained or tuple(heads)
    if config.kind == "bitfit":
        return bitfit(model, trained=trained)
    if config.kind in ("prompt", "prefix"):
        put = soft_prompt if config.kind == "prompt" else prefix_tuning
        return put(model, config.tokens, trained=trained)
    where: dict[str, Any] = {"targets": config.targets} if config.targets else {}
    if config.kind == "bottleneck":
        return bottleneck(model, config.rank, trained=trained, **where)
    make = lora if config.kind == "lora" else dora
    return make(
        model, config.rank, alpha=config.alpha or None, dropout=config.dropout,
        rank_stabilized=config.rank_stabilized, trained=trained, **where,
    )  # fmt: skip
