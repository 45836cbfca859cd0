"""Trains a model over clients whose data stay where they are.

    python -m jaxfm.launch.federate
    python -m jaxfm.launch.federate --algorithm=hetero_fl --tiers=1.0,0.5,0.25
    python -m jaxfm.launch.federate --data.source=mnist --data.folder=... --data.partition=dirichlet

The first federates a byte-level language model over the largest packages of the standard library.
A run folder holds the config, metrics (JSONL and TensorBoard), checkpoints and report.html. The
same command goes on where a stopped run was; the validation split is watched, the test split is
looked at once, at the end.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxfm import config as configs
from jaxfm.checkpoint import Checkpointer
from jaxfm.config import check, option
from jaxfm.data.federation import summary
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.evaluate import client_metrics, global_metrics, three_metrics
from jaxfm.federated.fed_avg import fed_avg
from jaxfm.federated.fed_opt import fed_adam, fed_avg_m, fed_yogi
from jaxfm.federated.fed_prox import fed_prox
from jaxfm.federated.hetero_fl import hetero_fl
from jaxfm.federated.ledger import ClientCost, client_costs, round_costs
from jaxfm.federated.local import Local
from jaxfm.federated.resources import assign, profiles
from jaxfm.federated.rounds import Population, Rounds, RunState, rounds
from jaxfm.launch.report import write_report
from jaxfm.launch.setup import (
    WIDTH_AXES,
    Data,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    family_of,
    load_data,
    make_model,
    make_optimizer,
    open_run,
    save_results,
    spread,
    use_cores,
)
from jaxfm.log import RunLog, progress
from jaxfm.model import Model, Variables, count_parameters
from jaxfm.parallel.mesh import make_mesh
from jaxfm.subnet import Subnet, axis_sizes, width


@dataclasses.dataclass(frozen=True)
class FederateConfig:
    """A federated run."""

    run_dir: str = option("runs/federate", "folder of the run; an unfinished run there goes on")
    algorithm: Literal["fed_avg", "fed_prox", "fed_avg_m", "fed_adam", "fed_yogi", "hetero_fl"] = (
        option("fed_avg", "what clients and server do")
    )
    rounds: int = option(60, "rounds in all")
    cohort: int = option(8, "clients drawn a round")
    batch_size: int = option(8, "examples of a local step")
    epochs: int = option(1, "local epochs a round")
    max_steps: int = option(8, "most local steps a round; 0: as many as the epochs take")
    drop_rate: float = option(0.0, "probability that a drawn client fails to report")
    tiers: tuple[float, ...] = option(
        (1.0, 0.5, 0.25), "hetero_fl: share of each width that the clients of a tier hold"
    )
    mu: float = option(0.01, "fed_prox: weight of the proximal term")
    server_learning_rate: float = option(0.01, "fed_adam, fed_yogi; fed_avg_m takes steps of 1")
    server_momentum: float = option(0.9, "fed_avg_m")
    eval_every: int = option(5, "rounds between evaluations and checkpoints")
    eval_examples: int = option(512, "validation rows looked at while training; 0: all")
    test_examples: int = option(0, "test rows looked at in the end; 0: all")
    clients_at_once: int = option(0, "clients side by side on a device; 0: as the backend likes it")
    seed: int = option(0, "of data, parameters and rounds")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    local: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        check(self)
        for name, least in (("rounds", 1), ("cohort", 1), ("batch_size", 1), ("epochs", 1),
                            ("max_steps", 0), ("eval_every", 1), ("eval_examples", 0),
                            ("test_examples", 0), ("clients_at_once", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give at least {least}.")
        if self.cohort > self.data.num_clients:
            raise ValueError(
                f"cohort={self.cohort}: there are data.num_clients={self.data.num_clients}."
            )
        if not self.tiers or any(not 0 < tier <= 1 for tier in self.tiers):
            raise ValueError(f"tiers={self.tiers}: give shares of the width, above 0 and up to 1.")


class Setting(NamedTuple):
    """A run before its first round."""

    data: Data
    model: Model
    variables: Variables
    tiers: tuple[Subnet, ...]
    algorithm: Algorithm
    population: Population
    costs: tuple[ClientCost, ...]


class Trained(NamedTuple):
    """A run after its last.

    Attributes:
      state: of the engine.
      totals: "bytes_down", "bytes_up", "flops" of all clients, "selected" and "reported" clients.
      test: the three metrics on the test sets, by name.
      tiers: per bucket, the metrics of its model on the global test set.
    """

    state: RunState
    totals: dict[str, float]
    test: dict[str, float]
    tiers: list[dict[str, float]]


def prepare(config: FederateConfig) -> Setting:
    """Loads the data and puts model, algorithm and clients together."""
    data = load_data(config.data, config.seed)
    model = make_model(config.model, data)
    variables = model.init(jax.random.key(config.seed))
    optimizer = make_optimizer(config.local)
    local = Local(optimizer, config.batch_size, config.epochs)
    tiers = make_tiers(model, variables, family_of(config.model, data), config.tiers)
    algorithm = make_algorithm(config, model, data, local, tiers)
    num_clients = len(data.names)
    steps = config.max_steps or 2**30
    everybody = profiles(num_clients, max_steps=steps)
    # Costs do not depend on who is in which bucket.
    population = Population(data.train, everybody, np.zeros(num_clients, np.int32))
    costs = client_costs(algorithm, population, variables)
    # Machines in turn have the memory that a tier needs; each gets the largest that fits.
    needs = [cost.memory_bytes for cost in costs]
    memory = np.array([needs[i % len(needs)] for i in range(num_clients)], np.float64)
    machines = profiles(num_clients, max_steps=steps, memory_bytes=1.01 * memory)
    population = Population(data.train, machines, assign(machines, needs))
    return Setting(data, model, variables, tiers, algorithm, population, costs)


def make_tiers(
    model: Model, variables: Variables, family: str, ratios: tuple[float, ...]
) -> tuple[Subnet, ...]:
    """Prefix windows of the widths that the family names, the widest first."""
    sizes = axis_sizes(variables, model.axes)
    ordered = sorted(ratios, reverse=True)
    return tuple(width(sizes, dict.fromkeys(WIDTH_AXES[family], ratio)) for ratio in ordered)


def make_algorithm(
    config: FederateConfig, model: Model, data: Data, local: Local, tiers: tuple[Subnet, ...]
) -> Algorithm:
    """The algorithm that the config names."""
    rate = config.server_learning_rate
    make = {
        "fed_avg": lambda *args: fed_avg(*args),
        "fed_prox": lambda *args: fed_prox(*args, mu=config.mu),
        "fed_avg_m": lambda *args: fed_avg_m(*args, momentum=config.server_momentum),
        "fed_adam": lambda *args: fed_adam(*args, learning_rate=rate),
        "fed_yogi": lambda *args: fed_yogi(*args, learning_rate=rate),
        "hetero_fl": lambda model, task, local: hetero_fl(model, task, local, tiers),
    }
    return make[config.algorithm](model, data.task, local)


def describe_clients(setting: Setting) -> str:
    """A table of clients and tiers, for people."""
    data, population = setting.data, setting.population
    labels = data.train.examples.get("label")
    table = summary(data.train, None if labels is None else np.asarray(labels), data.names)
    lines = [table, ""]
    for b, cost in enumerate(setting.costs):
        lines.append(
            f"bucket {b}: {int((population.bucket == b).sum())} clients, {cost.parameters:,} "
            f"parameters, {cost.memory_bytes / 1e6:.1f} MB while training, "
            f"{cost.bytes_down / 1e6:.2f} MB down and {cost.bytes_up / 1e6:.2f} MB up a round, "
            f"{cost.flops_per_step / 1e9:.2f} GFLOP a step"
        )
    return "\n".join(lines)


_TOTALS = ("bytes_down", "bytes_up", "flops", "selected", "reported")


def train(config: FederateConfig, setting: Setting) -> Trained:
    """Runs all rounds, or those that an earlier process has left, and measures on the test sets."""
    engine = make_engine(config, setting)
    run_dir = pathlib.Path(config.run_dir)
    state = engine.init(setting.variables, jax.random.key(config.seed + 1))
    totals = np.zeros(len(_TOTALS))
    done = 0
    with Checkpointer(run_dir / "checkpoints", keep=2) as checkpoints:
        if checkpoints.latest_step() is not None:
            done, (state, totals) = checkpoints.restore(like=(state, totals))
            print(f"Going on after round {done}, from {checkpoints.folder}.")
        with RunLog(run_dir, resume_step=done or None) as log:
            if not done:
                log.write(0, validate(config, setting, state))
            for number in progress(range(done + 1, config.rounds + 1), "rounds"):
                state, info = engine.run(state)
                totals, line = account(setting.costs, totals, info)
                if number % config.eval_every == 0 or number == config.rounds:
                    line |= validate(config, setting, state)
                log.write(number, line)
                if number % config.eval_every == 0 or number == config.rounds:
                    checkpoints.save(number, (state, totals))
    test, tiers = measure(config, setting, state)
    return Trained(state, dict(zip(_TOTALS, totals.tolist(), strict=True)), test, tiers)


def make_engine(config: FederateConfig, setting: Setting) -> Rounds:
    """Rounds over all devices."""
    return rounds(
        setting.algorithm,
        setting.population,
        cohort_size=config.cohort,
        drop_rate=config.drop_rate,
        mesh=make_mesh(clients=len(jax.devices())),
        width=config.clients_at_once or None,
    )


_EVAL_BATCH = 32


def account(
    costs: tuple[ClientCost, ...], totals: np.ndarray, info: Mapping
) -> tuple[np.ndarray, dict[str, float]]:
    """Adds a round's costs to the totals; returns them and the round's line of the log."""
    spent = round_costs(costs, info)
    sums = {name: float(np.sum(np.asarray(value))) for name, value in info.items()}
    spent |= {"selected": sums["selected"], "reported": sums["clients"]}
    totals = totals + np.array([spent[name] for name in _TOTALS])
    line = {
        "train/loss": sums["loss_total"] / max(sums["loss_count"], 1.0),
        "clients/reported": sums["clients"],
        "clients/non_finite": sums["non_finite"],
        "clients/steps": sums["steps"],
    }
    return totals, line | {f"total/{n}": v for n, v in zip(_TOTALS, totals.tolist(), strict=True)}


def validate(config: FederateConfig, setting: Setting, state: RunState) -> dict[str, float]:
    """The metrics of each bucket's model on (part of) the validation split."""
    some = spread(setting.data.validation, config.eval_examples)
    line: dict[str, float] = {}
    for b in alike(setting, state):
        prefix = "validation" if b == 0 else f"validation/bucket{b}"
        metrics = global_metrics(
            setting.algorithm, state, setting.data.task, some, batch_size=_EVAL_BATCH, bucket=b
        )
        line |= {f"{prefix}/{name}": value for name, value in metrics.items()}
    return line


