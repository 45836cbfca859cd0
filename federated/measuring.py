"""What a run measures while it trains, and what it measures on the test sets at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxfm.data.dealing import Data, subsample
from jaxfm.federated.accounting.metrics import global_metrics, three_metrics
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.rounds import RunState
from jaxfm.model import Key
from jaxfm.tasks import Task

EVAL_BATCH = 32


def evaluation_key(task: Task) -> Key | None:
    """The key that a task evaluates with, the same each time; None where it draws nothing."""
    return jax.random.key(0) if task.draws else None


def trained_bucket(algorithm: Algorithm, bucket_of: np.ndarray) -> int | None:
    """The bucket whose model stands for the global one; None: the global model itself.

    Where buckets hold nested slices (`Algorithm.is_nested`), what lies outside the largest one that
    has clients is never trained, and the full model would be scored as it was drawn.
    """
    return int(np.min(bucket_of)) if algorithm.is_nested else None


def validation(
    algorithm: Algorithm,
    state: RunState,
    data: Data,
    examples: Mapping,
    measure: Callable,
    bucket_of: np.ndarray,
) -> dict[str, float]:
    """Metrics of the shared models on validation rows, and of clients' own on theirs.

    Args:
      examples: validation rows of the server.
      bucket_of: i32[C], who trains what.
      measure: of `client_metrics`.
    """
    line: dict[str, float] = {}
    buckets: list[int | None] = [
        b for b, bucket in enumerate(algorithm.buckets) if bucket.personal is None
    ]
    first = trained_bucket(algorithm, bucket_of) or 0
    for b in buckets or ([None] if algorithm.model else []):
        if b is not None and b < first:
            continue  # nobody trains it
        prefix = f"validation/bucket{b}" if b and b != first else "validation"
        metrics = _on_server(algorithm, state, data, examples, b)
        line |= {f"{prefix}/{name}": value for name, value in metrics.items()}
    if data.local_validation is not None:
        own = three_metrics(measure(state, data.local_validation), {}, data.task.higher_is_better)
        line |= {name: value for name, value in own.items() if name.startswith("personal/")}
    return line


def final_metrics(
    algorithm: Algorithm,
    state: RunState,
    data: Data,
    bucket_of: np.ndarray,
    measure: Callable,
    test_examples: int = 0,
) -> tuple[dict[str, float], list[dict[str, float]], dict[str, np.ndarray]]:
    """The three metrics on the test sets, those of each bucket, and those of each client."""
    test = subsample(data.test, test_examples)
    own = measure(state, data.local_test)

    def of_bucket(b: int) -> dict[str, float]:
        if algorithm.buckets[b].personal is None:
            return _on_server(algorithm, state, data, test, b)
        return {name: _mean(values[bucket_of == b]) for name, values in own.items()}

    buckets = [of_bucket(b) for b in range(len(algorithm.buckets))]
    first = trained_bucket(algorithm, bucket_of)
    same = first if first is not None else _bucket_of_the_global_model(algorithm, state)
    overall = {}
    if same is not None and algorithm.buckets[same].personal is None:
        overall = buckets[same]  # measured once: the test set may be large
    elif algorithm.model:
        overall = _on_server(algorithm, state, data, test, first)
    return three_metrics(own, overall, data.task.higher_is_better), buckets, own


def _bucket_of_the_global_model(algorithm: Algorithm, state: RunState) -> int | None:
    """The first bucket whose clients predict with the global model itself; None: none does."""
    for b, bucket in enumerate(algorithm.buckets):
        whole = bucket.shared(state.server) is state.server.variables
        if whole and bucket.model is algorithm.model and bucket.personal is None:
            return b
    return None


def _on_server(
    algorithm: Algorithm, state: RunState, data: Data, examples: Mapping, bucket: int | None
) -> dict[str, float]:
    return global_metrics(
        algorithm, state, data.task, examples, batch_size=EVAL_BATCH, bucket=bucket,
        key=evaluation_key(data.task),
    )  # fmt: skip


def _mean(values: np.ndarray) -> float:
    some = values[~np.isnan(values)]
    return float(some.mean()) if some.size else float("nan")
