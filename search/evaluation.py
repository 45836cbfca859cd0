"""What a candidate is worth: masked, its statistics measured anew, scored on held-out examples.

Hundreds of candidates share one compiled program: their masks are arrays, and under `vmap` they
fold into the batch. Batch norm is re-estimated for every candidate before it is scored; without
that the reward says next to nothing (a pruned network whose statistics are the dense one's is near
chance). Which examples serve what is the caller's business and is stated by `Splits`: the reward
must not see what the dense model was trained on, nor what a result is reported on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import Array, PyTree, Variables
from jaxfm.search.least_squares import repair
from jaxfm.search.ranking import Scores, masks
from jaxfm.search.recalibration import recalibrate
from jaxfm.search.strategies.loop import Result
from jaxfm.search.strategies.project import Budget
from jaxfm.search.strategies.project import budgets as make_budgets
from jaxfm.search.strategies.strategy import Problem, problem
from jaxfm.search.trace.groups import Network
from jaxfm.search.trace.interpret import masked
from jaxfm.tasks import Task
from jaxfm.tasks.evaluation import metric_totals

Examples = Mapping[str, Any]


class Splits(NamedTuple):
    """Rows of a data set by what they serve; no row serves two.

    Attributes:
      calibration: statistics and least squares; may be training examples.
      reward: the search sees their scores.
      report: touched once, for the figure.
    """

    calibration: np.ndarray
    reward: np.ndarray
    report: np.ndarray


def split_rows(num_rows: int, calibration: int, reward: int, *, seed: int = 0) -> Splits:
    """Shuffled rows dealt out: the remaining ones are for the report.

    Raises:
      ValueError: nothing is left for the report.
    """
    if calibration + reward >= num_rows or min(calibration, reward) < 0:
        raise ValueError(
            f"{calibration} rows to calibrate and {reward} to reward leave none of {num_rows} to "
            "report on."
        )
    rows = np.random.default_rng(seed).permutation(num_rows)
    return Splits(*np.split(rows, [calibration, calibration + reward]))


def task_problem(
    network: Network,
    variables: Variables,
    order: Scores,
    budgets: Sequence[Budget] | Mapping[str, float],
    task: Task,
    reward: Examples,
    *,
    calibration: Examples | None = None,
    metric: str = "accuracy",
    batch_size: int = 128,
    width: int | None = None,
    repaired: bool = False,
    channel_multiple: int = 1,
    fill: bool = True,
) -> Problem:
    """The search problem of a model of ours on a task.

    Args:
      network: of `model_network`.
      variables: dense weights.
      order: `importance.ranks`: which units go first.
      budgets: or the arguments of `jaxfm.search.budgets` by name.
      reward: examples [N, ...] that candidates are scored on, in batches of `batch_size`.
      calibration: examples that batch norm is measured anew on; None keeps the dense statistics.
      metric: of the task, higher is better; "loss" and "bits_per_byte" are negated.
      width: candidates side by side; None: all of an `ask` on an accelerator, 1 on a CPU, where
        activations of many candidates only push each other out of the cache.
      repaired: score candidates after least squares (`repair`) on the calibration examples, which
        tells more of what fine-tuning makes of them; weights then differ by candidate.
      channel_multiple, fill: as in `project.projection`.
    Raises:
      ValueError: repaired without calibration examples.
    """
    if repaired and calibration is None:
        raise ValueError("repaired=True takes least squares on `calibration`; give examples.")
    if isinstance(budgets, Mapping):
        budgets = make_budgets(network, **budgets)
    apply, train = masked(network, 0), masked(network, 1)
    sign = -1.0 if metric in ("loss", "bits_per_byte", "perplexity") else 1.0
    chosen = width or (1 if jax.default_backend() == "cpu" else None)
    data = {
        "variables": variables,
        "order": tuple(order),
        "reward": dict(reward),
        "calibration": _batches(task, calibration, batch_size),
    }

    def one(data: PyTree, counts: Array) -> Array:
        own = masks(data["order"], counts)
        there = data["variables"]
        if repaired:
            merge = lambda x: x.reshape(-1, *x.shape[2:])
            there = repair(network, there, own, jax.tree.map(merge, data["calibration"]))
        if data["calibration"] is not None:
            run = lambda v, x: train(v, own, x)[1]
            there = recalibrate(run, there, data["calibration"])
        totals = metric_totals(
            lambda v, x, train=False: (apply(v, own, x), v.stats), there, task, data["reward"],
            batch_size=batch_size,
        )  # fmt: skip
        total, count = (part.sum() for part in totals[metric])
        return sign * total / count

    def evaluate(data: PyTree, counts: Array) -> Array:
        return lax.map(lambda c: one(data, c), counts, batch_size=chosen or counts.shape[0])

    return problem(
        network.sizes, tuple(budgets), evaluate, data, channel_multiple=channel_multiple, fill=fill
    )


def _batches(task: Task, examples: Examples | None, batch_size: int) -> PyTree:
    """Inputs [n, B, ...] of whole batches; fewer rows than one batch are one batch."""
    if examples is None:
        return None
    rows = len(next(iter(examples.values())))
    size = min(batch_size, rows)
    cut = lambda x: jnp.asarray(x[: rows // size * size]).reshape(-1, size, *np.shape(x)[1:])
    whole = {name: cut(x) for name, x in examples.items()}
    return jax.vmap(lambda batch: task.prepare(batch, None)[0])(whole)


def halving(
    result: Result, stages: Sequence[tuple[Callable[[Array], Array], int]], top: int
) -> tuple[np.ndarray, float]:
    """Successive halving: the best candidates again, ever fewer on ever more examples.

    Args:
      result: of a search; its `top` best distinct candidates enter the first stage.
      stages: `(evaluate: counts i32[n, G] -> scores f32[n], how many go on)`, the last one 1.
    Returns:
      (counts i32[G], its score in the last stage).
    Source: Jamieson and Talwalkar 2016.
    """
    scores = np.where(np.isnan(result.scores), -np.inf, result.scores)
    order = np.argsort(-scores, kind="stable")
    _, first = np.unique(result.counts[order], axis=0, return_index=True)
    alive = result.counts[order[np.sort(first)[:top]]]
    best = -np.inf
    for evaluate, survivors in stages:
        again = np.asarray(evaluate(jnp.asarray(alive)))
        chosen = np.argsort(-again, kind="stable")[:survivors]
        alive, best = alive[chosen], float(again[chosen[0]])
    return alive[0], best


recalibrated = recalibrate  # its former name
