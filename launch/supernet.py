"""One training, a network for every device: a supernet and its best members within budgets.

    python -m jaxfm.launch.supernet
    python -m jaxfm.launch.supernet --shares=0.1,0.25,0.5 --cost=macs --kernels=5,3
    python -m jaxfm.launch.supernet --data.source=stdlib --data.partition=natural --alike

A dense model is trained and its channels are put in order of importance; then its largest, its
smallest and random members learn together, the smaller ones from the largest. Some members are
scored on validation rows, a predictor learns from them which ones are good, and evolution breeds
the best for each budget; the better of that and of the member that keeps the same share of
everything, by validation rows, is the budget's own. Test rows are looked at once, for the report.
The run folder holds config, results, report.html and members/<share>/: variables, member.json with
what is kept and, of language models with `--alike`, Hugging Face's files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfm import config as configs
from jaxfm import hub
from jaxfm.checkpoint import Checkpointer
from jaxfm.config import check, option
from jaxfm.data.dealing import subsample
from jaxfm.data.federation import merge
from jaxfm.launch.pretrain import TrainState, train_steps
from jaxfm.launch.report import write_report
from jaxfm.launch.setup import (
    Data,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    family_of,
    load_data,
    make_model,
    make_optimizer,
)
from jaxfm.model import Array, Model, Variables, count_parameters
from jaxfm.models.by_name import width_axes
from jaxfm.parallel.mesh import make_mesh
from jaxfm.report.sections import main_metric
from jaxfm.run_folder import open_run, save_results
from jaxfm.search import Budget, member_macs
from jaxfm.search.elastic.evolve import evolve, fit_predictor
from jaxfm.search.elastic.supernet import Supernet, supernet
from jaxfm.search.elastic.training import sandwich
from jaxfm.search.recalibration import recalibrate
from jaxfm.subnet import axis_sizes
from jaxfm.tasks import Task, evaluate
from jaxfm.tasks.evaluation import metric_totals

BATCH = 32  # rows at a time of scores and reports


@dataclasses.dataclass(frozen=True)
class SupernetConfig:
    """What is elastic, how it is trained, and for whom."""

    run_dir: str = option("runs/supernet", "folder of the run; unfinished training there goes on")
    axes: tuple[str, ...] = option(
        (), "axes of the model that are elastic, layer for depth; empty: all widths of its family"
    )
    kernels: tuple[int, ...] = option((), "sizes of elastic kernels, as in 5,3; empty: none are")
    alike: bool = option(False, "all layers keep as many, as Hugging Face's files need")
    multiple: int = option(1, "of channels that members keep")
    smallest: float = option(0.25, "share of each axis that every member keeps")
    shares: tuple[float, ...] = option((0.2, 0.4, 0.7), "budgets, of the dense model's cost")
    cost: Literal["parameters", "macs"] = option("parameters", "what is budgeted")
    dense_steps: int = option(200, "steps of training before channels are ordered")
    steps: int = option(400, "steps in which members train together")
    num_random: int = option(2, "random members a step, beside the largest and the smallest")
    scored: int = option(64, "members whose scores the predictor learns from")
    score_examples: int = option(512, "validation rows that score a member; 0: all")
    calibration_batches: int = option(8, "of training rows, for a member's own statistics")
    batch_size: int = option(32, "examples a step")
    save_every: int = option(50, "steps between checkpoints")
    seed: int = option(0, "of data, parameters, training and search")
    data: DataConfig = DataConfig(source="digits", partition="iid")
    network: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        check(self)
        for name in ("multiple", "dense_steps", "steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1.")
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares={self.shares}: give shares above 0 and up to 1.")
        if self.scored < 10:
            raise ValueError(f"scored={self.scored}: a predictor needs at least 10 members.")
        if self.cost == "macs" and "layer" in self.axes:
            raise ValueError("cost=macs cannot be read of elastic depth; give --cost=parameters.")


class Trained(NamedTuple):
    """A supernet after its training.

    Attributes:
      net: its groups; `net.variables` are those before members trained together.
      variables: those after.
      dense: of the model before anything was elastic.
    """

    net: Supernet
    variables: Variables
    dense: Variables


def train(config: SupernetConfig, data: Data, model: Model) -> Trained:
    """Both trainings, or what an earlier process has left of them."""
    optimizer, examples = make_optimizer(config.optimizer), merge(data.train)
    mesh = make_mesh(data=1)
    plain = lambda n: train_steps(model, data.task, optimizer, config.batch_size, n, mesh)
    start = model.init(jax.random.key(config.seed))
    _check(config, data, model, start)  # before an hour of training
    print(f"The dense model: {config.dense_steps} steps.")
    folder = pathlib.Path(config.run_dir)
    dense = _run(config, folder / "dense", plain, start, optimizer, examples, config.dense_steps)
    net = _elastic(config, data, model, dense)
    print(f"{len(net.groups)} elastic groups, together: {config.steps} steps.")
    together = lambda n: _sandwiches(config, net, model, data.task, optimizer, n)
    variables = _run(
        config, folder / "together", together, net.variables, optimizer, examples, config.steps
    )
    return Trained(net, variables, dense)


def _elastic(config: SupernetConfig, data: Data, model: Model, variables: Variables) -> Supernet:
    sizes = axis_sizes(variables, model.axes)
    axes = config.axes or width_axes(family_of(config.network, data), sizes)
    return supernet(
        model, variables, axes, shared=tuple(axes) if config.alike else ("embed",),
        channel_multiple=config.multiple, smallest=config.smallest, kernels=config.kernels,
    )  # fmt: skip


def _cost(config: SupernetConfig, data: Data, model: Model, net: Supernet) -> tuple[Any, float]:
    """`(counts) -> []`, and that of the largest member."""
    inputs = data.task.prepare({k: v[:1] for k, v in merge(data.train).items()}, None)[0]
    cost = net.parameters if config.cost == "parameters" else member_macs(net, model, inputs)
    return cost, float(cost(jnp.asarray(net.largest, jnp.float32)))


def _check(config: SupernetConfig, data: Data, model: Model, variables: Variables) -> None:
    """Raises ValueError for axes, kernels and shares that this model cannot have."""
    net = _elastic(config, data, model, variables)
    cost, full = _cost(config, data, model, net)
    least = float(cost(jnp.asarray(net.smallest, jnp.float32))) / full
    for share in config.shares:
        if share < least:
            raise ValueError(
                f"shares={config.shares}: the smallest member has {least:.1%} of the "
                f"{config.cost}; give larger shares, or a lower --smallest."
            )


def _run(
    config: SupernetConfig, folder: pathlib.Path, program: Callable, variables: Variables,
    optimizer: optax.GradientTransformation, examples: Mapping[str, Any], steps: int,
) -> Variables:  # fmt: skip
    """Runs `program(n): (state, examples) -> (state, losses)` in chunks, with checkpoints."""
    key = jax.random.key(config.seed + 1)
    opt_state = optimizer.init(variables.params)
    state = TrainState(jax.tree.map(jnp.copy, variables), opt_state, jnp.zeros((), jnp.int32), key)
    program, examples = functools.cache(program), jax.device_put(dict(examples))
    with Checkpointer(folder, keep=1) as checkpoints:
        done = 0
        if checkpoints.latest_step() is not None:
            done, state = checkpoints.restore(like=state)
        for first in range(done, steps, config.save_every):
            last = min(first + config.save_every, steps)
            state, losses = program(last - first)(state, examples)
            print(f"step {last}: {float(losses[-1].sum()):.4f} nats")
            checkpoints.save(last, state)
    return state.variables


def _sandwiches(config, net: Supernet, model: Model, task: Task, optimizer, steps: int) -> Callable:
    """`steps` steps of the sandwich rule as one compiled scan; state donated."""
    step = sandwich(net, model, task, optimizer, num_random=config.num_random)

    def one(state: TrainState, examples) -> tuple[TrainState, Array]:
        rows_key, key = jax.random.split(jax.random.fold_in(state.key, state.step))
        size = next(iter(examples.values())).shape[0]
        rows = jax.random.randint(rows_key, (config.batch_size,), 0, size)
        batch = {name: leaf[rows] for name, leaf in examples.items()}
        variables, opt_state, losses = step(state.variables, state.opt_state, batch, key)
        return TrainState(variables, opt_state, state.step + 1, state.key), losses

    run = lambda state, examples: jax.lax.scan(lambda s, _: one(s, examples), state, length=steps)
    return jax.jit(run, donate_argnums=0)


class Judge(NamedTuple):
    """How members are scored.

    Attributes:
      score: `(counts i32[n, G]) -> f32[n]` on validation rows, higher is better: accuracy, or the
        loss below zero. All members share one program.
      own: `(counts) -> Variables` of a member cut out, its statistics measured.
      report: `(variables) -> metrics` on test rows.
    """

    score: Callable[[np.ndarray], np.ndarray]
    own: Callable[[np.ndarray], Variables]
    report: Callable[[Variables], dict[str, float]]


def judge(config: SupernetConfig, data: Data, model: Model, trained: Trained) -> Judge:
    """Validation rows score, training rows measure statistics, test rows report."""
    net, task = trained.net, data.task
    metric, sign = ("accuracy", 1) if "label" in data.validation else ("loss", -1)
    number = config.calibration_batches * BATCH
    prepared = task.prepare(subsample(merge(data.train), number), None)[0]
    whole = len(jax.tree.leaves(prepared)[0]) // BATCH * BATCH
    batches = jax.tree.map(lambda x: x[:whole].reshape(-1, BATCH, *x.shape[1:]), prepared)
    rows = jax.tree.map(jnp.asarray, dict(subsample(data.validation, config.score_examples)))
    train = lambda v, x: model.apply(v, x, train=True)[1]
    measured = jax.jit(lambda v: recalibrate(train, v, batches))

    @jax.jit
    def scores(variables: Variables, counts: Array, rows) -> Array:
        def one(counts: Array) -> Array:
            member = recalibrate(train, net.mask(variables, counts), batches)
            totals = metric_totals(model.apply, member, task, rows, batch_size=BATCH)
            total, weight = (part.sum() for part in totals[metric])
            return sign * total / weight

        return jax.lax.map(one, counts)

    return Judge(
        lambda counts: np.asarray(scores(trained.variables, jnp.asarray(counts), rows)),
        lambda counts: measured(net.extract(trained.variables, counts)),
        lambda variables: evaluate(model.apply, variables, task, data.test, BATCH),
    )


def choose(config: SupernetConfig, data: Data, model: Model, trained: Trained) -> dict[str, Any]:
    """Finds, saves and reports the member of each budget."""
    net, by = trained.net, judge(config, data, model, trained)
    keys = jax.random.split(jax.random.key(config.seed + 2), 3)
    drawn = np.asarray(net.sample(keys[0], config.scored))
    known = by.score(drawn)
    predictor = fit_predictor(net, drawn, known, keys[1])
    print(f"{len(drawn)} members scored; ranks predicted: {predictor.rank_correlation:.2f}.")
    cost, full = _cost(config, data, model, net)
    metric = main_metric(list(by.report(trained.dense)))
    found = []
    for i, share in enumerate(config.shares):
        budget = Budget(config.cost, cost, share * full)
        bred = evolve(net, predictor.predict, [budget], jax.random.fold_in(keys[2], i))
        (same,) = net.members([budget])
        names, rows = ("evolved", "uniform"), np.stack([bred, same])
        validation = by.score(rows)
        tests = [by.report(by.own(counts)) for counts in rows]
        best = int(validation[1] > validation[0])
        variables = by.own(rows[best])
        found.append({
            "share": share,
            "kept": float(cost(jnp.asarray(rows[best], jnp.float32))) / full,
            "parameters": count_parameters(variables.params),
            "chosen": names[best],
            "validation": dict(zip(names, validation.tolist(), strict=True)),
            "test": dict(zip(names, tests, strict=True)),
        })  # fmt: skip
        _save(config, data, model, net, rows[best], variables, share)
        print(f"{share:.0%} of {config.cost}: {names[best]}, {tests[best][metric]:.4f} {metric}")
    ends = {name: by.report(by.own(n)) for name, n in
            (("largest", net.largest), ("smallest", net.smallest))}  # fmt: skip
    return {
        "members": found, "dense": by.report(trained.dense), **ends, "cost": config.cost,
        "rank_correlation": predictor.rank_correlation,
        "cloud": [[float(cost(jnp.asarray(n, jnp.float32))) / full, float(s)]
                  for n, s in zip(drawn, known, strict=True)],
    }  # fmt: skip


def _save(config, data: Data, model: Model, net: Supernet, counts, variables, share) -> None:
    folder = pathlib.Path(config.run_dir) / "members" / f"{share:g}"
    with Checkpointer(folder / "variables", keep=1) as checkpoints:
        if checkpoints.latest_step() != config.steps:  # a longer run goes on from a shorter one
            checkpoints.save(config.steps, variables)
    kept = [
        {"axis": group.axis, "layer": group.layer, "kept": int(count), "of": group.size}
        for group, count in zip(net.groups, counts, strict=True)
    ]
    (folder / "member.json").write_text(json.dumps(kept, indent=2) + "\n")
    if data.tokenizer is not None and config.alike:
        hub.save(model, variables, folder, tokenizer=data.tokenizer)


def main(config: SupernetConfig) -> None:
    """The whole run."""
    run_dir = open_run(config, config.run_dir)
    data = load_data(config.data, config.seed)
    model = make_model(config.network, data)
    results = choose(config, data, model, train(config, data, model))
    save_results(run_dir, "supernet", results)
    metric = main_metric(list(results["dense"]))
    for name in ("dense", "largest", "smallest"):
        print(f"test {metric}: {results[name][metric]:.4f} {name}")
    print(f"report: {write_report(run_dir)}")


if __name__ == "__main__":
    configs.run(main, SupernetConfig)
