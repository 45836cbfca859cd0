"""The three figures that every federated run reports.

The global model on the global test set; each client's own model on its local test set; and the
mean of the clients that are served worst. The middle alone hides whom the average leaves behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.data.federation import Federation
from jaxfm.federated.algorithm import Algorithm, Bucket, client_variables
from jaxfm.federated.rounds import RunState
from jaxfm.model import Array, Key, PyTree
from jaxfm.tasks import Task
from jaxfm.tasks.direction import higher_is_better
from jaxfm.tasks.evaluation import evaluate


def client_metrics(
    algorithm: Algorithm,
    bucket_of: np.ndarray,
    task: Task,
    *,
    batch_size: int,
    key: Key | None = None,
) -> Callable[[RunState, Federation], dict[str, np.ndarray]]:
    """Returns `f(state, test) -> {metric: f64[C]}`: each client's own model on its own test rows.

    NaN for a client without test rows; for one whose metric is not finite though it has rows, the
    worst there is: infinity, or minus infinity where higher is better. One compiled scan over the
    clients of each bucket.

    Raises:
      ValueError: batch_size below 1, a bucket without a model; from f: another number of clients.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    members = [np.flatnonzero(np.asarray(bucket_of) == b) for b in range(len(algorithm.buckets))]
    runs = [_over_clients(bucket, task, batch_size, key) for bucket in algorithm.buckets]

    def measure(state: RunState, test: Federation) -> dict[str, np.ndarray]:
        num_clients = test.count.shape[0]
        if num_clients != len(bucket_of):
            raise ValueError(
                f"The test federation has {num_clients} clients, the run {len(bucket_of)}; give a "
                "client without test rows the count 0."
            )
        result: dict[str, np.ndarray] = {}
        for ids, run, memories in zip(members, runs, state.memories, strict=True):
            if not len(ids):
                continue
            sums = run(state.server, memories, test, ids)
            for name, (total, weight) in sums.items():
                total, weight = np.asarray(total, np.float64), np.asarray(weight, np.float64)
                column = result.setdefault(name, np.full(num_clients, np.nan))
                values = np.divide(total, weight, out=np.full(len(ids), np.nan), where=weight > 0)
                best = task.higher_is_better(name)
                worst = -np.inf if best else np.inf
                column[ids] = np.where((weight > 0) & ~np.isfinite(values), worst, values)
        return result

    return measure


def _over_clients(bucket: Bucket, task: Task, batch_size: int, key: Key | None) -> Callable:
    model = bucket.model
    if model is None:
        raise ValueError("A bucket without a model cannot be evaluated; give Bucket(model=...).")

    @jax.jit
    def run(server: PyTree, memories: PyTree, test: Federation, ids: Array):
        def batch_sums(variables, rows, place):
            """The sums over one batch; rows past the client's own have weight 0."""
            batch = {name: jnp.take(leaf, rows, axis=0) for name, leaf in test.examples.items()}
            own = batch.get("weight", jnp.ones(batch_size, jnp.float32))
            batch["weight"] = jnp.where(place, own, 0)
            inputs, targets, weight = task.prepare(batch, key)
            return task.metrics(model.apply(variables, inputs)[0], targets, weight)

        def one(_, slot):
            memory, client = slot
            rows, count = test.index.padded(client), test.count[client]
            rows = jnp.pad(rows, (0, -rows.shape[0] % batch_size))
            variables = client_variables(bucket, server, memory)

            def step(i, sums):
                own = lax.dynamic_slice(rows, (i * batch_size,), (batch_size,))
                real = i * batch_size + jnp.arange(batch_size) < count
                return jax.tree.map(jnp.add, sums, batch_sums(variables, own, real))

            shapes = jax.eval_shape(batch_sums, variables, rows[:batch_size], rows[:batch_size] > 0)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            # As many batches as this client has, not as many as the largest.
            return None, lax.fori_loop(0, -(-count // batch_size), step, zeros)

        return lax.scan(one, None, (memories, ids))[1]

    return run


def worst_decile(
    name: str, values: np.ndarray, better: Callable[[str], bool | None] = higher_is_better
) -> float:
    """The mean over the tenth (at least one) of clients with the worst values; NaNs left out.

    Args:
      name: of the metric.
      values: f64[C].
      better: `Task.higher_is_better`.
    Raises:
      ValueError: nobody says which way the metric is better.
    """
    best = better(name)
    if best is None:
        raise ValueError(
            f"Nobody says whether a higher {name!r} is better; give "
            f"Task(higher_is_better={{{name!r}: True}}.get), or False."
        )
    values = np.sort(values[~np.isnan(values)])
    if not values.size:
        return float("nan")
    some = math.ceil(values.size / 10)
    return float(values[:some].mean() if best else values[-some:].mean())


def three_metrics(
    per_client: Mapping[str, np.ndarray],
    overall: Mapping[str, float],
    better: Callable[[str], bool | None] = higher_is_better,
) -> dict[str, float]:
    """ "global/...", "personal/..." (mean over clients) and "worst_decile/..." of each metric.

    Metrics of which `better` (`Task.higher_is_better`) does not say the way have no worst decile.
    """
    result = {f"global/{name}": value for name, value in overall.items()}
    for name, values in per_client.items():
        some = values[~np.isnan(values)]
        result[f"personal/{name}"] = float(some.mean()) if some.size else float("nan")
        if better(name) is not None:
            result[f"worst_decile/{name}"] = worst_decile(name, values, better)
    return result


def global_metrics(
    algorithm: Algorithm,
    state: RunState,
    task: Task,
    examples: Mapping,
    *,
    batch_size: int,
    bucket: int | None = None,
    key: Key | None = None,
) -> dict[str, float]:
    """The metrics of the global model on one test set.

    Args:
      bucket: look at the model that clients of this bucket have, instead: a slice of the global
        one, say.
      key: for tasks that draw (masked_lm).
    Raises:
      ValueError: there is no network to evaluate by, or each client of the bucket has a model of
        its own (`client_metrics` measures those).
    """
    if bucket is None:
        model, variables = algorithm.model, state.server.variables
    else:
        chosen = algorithm.buckets[bucket]
        if chosen.personal is not None:
            raise ValueError(f"Clients of bucket {bucket} differ; measure them by client_metrics.")
        model, variables = chosen.model, chosen.shared(state.server)
    if model is None:
        raise ValueError("There is no network to evaluate by; give Algorithm and Bucket a model.")
    return evaluate(model.apply, variables, task, examples, batch_size, key=key)
