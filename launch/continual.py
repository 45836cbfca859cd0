"""Learns from data that come stage after stage, and says what was forgotten.

    python -m jaxfm.launch.continual --data=digits --local=sgd
    python -m jaxfm.launch.continual --data=digits --local=sgd --protect=none,replay,ewc,lwf
    python -m jaxfm.launch.continual --by=clients --stages=3

By labels, each stage brings some of the classes, to all clients; by clients, each brings some of
the clients. Every way of --protect sees the same stream. The report shows, for each, how well every
stage is known after every other one. A stopped run goes on after its last finished stage.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Literal

import jax
import numpy as np

from jaxfm import config as configs
from jaxfm.config import check, check_whole, option
from jaxfm.data.dealing import Data
from jaxfm.data.federation import Federation
from jaxfm.federated import Local, fed_avg
from jaxfm.federated.continual import (
    Learned,
    Routed,
    Stage,
    by_groups,
    ewc,
    learn,
    learn_adapters,
    lwf,
    rehearsed,
)
from jaxfm.launch.adapters import AdapterConfig, adapted
from jaxfm.launch.cores import use_cores
from jaxfm.launch.optimizers import OptimizerConfig, make_optimizer
from jaxfm.launch.report import write_report
from jaxfm.launch.setup import DataConfig, ModelConfig, load_data, make_model
from jaxfm.model import Model
from jaxfm.parallel.mesh import make_mesh
from jaxfm.run_folder import RUN_DIR_HELP, in_folder, open_run, save_results

WAYS = ("none", "replay", "ewc", "lwf", "adapters")


@dataclasses.dataclass(frozen=True)
class ContinualConfig:
    """A run over a stream."""

    run_dir: str = option("", RUN_DIR_HELP)
    by: Literal["labels", "clients"] = option("labels", "what a stage brings: classes, or clients")
    stages: int = option(5, "stages of the stream")
    rounds: int = option(10, "rounds of each stage")
    protect: tuple[str, ...] = option(
        ("none", "replay"),
        "ways to protect what was learned, on the same stream: none; replay of kept rows; ewc, "
        "elastic weight consolidation; lwf, distillation from the last stage's model; adapters, "
        "one for each stage and a router among them (with --adapter)",
    )
    capacity: int = option(20, "replay: rows that a client keeps of its past")
    ewc: float = option(100.0, "ewc: strength of the penalty")
    lwf: float = option(1.0, "lwf: strength of the distillation")
    cohort_size: int = option(8, "clients drawn a round")
    batch_size: int = option(8, "examples of a local step")
    epochs: int = option(1, "local epochs a round")
    seed: int = option(0, "of data, parameters and rounds")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    local: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        check(self)
        least = {"stages": 2, "rounds": 1, "capacity": 1, "ewc": 0, "lwf": 0, "cohort_size": 1,
                 "batch_size": 1, "epochs": 1, "seed": 0}  # fmt: skip
        check_whole(self, least)
        unknown = [way for way in self.protect if way not in WAYS]
        if unknown or not self.protect:
            given = ",".join(self.protect)
            raise ValueError(f"protect={given!r}: give one or several of {', '.join(WAYS)}.")
        if "adapters" in self.protect and self.adapter.kind == "none":
            raise ValueError(
                "protect=adapters gives each stage an adapter of its own, so it needs a kind: "
                "give --adapter, for example --adapter=lora."
            )


def stream(config: ContinualConfig, data: Data) -> list[Stage]:
    """The stages of a run.

    Raises:
      ValueError: fewer classes, or clients, than stages.
    """
    owner, rows = _owners(data.train)
    train = {name: np.asarray(leaf)[rows] for name, leaf in data.train.examples.items()}
    common: dict[str, Any] = {"num_clients": len(data.names), "rounds": config.rounds}
    many = len(data.classes) if config.by == "labels" else len(data.names)
    if many < config.stages:
        what = "classes" if config.by == "labels" else "clients"
        raise ValueError(f"stages={config.stages}: there are only {many} {what}.")
    stage_of = lambda number: number * config.stages // many
    if config.by == "labels":
        groups = stage_of(train["label"]), stage_of(np.asarray(data.test["label"]))
        return by_groups(train, data.test, *groups, owner=owner, **common)
    test_owner, test_rows = _owners(data.local_test)
    test = {name: np.asarray(leaf)[test_rows] for name, leaf in data.local_test.examples.items()}
    return by_groups(train, test, stage_of(owner), stage_of(test_owner), owner=owner, **common)


def run(config: ContinualConfig, data: Data, model: Model, way: str) -> Learned | Routed:
    """One way of protection over the whole stream."""
    local = Local(make_optimizer(config.local), config.batch_size, config.epochs)
    stages, between = stream(config, data), None
    algorithm = fed_avg(model, data.task, local)
    if way == "replay":
        stages = rehearsed(stages, config.capacity, seed=config.seed)
    elif way == "ewc":
        algorithm, between = ewc(model, data.task, local, strength=config.ewc)
    elif way == "lwf":
        algorithm, between = lwf(model, data.task, local, strength=config.lwf)
    common: dict[str, Any] = {
        "cohort_size": config.cohort_size, "seed": config.seed + 1,
        "folder": pathlib.Path(config.run_dir) / "checkpoints" / way,
        "mesh": make_mesh(clients=len(jax.devices())),
    }  # fmt: skip
    variables = model.init(jax.random.key(config.seed))
    if way == "adapters":
        return learn_adapters(
            algorithm, model, data.task, stages, variables, num_classes=len(data.classes), **common
        )
    return learn(algorithm, model, data.task, stages, variables, between=between, **common)


def _owners(federation: Federation) -> tuple[np.ndarray, np.ndarray]:
    """i32[n] the client of each row that somebody holds, and i64[n] which rows these are."""
    held = [federation.rows_of(client) for client in range(len(federation.count))]
    owner = np.concatenate([np.full(len(rows), client) for client, rows in enumerate(held)])
    return owner.astype(np.int32), np.concatenate(held)


def main(config: ContinualConfig) -> None:
    """Every way over the same stream, and the report."""
    use_cores(config.cohort_size)
    config = in_folder(config, "continual", config.data.source)
    run_dir = open_run(config, config.run_dir)
    data = load_data(config.data, config.seed, config.model)
    model = adapted(config.adapter, make_model(config.model, data), data)
    part: dict[str, Any] = {"by": config.by, "rounds": config.rounds, "ways": {}}
    part["names"] = [stage.name for stage in stream(config, data)]
    for way in config.protect:
        scores = run(config, data, model, way).scores
        part["ways"][way] = scores._asdict() | {"accuracy": scores.accuracy.tolist()}
        print(
            f"{way}: average accuracy {scores.average_accuracy:.3f}, forgetting "
            f"{scores.forgetting:.3f}, backward transfer {scores.backward_transfer:+.3f}",
            flush=True,
        )
    save_results(run_dir, "continual", part)
    print(f"report: {write_report(run_dir)}")


if __name__ == "__main__":
    configs.run(main, ContinualConfig, joins=True)
