"""What a candidate is worth: masked, re-estimated, scored on held-out examples.

Hundreds of candidates share one compiled program: their masks are arrays, and under `vmap` they
fold into the batch. Batch norm is re-estimated for every candidate before it is scored; without
that the reward means little (a pruned network with the statistics of the dense one is near chance).
The caller decides which examples serve which purpose and says so by `Splits`: the reward must use
neither examples that the dense model was trained on nor those that a result is reported on.
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
    """Rows of a data set by purpose; no row serves two.

    Attributes:
      calibration: rows for statistics and least squares; may be training examples.
      reward: rows that candidates are scored on.
      report: rows that are used once, for the result.
    """

    calibration: np.ndarray
    reward: np.ndarray
    report: np.ndarray


def split_rows(num_rows: int, calibration: int, reward: int, *, seed: int = 0) -> Splits:
    """Returns shuffled rows by purpose; those that remain are for the report.

    Args:
      num_rows: rows in all.
      calibration, reward: how many rows serve these purposes.
      seed: seed of the order.
    Raises:
      ValueError: nothing is left for the report.
    """
    if calibration + reward >= num_rows or min(calibration, reward) < 0:
        raise ValueError(
            f"calibration={calibration} and reward={reward} leave none of {num_rows} rows for the "
            "report; give fewer."
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
    """Returns the search problem of a model of this library on a task.

    Args:
      network: what `model_network` returned.
      variables: dense weights.
      order: which units go first, as `ranks` returns it.
      budgets: Budgets, or the arguments of `jaxfm.search.budgets` by name.
      task: what the model is for.
      reward: examples [N, ...] that candidates are scored on, in batches of `batch_size`.
      calibration: examples that batch norm is re-estimated on; None keeps the dense statistics.
      metric: one of the task's metrics; those of which less is better are negated.
      batch_size: examples per batch.
      width: candidates that are evaluated side by side; None means all of an `ask` on an
        accelerator and one on a CPU, where the activations of many candidates evict each other
        from the cache.
      repaired: whether candidates are scored after least squares (`repair`) on the calibration
        examples, which predicts their accuracy after fine-tuning better; each candidate then has
        its own weights.
      channel_multiple, fill: as in `projection`.
    Raises:
      ValueError: repaired without calibration examples.
    """
    if repaired and calibration is None:
        raise ValueError("repaired=True repairs on the `calibration` examples: give examples.")
    if isinstance(budgets, Mapping):
        budgets = make_budgets(network, **budgets)
    score = _scorer(network, task, metric, batch_size, repaired)
    side_by_side = width or (1 if jax.default_backend() == "cpu" else None)
    data = {
        "variables": variables,
        "order": tuple(order),
        "reward": dict(reward),
        "calibration": None
        if calibration is None
        else input_batches(task, calibration, batch_size),
    }

    def evaluate(data: PyTree, counts: Array) -> Array:
        size = side_by_side or counts.shape[0]
        return lax.map(lambda c: score(data, c), counts, batch_size=size)

    return problem(
        network.sizes,
        tuple(budgets),
        evaluate,
        data,
        channel_multiple=channel_multiple,
        fill=fill,
    )


def _scorer(
    network: Network, task: Task, metric: str, batch_size: int, repaired: bool
) -> Callable[[PyTree, Array], Array]:
    """Returns `(data, counts i32[G]) -> f32[]`, the score of one candidate, higher is better."""
    apply, train = masked(network, 0), masked(network, 1)
    sign = score_sign(metric)

    def score(data: PyTree, counts: Array) -> Array:
        own = masks(data["order"], counts)
        candidate = data["variables"]
        if repaired:
            merge = lambda x: x.reshape(-1, *x.shape[2:])
            candidate = repair(network, candidate, own, jax.tree.map(merge, data["calibration"]))
        if data["calibration"] is not None:
            run = lambda v, x: train(v, own, x)[1]
            candidate = recalibrate(run, candidate, data["calibration"])
        totals = metric_totals(
            lambda v, x, train=False: (apply(v, own, x), v.stats), candidate, task, data["reward"],
            batch_size=batch_size,
        )  # fmt: skip
        total, count = (part.sum() for part in totals[metric])
        return sign * total / count

    return score


def score_sign(metric: str) -> float:
    """Returns -1.0 for metrics of which less is better, else 1.0."""
    return -1.0 if metric in ("loss", "bits_per_byte", "perplexity") else 1.0


def input_batches(task: Task, examples: Examples, batch_size: int) -> PyTree:
    """Returns inputs [n, B, ...] of whole batches; fewer rows than one batch are one batch."""
    rows = len(next(iter(examples.values())))
    size = min(batch_size, rows)
    split = lambda x: jnp.asarray(x[: rows // size * size]).reshape(-1, size, *np.shape(x)[1:])
    whole = {name: split(x) for name, x in examples.items()}
    return jax.vmap(lambda batch: task.prepare(batch, None)[0])(whole)


def halving(
    result: Result, stages: Sequence[tuple[Callable[[Array], Array], int]], top: int
) -> tuple[np.ndarray, float]:
    """Evaluates the best candidates again, ever fewer on ever more examples.

    Args:
      result: result of a search; its `top` best distinct candidates enter the first stage.
      stages: `(evaluate: counts i32[n, G] -> scores f32[n], how many go on)`; of the last stage 1.
      top: candidates in the first stage.
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
