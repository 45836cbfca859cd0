"""What follows a search: cut, re-estimate statistics, repair, fine-tune, measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfm.model import Variables
from jaxfm.search.evaluation import input_batches, score_sign
from jaxfm.search.fine_tuning import fine_tuner
from jaxfm.search.latency import measure
from jaxfm.search.least_squares import repair as least_squares
from jaxfm.search.pruning import Pruned, pruned
from jaxfm.search.recalibration import recalibrate
from jaxfm.search.session import Rows, Selection
from jaxfm.search.trace.cost import costs, counts_of, nominal_macs
from jaxfm.search.trace.groups import Kept, Network
from jaxfm.search.trace.interpret import cut, full, sliced
from jaxfm.tasks import Task, evaluate

Metrics = dict[str, float]


class Refinement(NamedTuple):
    """A cut model after repair and fine-tuning.

    Attributes:
      model: the pruned model with the parameters that are kept.
      stages: metrics on the report rows after each stage; the last stage, "kept", is the model.
    """

    model: Pruned
    stages: dict[str, Metrics]


def refine(
    variables: Variables,
    selection: Selection,
    task: Task,
    rows: Rows,
    optimizer: optax.GradientTransformation,
    *,
    repair: bool = True,
    finetune_epochs: int = 3,
    batch_size: int = 64,
    seed: int = 0,
) -> Refinement:
    """Cuts a model, re-estimates its statistics, repairs and fine-tunes it.

    The parameters after repair and after fine-tuning are kept only where they are better on the
    reward rows.

    Args:
      variables: those of the dense model.
      selection: what `select_units` returned.
      task: what the model is for.
      rows: examples by purpose.
      optimizer: of the fine-tuning.
      repair: whether the remaining weights are repaired by least squares on the calibration rows.
      finetune_epochs: passes over the training rows; 0 means no fine-tuning.
      batch_size: examples per batch.
      seed: seed of the fine-tuning.
    """
    network, kept = selection.network, selection.kept
    small, train = pruned(network, variables, kept), sliced(network, kept, 1)
    apply = lambda v, x, train=False: (small.apply(v, x), v.stats)
    report = lambda v: evaluate(apply, v, task, rows.report, batch_size)
    metric = "accuracy" if "label" in rows.reward else "loss"
    score = lambda v: score_sign(metric) * evaluate(apply, v, task, rows.reward, batch_size)[metric]
    better = lambda new, old: new if score(new) >= score(old) else old

    batches = input_batches(task, rows.calibration, 64)
    calibrate = jax.jit(lambda v: recalibrate(lambda v, x: train(v, x)[1], v, batches))
    stages = {"before calibration": report(small.params)}
    params = calibrate(small.params)
    stages["after calibration"] = report(params)
    if repair:
        inputs, masks = task.prepare(rows.calibration, None)[0], tuple(map(jnp.asarray, kept))
        repaired = jax.jit(lambda v, x: least_squares(network, v, masks, x))(variables, inputs)
        repaired = calibrate(cut(network, repaired, kept))
        stages["after repair"] = report(repaired)
        params = better(repaired, params)
    if finetune_epochs:
        fit = fine_tuner(lambda v, x, key: train(v, x), task, optimizer, batch_size)
        steps = max(1, finetune_epochs * len(next(iter(rows.train.values()))) // batch_size)
        tuned = fit(params, rows.train, steps, jax.random.key(seed + 3))
        stages["after fine-tuning"] = report(tuned)
        params = better(tuned, params)
    stages["kept"] = report(params)
    return Refinement(small._replace(params=params), stages)


def measure_speed(
    variables: Variables, selection: Selection, task: Task, rows: Rows
) -> dict[str, tuple[float, float]]:
    """Returns (dense, pruned) seconds of one call at batches of 1 and of 32 calibration rows."""
    network, prepared = selection.network, task.prepare(rows.calibration, None)[0]
    speed = {}
    for size in (1, 32):
        inputs = jax.tree.map(lambda x, n=size: x[:n], prepared)
        time = lambda kept, x=inputs: measure(network, variables, kept, (x,))
        speed[f"batch {size}"] = (time(full(network)), time(selection.kept))
    return speed


def summarise(selection: Selection, refinement: Refinement) -> dict[str, Any]:
    """Returns what a report shows of a search, as JSON values."""
    network, result = selection.network, selection.result
    return {
        "seconds": selection.seconds,
        "stages": refinement.stages,
        "costs": refinement.model.table() | {"nominal_macs": _nominal(network, selection.kept)},
        "ratios": refinement.model.ratios(),
        "curve": result.curve.tolist(),
        "scores": result.scores.tolist(),
        "macs": cost_shares(network, result.counts, "macs"),
        "parameters": cost_shares(network, result.counts, "parameters"),
        "frozen": network.frozen,
        "unknown": network.unknown,
    }


def cost_shares(network: Network, counts: np.ndarray, name: str) -> list[float]:
    """Returns a cost of each of counts i32[n, G] as a share of the dense network's."""
    cost: Callable = getattr(costs(network), name)
    dense = cost(network.sizes.astype(np.int64))
    return [float(cost(row.astype(np.int64)) / dense) for row in counts]


def _nominal(network: Network, kept: Kept) -> tuple[float, float]:
    count = nominal_macs(network)
    dense, now = network.sizes.astype(np.int64), counts_of(network, kept)
    return float(count(dense)), float(count(now))
