"""Latency as a budget: a few coefficients, fitted to compiled slices on this machine.

    seconds = Σ over kinds of (a · times run + b · multiply-adds + c · values moved)

The kinds are convolution, grouped convolution and matrix product. No coefficient is negative, so
that cutting a unit never makes the model slower and the projection onto a budget holds. The fit
reports its mean relative error on slices that it did not see.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import PyTree
from jaxfm.search.strategies.project import Budget
from jaxfm.search.trace.cost import AxisTable, Expression, contractions, counts_of
from jaxfm.search.trace.groups import Kept, Network
from jaxfm.search.trace.interpret import cut, full, sliced


class Latency(NamedTuple):
    """A fitted table of coefficients.

    Attributes:
      seconds: `(counts [G]) -> []`, duration of one call.
      coefficients: f64[9], one for each of `features`.
      error: mean relative error on held-out slices.
      dense_s: measured seconds of the dense network.
    """

    seconds: Expression
    coefficients: np.ndarray
    error: float
    dense_s: float

    def budget(self, share: float) -> Budget:
        """Returns a budget of at most a share of the dense network's seconds.

        For a limit in seconds give `Budget("latency", table.seconds, limit)`.

        Raises:
          ValueError: a share that is not in (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(f"share={share} must be a share of the dense latency, in (0, 1].")
        return Budget("latency", self.seconds, share * self.dense_s)


def features(network: Network) -> Callable[[Any], Any]:
    """Returns `(counts [G]) -> [9]`: runs, multiply-adds and values moved by kind of operation."""
    plan = network.plan(0, *network.example)
    found = contractions(plan)
    table = AxisTable(network.groups)
    macs = table.products([c.axes for c in found], [float(c.times) for c in found])
    moved = [(plan.axes[c.op.outputs[0]], c.times) for c in found]
    moved += [(plan.axes[i], c.times) for c in found for i in c.op.inputs if isinstance(i, int)]
    owner = list(range(len(found)))
    owner += [n for n, c in enumerate(found) for i in c.op.inputs if isinstance(i, int)]
    values = table.products([axes for axes, _ in moved], [float(times) for _, times in moved])
    kind = np.array([_kind(c.op) for c in found])
    share = (kind[None] == np.arange(3)[:, None]).astype(np.float32)
    share_moved = share[:, owner]
    times = share @ np.array([c.times for c in found], np.float32)

    def evaluate(counts: Any) -> Any:
        parts = (times, share @ macs(counts), share_moved @ values(counts))
        known = isinstance(counts, np.ndarray)
        return np.concatenate(parts) if known else jnp.concatenate(list(map(jnp.asarray, parts)))

    return evaluate


def fit_latency(
    network: Network, params: PyTree, *inputs: PyTree, samples: int = 16, repeats: int = 10,
    held_out: float = 0.25, seed: int = 0,
) -> Latency:  # fmt: skip
    """Measures random slices and fits the table to them.

    Args:
      network: whose slices are measured.
      params: its dense parameters.
      *inputs: arrays of the shapes that will be served.
      samples: number of slices that are compiled and timed, the dense network among them.
      repeats: calls of each slice; the median counts.
      held_out: share of the slices that only measure the error.
      seed: seed of the random slices.
    Raises:
      ValueError: too few samples to fit and test.
    """
    test = round(samples * held_out)
    if samples - test < 4 or test < 1:
        raise ValueError(
            f"samples={samples} with held_out={held_out} is too few: fit to at least 4, test on 1."
        )
    rng = np.random.default_rng(seed)
    chosen = [full(network), *(_random(network, rng) for _ in range(samples - 1))]
    seconds = np.array([measure(network, params, kept, inputs, repeats) for kept in chosen])
    table = features(network)
    rows = np.stack([table(counts_of(network, kept)) for kept in chosen])
    scale = np.maximum(rows.max(0), 1e-30)
    # Errors are relative, so that small slices weigh as much as the dense network.
    fitted = slice(0, samples - test)
    from scipy.optimize import nnls  # late: it takes a second

    weights, _ = nnls(rows[fitted] / scale / seconds[fitted, None], np.ones(samples - test))
    coefficients = weights / scale
    guess = rows[samples - test :] @ coefficients
    error = float(np.mean(np.abs(guess / seconds[samples - test :] - 1)))
    return latency_of(network, coefficients, error, float(seconds[0]))


def latency_of(network: Network, coefficients: np.ndarray, error: float, dense_s: float) -> Latency:
    """Returns the table of coefficients that were fitted before to the same network."""
    table, narrow = features(network), coefficients.astype(np.float32)

    def predict(counts: Any) -> Any:
        known = isinstance(counts, np.ndarray)
        return table(counts) @ (coefficients if known else jnp.asarray(narrow))

    return Latency(predict, coefficients, error, dense_s)


def saved_latency(
    path: str | os.PathLike | None, network: Network, params: PyTree, *inputs: PyTree
) -> Latency:
    """Returns the table in a JSON file, or fits one and writes it there.

    A run that goes on so keeps its table, and with it its candidates.

    Args:
      path: the file; None fits a table and writes nothing.
      network, params, *inputs: as in `fit_latency`.
    """
    if path is not None and os.path.exists(path):
        kept = json.loads(pathlib.Path(path).read_text())
        coefficients = np.array(kept["coefficients"])
        return latency_of(network, coefficients, kept["error"], kept["dense_s"])
    table = fit_latency(network, params, *inputs)
    if path is not None:
        kept = {
            "coefficients": table.coefficients.tolist(),
            "error": table.error,
            "dense_s": table.dense_s,
        }
        pathlib.Path(path).write_text(json.dumps(kept) + "\n")
    return table


def measure(
    network: Network, params: PyTree, kept: Kept, inputs: Sequence[PyTree], repeats: int = 10
) -> float:
    """Returns the median seconds of one call of the compiled slice."""
    small = cut(network, params, kept)
    compiled = jax.jit(sliced(network, kept)).lower(small, *inputs).compile()
    return seconds(lambda: compiled(small, *inputs), repeats)


def seconds(call: Callable[[], PyTree], repeats: int = 10) -> float:
    """Returns the median seconds of a call, after a first one that is not counted."""
    jax.block_until_ready(call())
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _kind(op: Any) -> int:
    if op.name == "dot_general":
        return 2
    return int(op.params["feature_group_count"] > 1)


def _random(network: Network, rng: np.random.Generator) -> Kept:
    """Returns a slice of random size; small and large ones are equally likely."""
    level, out = rng.uniform(0.1, 0.9), []
    for group in network.groups:
        count = int(np.clip(round(group.size * (level + rng.uniform(-0.15, 0.15))), 1, group.size))
        mask = np.arange(group.size) < count
        out.append(np.tile(mask, (group.layers, 1)) if group.layers else mask)
    return tuple(out)