def measure(
    config: FederateConfig, setting: Setting, state: RunState
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The three metrics on the test sets, and those of each bucket's model on the global one."""
    data, algorithm = setting.data, setting.algorithm
    test = spread(data.test, config.test_examples)
    on_test = lambda bucket: global_metrics(
        algorithm, state, data.task, test, batch_size=_EVAL_BATCH, bucket=bucket
    )
    tiers = [on_test(b) for b in alike(setting, state)]
    own = client_metrics(algorithm, setting.population.bucket, data.task, batch_size=_EVAL_BATCH)
    return three_metrics(own(state, data.local_test), on_test(None)), tiers


def alike(setting: Setting, state: RunState) -> list[int]:
    """The buckets whose clients all have the same model."""
    buckets = range(len(setting.algorithm.buckets))
    return [b for b in buckets if not jax.tree.leaves(state.memories[b])]


def main(config: FederateConfig) -> None:
    """The whole run, with a report at the end."""
    use_cores(config.cohort)
    run_dir = open_run(config, config.run_dir)
    setting = prepare(config)
    print(describe_clients(setting))
    print(
        f"{count_parameters(setting.variables.params):,} parameters on {len(jax.devices())} devices"
    )
    trained = train(config, setting)
    save_results(run_dir, "federate", results(setting, trained))
    for name, value in trained.test.items():
        print(f"test {name}: {value:.4f}")
    print(f"report: {write_report(run_dir)}")


def results(setting: Setting, trained: Trained) -> dict:
    """What the report tells, as JSON."""
    full = setting.costs[0]
    return {
        "test": trained.test,
        "tiers": [
            {"clients": int((setting.population.bucket == b).sum())} | cost._asdict() | metrics
            for b, (cost, metrics) in enumerate(zip(setting.costs, trained.tiers, strict=True))
        ],
        "totals": trained.totals,
        "full_model": {
            "bytes_down": trained.totals["selected"] * full.bytes_down,
            "bytes_up": trained.totals["reported"] * full.bytes_up,
        },
        "clients": [
            {"name": name, "examples": int(count), "bucket": int(bucket)}
            for name, count, bucket in zip(
                setting.data.names, setting.data.train.count, setting.population.bucket, strict=True
            )
        ],
    }


if __name__ == "__main__":
    configs.run(main, FederateConfig)
