"""One training, a network for every device: a supernet and its best members within budgets.

    python -m jaxfm.launch.supernet
    python -m jaxfm.launch.supernet --shares=0.1,0.25,0.5 --cost=macs --kernels=5,3
    python -m jaxfm.launch.supernet --data.source=stdlib --data.partition=natural --alike

A dense model is trained and its channels are put in order of importance; then its largest, its
smallest and random members learn together, the smaller ones from the largest. Some members are
scored on validation rows, a predictor learns from them which ones are good, and evolution finds the
best one for each budget. It competes on validation rows with the member that keeps the same share
of everything; the better of the two is chosen. Test rows are used once, for the report. The run
folder holds config, results, report.html and members/<share>/: variables, member.json with what is
kept and, for language models with `--alike`, Hugging Face's files.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfm import config as configs
from jaxfm import hub, search
from jaxfm.checkpoint import Checkpointer
from jaxfm.data.dealing import subsample
from jaxfm.data.federation import merge
from jaxfm.launch.optimizers import make_optimizer
from jaxfm.launch.pretrain import TrainState, train_steps
from jaxfm.launch.report import write_report
from jaxfm.launch.setup import Data, load_data, make_model, save_classes
from jaxfm.launch.supernet_config import SupernetConfig
from jaxfm.model import Model, Variables, count_parameters
from jaxfm.models.by_name import width_axes
from jaxfm.parallel.mesh import make_mesh
from jaxfm.report.sections import main_metric
from jaxfm.run_folder import in_folder, open_run, save_results
from jaxfm.search import Budget, MemberChoice, Supernet

BATCH = 32  # rows per batch of scores and reports


class SupernetRun(NamedTuple):
    """A supernet after its training.

    Attributes:
      net: the supernet; `net.variables` are those before its members trained together.
      variables: those after.
      dense: those of the model before anything was elastic.
    """

    net: Supernet
    variables: Variables
    dense: Variables


def train(config: SupernetConfig, data: Data, model: Model) -> SupernetRun:
    """Runs both trainings, or what an earlier process has left of them."""
    optimizer, examples = make_optimizer(config.optimizer), merge(data.train)
    mesh = make_mesh(data=1)
    plain = lambda n: train_steps(model, data.task, optimizer, config.batch_size, n, mesh)
    start = model.init(jax.random.key(config.seed))
    _check(config, data, model, start)  # refuse now, not after an hour of training
    print(f"The dense model: {config.dense_steps} steps.")
    folder = pathlib.Path(config.run_dir)
    dense = _run(config, folder / "dense", plain, start, optimizer, examples, config.dense_steps)
    net = _elastic(config, data, model, dense)
    print(f"{len(net.groups)} elastic groups, together: {config.steps} steps.")
    together = lambda n: search.sandwich_steps(
        net, model, data.task, optimizer, config.batch_size, n, num_random=config.num_random
    )
    variables = _run(
        config, folder / "together", together, net.variables, optimizer, examples, config.steps
    )
    return SupernetRun(net, variables, dense)


def _elastic(config: SupernetConfig, data: Data, model: Model, variables: Variables) -> Supernet:
    axes = config.axes or width_axes(model)
    return search.supernet(
        model, variables, axes, shared=tuple(axes) if config.alike else ("embed",),
        channel_multiple=config.multiple, smallest=config.smallest, kernels=config.kernels,
    )  # fmt: skip


def _cost(config: SupernetConfig, data: Data, model: Model, net: Supernet) -> tuple[Any, float]:
    """Returns the cost `(counts) -> []`, and that of the largest member."""
    inputs = data.task.prepare({k: v[:1] for k, v in merge(data.train).items()}, None)[0]
    cost = net.parameters if config.cost == "parameters" else search.member_macs(net, model, inputs)
    return cost, float(cost(jnp.asarray(net.largest, jnp.float32)))


def _check(config: SupernetConfig, data: Data, model: Model, variables: Variables) -> None:
    """Raises a ValueError for axes, kernels and shares that this model cannot have."""
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


def choose(
    config: SupernetConfig, data: Data, model: Model, trained: SupernetRun
) -> dict[str, Any]:
    """Finds, saves and reports the member of each budget."""
    net, task = trained.net, data.task
    judge = search.judge_members(
        net, trained.variables, model, task,
        reward=subsample(data.validation, config.score_examples),
        calibration=subsample(merge(data.train), config.calibration_batches * BATCH),
        report=data.test, batch_size=BATCH,
    )  # fmt: skip
    cost, full = _cost(config, data, model, net)
    share_of = lambda counts: float(cost(jnp.asarray(counts, jnp.float32))) / full
    budgets = [Budget(config.cost, cost, share * full) for share in config.shares]
    key = jax.random.key(config.seed + 2)
    found = search.choose_members(net, judge, budgets, key, num_scored=config.scored)
    dense = judge.report(trained.dense)
    metric, members = main_metric(list(dense)), []
    for share, choice in zip(config.shares, found.choices, strict=True):
        members.append({
            "share": share,
            "kept": share_of(choice.counts),
            "parameters": count_parameters(choice.variables.params),
            "chosen": choice.name,
            "validation": choice.scores,
            "test": choice.reports,
        })  # fmt: skip
        _save(config, data, model, net, choice, share)
        value = choice.reports[choice.name][metric]
        print(f"{share:.0%} of {config.cost}: {choice.name}, {value:.4f} {metric}")
    return {
        "members": members,
        "dense": dense,
        "largest": judge.report(judge.extract(net.largest)),
        "smallest": judge.report(judge.extract(net.smallest)),
        "cost": config.cost,
        "rank_correlation": found.rank_correlation,
        "cloud": [[share_of(n), float(s)] for n, s in zip(found.counts, found.scores, strict=True)],
    }


def _save(
    config: SupernetConfig, data: Data, model: Model, net: Supernet, choice: MemberChoice,
    share: float,
) -> None:  # fmt: skip
    folder = pathlib.Path(config.run_dir) / "members" / f"{share:g}"
    with Checkpointer(folder / "variables", keep=1) as checkpoints:
        if checkpoints.latest_step() != config.steps:  # a longer run goes on from a shorter one
            checkpoints.save(config.steps, choice.variables)
    kept = [
        {"axis": group.axis, "layer": group.layer, "kept": int(count), "of": group.size}
        for group, count in zip(net.groups, choice.counts, strict=True)
    ]
    (folder / "member.json").write_text(json.dumps(kept, indent=2) + "\n")
    if data.tokenizer is not None and config.alike:
        hub.save(model, choice.variables, folder, tokenizer=data.tokenizer)


def main(config: SupernetConfig) -> None:
    """Trains the supernet, chooses its members and writes the report."""
    config = in_folder(config, "supernet", config.data.source)
    run_dir = open_run(config, config.run_dir)
    data = load_data(config.data, config.seed, config.network)
    model = make_model(config.network, data)
    results = choose(config, data, model, train(config, data, model))
    save_classes(run_dir, data)
    save_results(run_dir, "supernet", results)
    metric = main_metric(list(results["dense"]))
    for name in ("dense", "largest", "smallest"):
        print(f"test {metric}: {results[name][metric]:.4f} {name}")
    print(f"report: {write_report(run_dir)}")


if __name__ == "__main__":
    configs.run(main, SupernetConfig)
