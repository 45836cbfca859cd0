"""Trains a model on all data in one place: the baseline for a federated run.

    python -m jaxfm.launch.pretrain --steps=500
    python -m jaxfm.launch.pretrain --data.source=digits --data.partition=iid --local.name=sgd

The data are those that `jaxfm.launch.federate` deals out, merged. The run folder holds config,
metrics, checkpoints, report.html and model/, in Hugging Face format where it has one. The same
command continues a run that was stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfm import config as configs
from jaxfm import hub
from jaxfm.checkpoint import Checkpointer
from jaxfm.config import check, check_whole, option
from jaxfm.data.dealing import subsample
from jaxfm.data.federation import merge
from jaxfm.federated.foundation.central import TrainState, train_steps
from jaxfm.federated.measuring import evaluation_key
from jaxfm.federated.tensor import whole
from jaxfm.launch.cores import use_cores
from jaxfm.launch.optimizers import OptimizerConfig, make_optimizer
from jaxfm.launch.report import write_report
from jaxfm.launch.setup import (
    Data,
    DataConfig,
    ModelConfig,
    load_data,
    make_model,
    save_classes,
)
from jaxfm.log import RunLog, progress, say_figures
from jaxfm.model import Model, count_parameters
from jaxfm.parallel.mesh import make_mesh, put, spread
from jaxfm.preemption import Preempted, stop_requests
from jaxfm.run_folder import RUN_DIR_HELP, in_folder, open_run, save_results
from jaxfm.tasks import evaluate
from jaxfm.trackers import check_services


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A central training run."""

    run_dir: str = option("", RUN_DIR_HELP)
    steps: int = option(500, "total optimizer steps")
    batch_size: int = option(16, "examples per step, over all devices")
    eval_every: int = option(50, "steps between evaluations, and checkpoints at most")
    eval_examples: int = option(512, "validation rows used while training; 0 means all")
    log_to: tuple[Literal["wandb", "mlflow"], ...] = option(
        (), "services that get the metrics, too: wandb, mlflow"
    )
    fsdp: bool = option(False, "split parameters and optimizer state over the devices, too")
    seed: int = option(0, "of data, parameters and batches")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    local: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        check(self)
        least = {"steps": 1, "batch_size": 1, "eval_every": 1, "eval_examples": 0, "seed": 0}
        check_whole(self, least)


def train(config: PretrainConfig, data: Data, model: Model) -> TrainState:
    """Runs all steps, or those that remain after a restart; batches are split over devices.

    With `fsdp` the state is, too, and stays so in what is returned.
    """
    optimizer = make_optimizer(config.local)
    mesh = make_mesh(data=shards(config.batch_size))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def first(init_key: jax.Array) -> TrainState:
        variables = model.init(init_key)
        opt_state = optimizer.init(variables.params)
        return TrainState(
            variables, opt_state, jnp.zeros((), jnp.int32), jax.random.key(config.seed + 1)
        )

    init_key = jax.random.key(config.seed)
    places = _places(jax.eval_shape(first, init_key), mesh) if config.fsdp else None
    if places is None:
        state = jax.tree.map(lambda x: put(x, everywhere), first(init_key))
    else:  # no device ever has the whole
        state = jax.jit(first, out_shardings=places)(init_key)
    examples = jax.tree.map(lambda x: put(x, everywhere), merge(data.train))
    program = functools.cache(  # by the number of steps: the last chunk may be shorter
        lambda n: train_steps(model, data.task, optimizer, config.batch_size, n, mesh, places)
    )
    validation, key = subsample(data.validation, config.eval_examples), evaluation_key(data.task)
    with Checkpointer(pathlib.Path(config.run_dir) / "checkpoints", keep=2) as checkpoints:
        done = 0
        if checkpoints.latest_step() is not None:
            done, state = checkpoints.restore(like=state)
            print(f"Continuing after step {done}, from {checkpoints.folder}.")
        resumed = RunLog(config.run_dir, resume_step=done or None, log_to=config.log_to)
        with stop_requests() as asked, resumed as log:
            for start in progress(range(done, config.steps, config.eval_every), "chunks"):
                number = min(start + config.eval_every, config.steps)
                state, losses = program(number - start)(state, examples)
                metrics = evaluate(model.apply, state.variables, data.task, validation, 32, key=key)
                line = {f"validation/{name}": value for name, value in metrics.items()}
                line = {"train/loss": float(losses.mean())} | line
                log.write(number, line)
                say_figures(f"Step {number} of {config.steps}", line)
                stops = asked() and number < config.steps
                if stops or number == config.steps or checkpoints.is_due():
                    checkpoints.save(number, state)
                if stops:
                    raise Preempted(number, config.run_dir, "step")
    return state


def _places(state: TrainState, mesh: Mesh) -> TrainState:
    places = spread(state, mesh)
    if all(place.is_fully_replicated for place in jax.tree.leaves(places)):
        devices = mesh.shape["data"]
        raise ValueError(
            f"fsdp=true splits nothing of this model over {devices} device{'s' * (devices > 1)}, "
            "as many as share a batch evenly; leave it out, or give more devices."
        )
    return places


def shards(batch_size: int) -> int:
    """The largest number of devices that share a batch evenly.

    Raises:
      ValueError: the devices of a job of several processes, which all have to take part, do not.
    """
    devices = len(jax.devices())
    if jax.process_count() > 1 and batch_size % devices:
        raise ValueError(
            f"batch_size={batch_size} does not divide over the {devices} devices of this job: give "
            "a multiple."
        )
    return max(n for n in range(1, devices + 1) if batch_size % n == 0)


def main(config: PretrainConfig) -> None:
    """Trains, tests, and saves the model and the report."""
    check_services(config.log_to)
    use_cores(config.batch_size)
    config = in_folder(config, "pretrain", config.data.source)
    run_dir = open_run(config, config.run_dir)
    data = load_data(config.data, config.seed, config.model)
    model = make_model(config.model, data)
    save_classes(run_dir, data)
    variables = whole(train(config, data, model).variables)
    key = evaluation_key(data.task)
    metrics = evaluate(model.apply, variables, data.task, data.test, 32, key=key)
    save_results(run_dir, "pretrain", {"test": metrics})
    print(f"{count_parameters(variables.params):,} parameters")
    for name, value in metrics.items():
        print(f"test {name}: {value:.4f}")
    if jax.process_index() == 0:
        hub.save(
            model, variables, run_dir / "model", data.tokenizer,
            classes=data.classes, scale=data.scale,
        )  # fmt: skip
    print(f"model: {run_dir / 'model'}")
    print(f"report: {write_report(run_dir)}")


if __name__ == "__main__":
    configs.run(main, PretrainConfig, joins=True)
