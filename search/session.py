"""A whole search: a dense model and rows by purpose in, the units that stay out.

`select_units` traces the model, searches within its budgets and judges the best candidates again;
`jaxfm.search.refinement` cuts, repairs and fine-tunes what it selected.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfm.checkpoint import Checkpointer
from jaxfm.data.dealing import subsample
from jaxfm.hub import has_format
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.search.evaluation import Examples, halving, task_problem
from jaxfm.search.fine_tuning import task_loss
from jaxfm.search.latency import saved_latency
from jaxfm.search.ranking import gradient, importance, keep, ranks
from jaxfm.search.strategies.gnn_rl import save_policy, transfer_policy
from jaxfm.search.strategies.loop import Result, run
from jaxfm.search.strategies.named import make_strategy, round_evaluations
from jaxfm.search.strategies.project import Budget, budgets, projection
from jaxfm.search.strategies.strategy import Problem, Strategy
from jaxfm.search.trace.groups import Kept, Network, Scores
from jaxfm.search.trace.models import model_network
from jaxfm.tasks import Task


class Rows(NamedTuple):
    """Examples by purpose.

    Attributes:
      train: for training.
      calibration: for statistics and repair; may be some of `train`.
      reward: what candidates are scored on.
      aside: all that `reward` was drawn from; the best candidates are judged again on more of it.
      report: what nothing looks at until the end.
    """

    train: Examples
    calibration: Examples
    reward: Examples
    aside: Examples
    report: Examples


class Selection(NamedTuple):
    """The outcome of a search.

    Attributes:
      network: the network of the dense model.
      kept: the units that stay.
      result: all candidates and the best one.
      seconds: duration of the search.
    """

    network: Network
    kept: Kept
    result: Result
    seconds: float


def select_units(
    model: Model,
    variables: Variables,
    task: Task,
    rows: Rows,
    shares: Mapping[str, float],
    *,
    strategy: str = "gnn_rl",
    policy: PyTree = None,
    importance: str = "l2",
    channel_multiple: int = 1,
    evaluations: int = 256,
    finalists: int = 8,
    score_repaired: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    log: Callable[[str], None] = print,
) -> Selection:
    """Searches the units of a model that stay within budgets.

    Args:
      model: the dense model.
      variables: its trained variables.
      task: what it is for.
      rows: examples by purpose.
      shares: shares of the dense costs that remain: "macs", "parameters", "parameter_bytes",
        "activation_bytes" and "latency" (of a batch of 32, by a table fitted on this machine).
      strategy: one of `STRATEGY_NAMES`.
      policy: for "gnn_rl", parameters to start from (`load_policy`); None starts at random.
      importance: which units of a group stay, one of `jaxfm.search.ranking.KINDS`.
      channel_multiple: groups keep multiples of it, or all units.
      evaluations: candidates that the strategy may try.
      finalists: how many of the best candidates are judged again, on 4 and 16 times the rows; 0
        takes the best one as it is.
      score_repaired: score after least squares: slower, but it predicts the final accuracy better.
      batch_size, seed: examples per batch; of the search.
      folder: for checkpoints, from which a stopped search goes on, the latency table and the
        policy of "gnn_rl"; None keeps nothing.
      log: takes lines that say what happens.
    Raises:
      ValueError: no budget, one that cannot be met, or an unknown name.
    """
    inputs = task.prepare(first_rows(rows.calibration, batch_size), None)[0]
    network = _network(model, variables, inputs, log)
    limits = _limits(network, variables, inputs, shares, folder, log)
    scores = _importance(
        network, model, variables, task, rows, importance, inputs, batch_size, seed
    )
    order = ranks(scores)
    judged_on = lambda examples: task_problem(
        network, variables, order, limits, task, examples, calibration=rows.calibration,
        metric="accuracy" if "label" in rows.reward else "loss", batch_size=batch_size,
        channel_multiple=channel_multiple, repaired=score_repaired,
    )  # fmt: skip
    problem = judged_on(rows.reward)
    chosen = make_strategy(
        strategy, network, variables, problem, scores, evaluations=evaluations,
        macs_share=shares.get("macs", 0.5), policy=policy,
    )  # fmt: skip
    evaluations = round_evaluations(strategy, chosen, evaluations)
    log(f"{len(network.groups)} groups; {strategy} tries {evaluations} candidates.")
    start = time.perf_counter()
    result = _run(problem, chosen, evaluations, jax.random.key(seed + 2), folder)
    if strategy == "gnn_rl" and folder is not None:
        path = pathlib.Path(folder) / "policy.safetensors"
        save_policy(path, transfer_policy(result.state.strategy))
    kept = keep(order, _best(result, rows, judged_on, finalists))
    return Selection(network, kept, result, time.perf_counter() - start)


def check_shares(
    model: Model, variables: Variables, task: Task, rows: Rows, shares: Mapping[str, float],
    *, channel_multiple: int = 1,
) -> None:  # fmt: skip
    """Raises ValueError where no slice of the model meets the budgets; before it is trained, say.

    Args:
      model, variables, task, rows, shares, channel_multiple: as in `select_units`; a latency is
        not checked, since it would have to be measured.
    """
    named = {name: float(share) for name, share in shares.items() if share and name != "latency"}
    if named:
        inputs = task.prepare(first_rows(rows.calibration, 1), None)[0]
        network = _network(model, variables, inputs, lambda line: None)
        limits = budgets(network, **named)
        projection(network.sizes, limits, channel_multiple=channel_multiple)


def _network(
    model: Model, variables: Variables, inputs: PyTree, log: Callable[[str], None]
) -> Network:
    # A config of a model's family states one size for all heads.
    whole = ("qk_dim", "v_dim") if has_format(model) else ()
    network = model_network(model, variables, inputs, whole=whole)
    if network.unknown:
        log(f"Primitives without a rule freeze what they touch: {network.unknown}.")
    return network


def _run(problem: Problem, strategy: Strategy, evaluations: int, key: Key, folder) -> Result:
    """The search, from its last checkpoint in the folder if there is one."""
    with _checkpoints(folder) as checkpoints:
        return run(problem, strategy, evaluations, key, checkpoints=checkpoints, every=4)


def first_rows(examples: Examples, count: int) -> dict[str, Any]:
    """Returns the first `count` rows, or as many as there are."""
    return {name: leaf[:count] for name, leaf in examples.items()}


def _checkpoints(folder: str | os.PathLike | None) -> Any:
    if folder is None:
        return contextlib.nullcontext()
    return Checkpointer(pathlib.Path(folder) / "search", keep=1)


def _limits(
    network: Network, variables: Variables, inputs: PyTree, shares: Mapping[str, float],
    folder: str | os.PathLike | None, log: Callable[[str], None],
) -> list[Budget]:  # fmt: skip
    named = {name: float(share) for name, share in shares.items() if share}
    latency = named.pop("latency", 0.0)
    limits = list(budgets(network, **named))
    if latency:
        path = None if folder is None else pathlib.Path(folder) / "latency.json"
        table = saved_latency(path, network, variables, jax.tree.map(lambda x: x[:32], inputs))
        log(f"Latency table: {table.error:.0%} off on slices that it did not see.")
        limits.append(table.budget(latency))
    return limits


def _importance(
    network: Network, model: Model, variables: Variables, task: Task, rows: Rows, kind: str,
    inputs: PyTree, batch_size: int, seed: int,
) -> Scores:  # fmt: skip
    slope = None
    if kind == "taylor":
        forward = lambda v, x, key: model.apply(v, x, train=True, key=key)
        loss, key = task_loss(forward, task), jax.random.key(seed)
        batch = first_rows(rows.train, batch_size)
        total = lambda v: loss(v.params, v, batch, key)[0]
        slope = jax.jit(lambda v: gradient(total, v))(variables)
    given = (inputs,) if kind == "activation" else ()
    return importance(network, variables, kind, gradient=slope, inputs=given)


def _best(
    result: Result, rows: Rows, judged_on: Callable[[Examples], Problem], finalists: int
) -> np.ndarray:
    """Returns the best finalist on ever more rows; the best on few rows may only be lucky."""
    few, most = (len(next(iter(part.values()))) for part in (rows.reward, rows.aside))
    if not finalists or few == most:
        return result.best_counts

    def judge(count: int) -> Callable[[Array], Array]:
        problem = judged_on(subsample(rows.aside, min(count, most)))
        return lambda counts: jax.jit(problem.evaluate)(problem.data, counts)

    stages = [(judge(4 * few), max(1, finalists // 4)), (judge(16 * few), 1)]
    return halving(result, stages, finalists)[0]
