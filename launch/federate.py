"""Trains a model over clients whose data stay where they are.

    python -m jaxfm.launch.federate
    python -m jaxfm.launch.federate --algorithm=hetero_fl --tiers=1.0,0.5,0.25
    python -m jaxfm.launch.federate --data.source=mnist --data.folder=... --data.partition=dirichlet
    python -m jaxfm.launch.federate --data.source=cifar10 --data.folder=cifar10.npz \
        --model.family=resnet20 --local.name=sgd
    python -m jaxfm.launch.federate --compare=fed_avg,scaffold,hetero_fl --seeds=3 \
        --profile=pi,phone,laptop --local.name=sgd

The first federates a byte-level language model over the largest packages of the standard library;
the last runs three algorithms side by side on the same data, clients and cohorts.
A run folder holds the config, metrics (JSONL and TensorBoard), checkpoints and report.html. The
same command goes on where a stopped run was; the validation split is watched, the test split is
looked at once, at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm import config as configs
from jaxfm.checkpoint import Checkpointer
from jaxfm.config import check, option
from jaxfm.cost import num_bytes
from jaxfm.data.federation import summary
from jaxfm.federated.accounting.ledger import (
    ClientCost,
    client_costs,
    client_shapes,
    client_work,
    round_costs,
)
from jaxfm.federated.accounting.metrics import client_metrics, global_metrics, three_metrics
from jaxfm.federated.accounting.resources import (
    DEVICES,
    UNLIMITED_STEPS,
    Device,
    assign,
    fleet,
    fleet_profiles,
    plan,
    profiles,
    simulated,
)
from jaxfm.federated.algorithm import Algorithm, Bucket, Profile
from jaxfm.federated.algorithms.hetero_fl import hetero_fl
from jaxfm.federated.local import Local
from jaxfm.federated.partition import IsPersonal, head, under
from jaxfm.federated.rounds import Population, Rounds, RunState, draw, rounds
from jaxfm.launch.algorithms import (
    ALGORITHMS,
    NEEDS_PUBLIC,
    SENDS_LOGITS,
    DistilConfig,
    Parts,
    make_algorithm,
)
from jaxfm.launch.compare import compare
from jaxfm.launch.report import write_report
from jaxfm.launch.setup import (
    NUM_CLASSES,
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
    width_axes,
)
from jaxfm.log import RunLog, progress
from jaxfm.model import Model, PyTree, Variables, count_parameters
from jaxfm.parallel.mesh import make_mesh
from jaxfm.subnet import Subnet, axis_sizes, width
from jaxfm.tasks import evaluate


@dataclasses.dataclass(frozen=True)
class FederateConfig:
    """A federated run."""

    run_dir: str = option("runs/federate", "folder of the run; an unfinished run there goes on")
    algorithm: str = option("fed_avg", f"what clients and server do: {', '.join(ALGORITHMS)}")
    compare: tuple[str, ...] = option((), "several algorithms, side by side on the same data")
    seeds: int = option(1, "compare: runs of each, with seeds from --seed on")
    rounds: int = option(60, "rounds in all")
    cohort: int = option(8, "clients drawn a round")
    batch_size: int = option(8, "examples of a local step")
    epochs: int = option(1, "local epochs a round")
    max_steps: int = option(8, "most local steps a round; 0: as many as the epochs take")
    drop_rate: float = option(0.0, "probability that a drawn client fails to report")
    tiers: tuple[float, ...] = option(
        (1.0, 0.5, 0.25),
        "hetero_fl, fed_rolex, raffm, fed_md, fed_kemf, rafl: share of each width that the clients "
        "of a tier hold",
    )
    profile: tuple[str, ...] = option(
        (), f"clients' machines, dealt out in turn: {', '.join(DEVICES)}; time and energy are told"
    )
    deadline_s: float = option(
        0.0,
        "profile: simulated seconds of a round, to which models and steps are fitted; 0: as long "
        "as the slowest needs for the smallest; inf: memory alone decides",
    )
    mu: float = option(0.01, "fed_prox: weight of the proximal term")
    server_learning_rate: float = option(0.01, "fed_adam, fed_yogi; fed_avg_m takes steps of 1")
    server_momentum: float = option(0.9, "fed_avg_m")
    keep: float = option(0.5, "spatl, adp: share of the multiply-adds that is sent, or kept")
    select: Literal["saliency", "agent"] = option(
        "saliency",
        "spatl: who chooses channels: a threshold on weights, or an agent that learns on each "
        "client's own --data.local_validation rows",
    )
    policy: str = option("", "select=agent: policy.safetensors of a search, for all to start from")
    fed_dyn_alpha: float = option(0.01, "fed_dyn: weight of the regularisation")
    threshold: float = option(1e-3, "fed_dp: weights below it become zero after a local epoch")
    upload: Literal["full", "8bit", "4bit", "top_k"] = option(
        "full", "how uploads travel: floats, randomly rounded, or the largest alone, in 8 bits"
    )
    top_k: float = option(0.1, "upload=top_k: share of the entries of each array")
    download: Literal["full", "8bit", "4bit"] = option("full", "how downloads travel")
    eval_every: int = option(5, "rounds between evaluations and checkpoints")
    eval_examples: int = option(512, "validation rows looked at while training; 0: all")
    test_examples: int = option(0, "test rows looked at in the end; 0: all")
    clients_at_once: int = option(0, "clients side by side on a device; 0: as the backend likes it")
    seed: int = option(0, "of data, parameters and rounds")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    local: OptimizerConfig = OptimizerConfig()
    distil: DistilConfig = DistilConfig()

    def __post_init__(self):
        check(self)
        for name, least in (("rounds", 1), ("cohort", 1), ("batch_size", 1), ("epochs", 1),
                            ("max_steps", 0), ("eval_every", 1), ("eval_examples", 0),
                            ("test_examples", 0), ("clients_at_once", 0), ("seeds", 1),
                            ("deadline_s", 0)):  # fmt: skip
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)}: give at least {least}.")
        for name, fits, wanted in (
            ("drop_rate", 0 <= self.drop_rate < 1, "a probability from 0 and below 1"),
            ("mu", 0 <= self.mu < math.inf, "a weight of at least 0"),
            ("server_learning_rate", 0 < self.server_learning_rate < math.inf, "a number above 0"),
            ("server_momentum", 0 <= self.server_momentum < 1, "a number from 0 and below 1"),
            ("keep", 0 < self.keep <= 1, "a share above 0 and up to 1"),
            ("fed_dyn_alpha", 0 < self.fed_dyn_alpha < math.inf, "a weight above 0"),
            ("threshold", 0 <= self.threshold < math.inf, "a number of at least 0"),
            ("top_k", 0 < self.top_k <= 1, "a share above 0 and up to 1"),
        ):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)}: give {wanted}.")
        if self.cohort > self.data.num_clients:
            raise ValueError(
                f"cohort={self.cohort}: there are data.num_clients={self.data.num_clients}."
            )
        if self.select == "agent" and not self.data.local_validation:
            raise ValueError("select=agent judges by rows held back: give --data.local_validation.")
        if self.policy and self.select != "agent":
            raise ValueError(f"policy={self.policy!r} is for --select=agent.")
        if not self.tiers or any(not 0 < tier <= 1 for tier in self.tiers):
            raise ValueError(f"tiers={self.tiers}: give shares of the width, above 0 and up to 1.")
        for name in (self.algorithm, *self.compare):
            if name not in ALGORITHMS:
                raise ValueError(f"algorithm={name}: choose among {', '.join(ALGORITHMS)}.")
        for name in self.compare or (self.algorithm,):
            if name in NEEDS_PUBLIC and not (self.data.public or self.data.synthetic):
                raise ValueError(
                    f"algorithm={name} distils from public data: give --data.public, 0.1 say, or "
                    "--data.synthetic, 200 say."
                )
            if name in SENDS_LOGITS and self.upload != "full":
                raise ValueError(
                    f"upload={self.upload}: {name} uploads predictions, whose small entries count "
                    "like the others, and no movements; leave it at full."
                )
        if self.profile:
            fleet(self.profile, 1)  # raises for unknown names
        elif self.deadline_s:
            raise ValueError(f"deadline_s={self.deadline_s}: time is told of a --profile only.")


class Setting(NamedTuple):
    """A run before its first round.

    Attributes:
      variables: that it starts from.
      tiers: of the model, the widest first.
      costs: of one client, by bucket.
      steps: i32[C], local steps of each client in a round.
      machines: what time and energy are told of; None: neither is.
      deadline_s: of a round on them.
      personal: of `client_metrics`, compiled once.
      shared: of `shared_models`.
    """

    data: Data
    model: Model
    variables: Variables
    tiers: tuple[Subnet, ...]
    algorithm: Algorithm
    population: Population
    costs: tuple[ClientCost, ...]
    steps: np.ndarray
    machines: Device | None
    deadline_s: float
    personal: Callable[..., dict[str, np.ndarray]]
    shared: dict[int, Callable[[PyTree], Variables]]


class Trained(NamedTuple):
    """A run after its last.

    Attributes:
      state: of the engine.
      totals: "bytes_down", "bytes_up", "flops" of all clients, "selected" and "reported" clients;
        of a profile "seconds" and "joules", too.
      test: the three metrics on the test sets, by name.
      tiers: per bucket, the metrics of its model on the global test set; where its clients have
        models of their own, the means of these on their own test sets.
      clients: f64[C] by metric, of each client's model on its own test set.
    """

    state: RunState
    totals: dict[str, float]
    test: dict[str, float]
    tiers: list[dict[str, float]]
    clients: dict[str, np.ndarray]


_load = functools.lru_cache(maxsize=1)(load_data)  # a comparison reads the same data in turn


def prepare(config: FederateConfig) -> Setting:
    """Loads the data and puts model, algorithm and clients together."""
    data = _load(config.data, config.seed)
    model = make_model(config.model, data)
    variables = model.init(jax.random.key(config.seed))
    local = Local(make_optimizer(config.local), config.batch_size, config.epochs)
    sizes = axis_sizes(variables, model.axes)
    axes = width_axes(family_of(config.model, data), sizes)
    tiers = make_tiers(sizes, axes, config.tiers)
    counts = np.asarray(data.train.count)
    wanted = config.epochs * -(-counts // config.batch_size)
    wanted = np.minimum(wanted, config.max_steps) if config.max_steps else wanted

    held = data.local_validation if config.select == "agent" else None

    def place(algorithm: Algorithm, start: Variables, bucket: np.ndarray | None = None):
        # Costs do not depend on who is in which bucket.
        num_clients = len(counts)
        nowhere = np.zeros(num_clients, np.int32)
        anyhow = Population(data.train, profiles(num_clients), nowhere, held)
        costs = client_costs(algorithm, anyhow, start, data.public)
        return costs, assigned(config, costs, wanted, bucket)

    def tier_of() -> np.ndarray:
        return place(hetero_fl(model, data.task, local, tiers), variables)[1].bucket

    is_last = last_layer(model)
    parts = Parts(
        model, variables, data.task, local, len(counts), is_last, tiers, axes, tier_of,
        data.public, spread(data.validation, 2),
        NUM_CLASSES if "label" in data.validation else None,
    )  # fmt: skip
    algorithm, start, bucket = make_algorithm(config, parts)
    variables = variables if start is None else start
    costs, placed = place(algorithm, variables, bucket)
    population = Population(data.train, placed.profiles, placed.bucket, held)
    personal = client_metrics(algorithm, placed.bucket, data.task, batch_size=_EVAL_BATCH)
    return Setting(
        data, model, variables, tiers, algorithm, population, costs,
        np.minimum(wanted, np.asarray(placed.profiles.max_steps)), placed.machines,
        placed.deadline_s, personal, shared_models(algorithm, population, variables, data.public),
    )  # fmt: skip


class Placed(NamedTuple):
    """Clients on their machines; bucket i32[C]."""

    bucket: np.ndarray
    profiles: Profile
    machines: Device | None
    deadline_s: float


def assigned(
    config: FederateConfig,
    costs: tuple[ClientCost, ...],
    steps: np.ndarray,
    bucket: np.ndarray | None,
) -> Placed:
    """Who trains what: by the machines of the profile; without one, by memory made to measure.

    Args:
      costs: by bucket, the largest model first.
      steps: i32[C], that clients would like to take in a round.
      bucket: i32[C], where that is settled.
    """
    if config.profile:
        machines = fleet(config.profile, len(steps))
        chosen = plan(machines, costs, steps, config.deadline_s or None, bucket)
        known = fleet_profiles(machines, chosen.max_steps)
        return Placed(chosen.bucket, known, machines, chosen.deadline_s)
    # Machines in turn have the memory that a bucket needs; each gets the largest that fits.
    needs = np.array([cost.memory_bytes for cost in costs], np.float64)
    turn = np.arange(len(steps)) % len(needs) if bucket is None else bucket
    known = profiles(
        len(steps), max_steps=config.max_steps or UNLIMITED_STEPS, memory_bytes=1.01 * needs[turn]
    )
    bucket = assign(known, needs.tolist()) if bucket is None else bucket
    return Placed(bucket, known, None, float("inf"))


def shared_models(
    algorithm: Algorithm, population: Population, variables: Variables, public: PyTree
) -> dict[int, Callable[[PyTree], Variables]]:
    """The buckets whose clients all have the same model, whatever they keep.

    Args:
      variables: that the run starts from.
    Returns:
      By bucket, `(server state) -> variables`.
    """
    server = jax.eval_shape(algorithm.init, variables)
    shared: dict[int, Callable[[PyTree], Variables]] = {}
    for b, bucket in enumerate(algorithm.buckets):
        memory = client_shapes(bucket, population, server, public)[1]
        program = jax.make_jaxpr(bucket.personal)(server, memory).jaxpr
        kept = program.invars[len(jax.tree.leaves(server)) :]
        read = [*program.outvars, *(x for equation in program.eqns for x in equation.invars)]
        if not {id(x) for x in kept} & {id(x) for x in read}:
            shared[b] = functools.partial(_without_memory, bucket, memory)
    return shared


def _without_memory(bucket: Bucket, memory: PyTree, server: PyTree) -> Variables:
    return bucket.personal(server, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory))


def last_layer(model: Model) -> IsPersonal:
    """The classifier; of a perceptron, its last layer."""

    def place(name: str) -> tuple[str, int]:  # conv3 stands before dense1, dense9 before dense10
        kind = name.rstrip("0123456789")
        return kind, int(name[len(kind) :] or 0)

    names = sorted(jax.eval_shape(model.init, jax.random.key(0)).params, key=place)
    return head if {"head", "classifier"} & set(names) else under(names[-1])


def make_tiers(
    sizes: Mapping[str, int], axes: tuple[str, ...], ratios: tuple[float, ...]
) -> tuple[Subnet, ...]:
    """Prefix windows of some of the axes, whose sizes are given, the widest first."""
    ordered = sorted(ratios, reverse=True)
    return tuple(width(sizes, dict.fromkeys(axes, ratio)) for ratio in ordered)


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
    if setting.machines is not None:
        lines.append(f"a round is to end within {setting.deadline_s:.3g} simulated seconds")
    return "\n".join(lines)


_TOTALS = ("bytes_down", "bytes_up", "flops", "selected", "reported")
_SIMULATED = ("seconds", "joules")


def train(config: FederateConfig, setting: Setting) -> Trained:
    """Runs all rounds, or those that an earlier process has left, and measures on the test sets."""
    engine = make_engine(config, setting)
    run_dir = pathlib.Path(config.run_dir)
    state = engine.init(setting.variables, jax.random.key(config.seed + 1))
    names = totals_of(setting)
    totals = np.zeros(len(names))
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
                totals, line = account(config, setting, number, totals, info)
                if number % config.eval_every == 0 or number == config.rounds:
                    line |= validate(config, setting, state)
                log.write(number, line)
                if number % config.eval_every == 0 or number == config.rounds:
                    checkpoints.save(number, (state, totals))
    return Trained(
        state, dict(zip(names, totals.tolist(), strict=True)), *measure(config, setting, state)
    )


def totals_of(setting: Setting) -> tuple[str, ...]:
    """What is summed up over rounds."""
    return _TOTALS if setting.machines is None else _TOTALS + _SIMULATED


def make_engine(config: FederateConfig, setting: Setting) -> Rounds:
    """Rounds over all devices."""
    return rounds(
        setting.algorithm,
        setting.population,
        cohort_size=config.cohort,
        drop_rate=config.drop_rate,
        public=setting.data.public,
        mesh=make_mesh(clients=len(jax.devices())),
        width=config.clients_at_once or None,
    )


_EVAL_BATCH = 32


def account(
    config: FederateConfig, setting: Setting, number: int, totals: np.ndarray, info: Mapping
) -> tuple[np.ndarray, dict[str, float]]:
    """Adds a round's costs to the totals; returns them and the round's line of the log."""
    costs, bucket = setting.costs, setting.population.bucket
    spent = round_costs(costs, info)
    sums = {name: float(np.sum(np.asarray(value))) for name, value in info.items()}
    spent |= {"selected": sums["selected"], "reported": sums["clients"]}
    if setting.machines is not None:
        key, size = jax.random.key(config.seed + 1), len(bucket)
        drawn, reports = map(
            np.asarray, draw(key, number - 1, size, config.cohort, config.drop_rate)
        )
        work = client_work(costs, bucket, setting.steps, drawn, reports, info)
        spent |= simulated(setting.machines, work)
    names = totals_of(setting)
    totals = totals + np.array([spent[name] for name in names])
    line = {
        "train/loss": sums["loss_total"] / max(sums["loss_count"], 1.0),
        "clients/reported": sums["clients"],
        "clients/non_finite": sums["non_finite"],
        "clients/steps": sums["steps"],
    }
    return totals, line | {f"total/{n}": v for n, v in zip(names, totals.tolist(), strict=True)}


def validate(config: FederateConfig, setting: Setting, state: RunState) -> dict[str, float]:
    """Metrics of the global model and of each bucket's on (part of) the validation split.

    With local validation rows the mean of clients' own metrics on these, too.
    """
    data = setting.data
    some = spread(data.validation, config.eval_examples)
    line: dict[str, float] = {}
    for b in watched(setting):
        prefix = f"validation/bucket{b}" if b else "validation"
        metrics = on_server(setting, state, some, b)
        line |= {f"{prefix}/{name}": value for name, value in metrics.items()}
    if data.local_validation is not None:
        own = three_metrics(setting.personal(state, data.local_validation), {})
        line |= {name: value for name, value in own.items() if name.startswith("personal/")}
    return line


def watched(setting: Setting) -> list[int | None]:
    """The models to validate: of buckets; the global one (None) where clients have their own."""
    shared: list[int | None] = [*setting.shared]
    return shared or ([None] if setting.algorithm.model else [])


def on_server(
    setting: Setting, state: RunState, examples: Mapping, bucket: int | None
) -> dict[str, float]:
    """Metrics of the model of a bucket of `setting.shared`, or of the global one (None)."""
    task, algorithm = setting.data.task, setting.algorithm
    if bucket is None:
        return global_metrics(algorithm, state, task, examples, batch_size=_EVAL_BATCH)
    model, variables = algorithm.buckets[bucket].model, setting.shared[bucket](state.server)
    assert model is not None  # `client_metrics` has asked for it
    return evaluate(model.apply, variables, task, examples, batch_size=_EVAL_BATCH)


def measure(
    config: FederateConfig, setting: Setting, state: RunState
) -> tuple[dict[str, float], list[dict[str, float]], dict[str, np.ndarray]]:
    """The three metrics on the test sets, those of each bucket, and those of each client."""
    algorithm, bucket_of = setting.algorithm, setting.population.bucket
    test = spread(setting.data.test, config.test_examples)
    own = setting.personal(state, setting.data.local_test)

    def of_bucket(b: int) -> dict[str, float]:
        if b in setting.shared:
            return on_server(setting, state, test, b)
        return {name: _mean(values[bucket_of == b]) for name, values in own.items()}

    tiers = [of_bucket(b) for b in range(len(algorithm.buckets))]
    overall = on_server(setting, state, test, None) if algorithm.model else {}
    return three_metrics(own, overall), tiers, own


def _mean(values: np.ndarray) -> float:
    some = values[~np.isnan(values)]
    return float(some.mean()) if some.size else float("nan")


def main(config: FederateConfig) -> None:
    """The whole run, or all of a comparison, with a report at the end."""
    use_cores(config.cohort)
    if config.compare:
        print(f"report: {compare(config, run)}")
    else:
        print(f"report: {run(config)}")


def run(config: FederateConfig) -> pathlib.Path:
    """One algorithm with one seed; returns the path of its report."""
    run_dir = open_run(config, config.run_dir)
    setting = prepare(config)
    print(describe_clients(setting))
    print(
        f"{count_parameters(setting.variables.params):,} parameters on {len(jax.devices())} devices"
    )
    trained = train(config, setting)
    save_results(run_dir, "federate", results(config, setting, trained))
    for name, value in trained.test.items():
        print(f"test {name}: {value:.4f}")
    return write_report(run_dir)


def results(config: FederateConfig, setting: Setting, trained: Trained) -> dict:
    """What the report tells, as JSON."""
    population, model = setting.population, jax.eval_shape(setting.model.init, jax.random.key(0))
    full = num_bytes((model.params, model.stats))
    mix = config.profile or ("",)
    return {
        "rounds": config.rounds,
        "test": trained.test,
        "tiers": [
            {"clients": int((population.bucket == b).sum())}
            | cost._asdict()
            | {metric: _number(value) for metric, value in metrics.items()}
            for b, (cost, metrics) in enumerate(zip(setting.costs, trained.tiers, strict=True))
        ],
        "totals": trained.totals,
        "full_model": {
            "bytes_down": trained.totals["selected"] * full,
            "bytes_up": trained.totals["reported"] * full,
        },
        "clients": [
            {
                "name": name,
                "examples": int(setting.data.train.count[i]),
                "bucket": int(population.bucket[i]),
                "machine": mix[i % len(mix)],
                "test": {metric: _number(values[i]) for metric, values in trained.clients.items()},
            }
            for i, name in enumerate(setting.data.names)
        ],
    }


def _number(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if np.isnan(value) else float(value)


if __name__ == "__main__":
    configs.run(main, FederateConfig)
