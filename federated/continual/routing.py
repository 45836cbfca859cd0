"""An adapter for each stage of a stream, and a router that chooses among them for each row.

    prototypes[t, c] = mean of q(x) over the rows of class c in stage t
    stage of x       = argmin over t of min over c of |q(x) - prototypes[t, c]|

Every stage trains an adapter of its own from the same start, so that nothing of an earlier one is
touched and forgetting is what the router confuses. q does not change: prototypes are sums over
clients' rows, which they send once at the end of a stage. Source: Wang et al. 2023 (S-Prompts
learning), section 3.2, with one prototype for each class in the place of K-Means.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxfm.data.federation import Federation
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.continual.learning import Scores, checkpoints, scores, stops
from jaxfm.federated.continual.stream import Stage
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import compile_rounds
from jaxfm.model import Array, Model, PyTree, Variables
from jaxfm.preemption import Preempted
from jaxfm.tasks import Task

# inputs of the model -> vectors [B, Q]
Query = Callable[[Any], Array]


class Bank(NamedTuple):
    """What a stream has left behind; stages that are to come are zeros.

    Attributes:
      params: of the adapters, leaves [T, ...].
      prototypes: f32[T, K, Q].
      number: f32[T, K], rows that each prototype is the mean of.
      accuracy: f64[T, T], R of `Scores`.
    """

    params: PyTree
    prototypes: Any
    number: Any
    accuracy: Any


class Routed(NamedTuple):
    """A run over a stream: `variables.params` of every stage in `bank`, and how well they do."""

    bank: Bank
    scores: Scores


def flattened(inputs: Any) -> Array:
    """The query of images and columns of numbers: the inputs themselves, f32[B, Q].

    Raises:
      ValueError: a dict of inputs, such as tokens and a mask.
    """
    if isinstance(inputs, Mapping):
        raise ValueError(
            f"The inputs are a dict of {sorted(inputs)}; give a query that makes vectors of them."
        )
    return inputs.reshape(len(inputs), -1).astype(jnp.float32)


def prototype_sums(
    query: Query, task: Task, federation: Federation, num_classes: int
) -> tuple[Array, Array]:
    """Sums of vectors f32[K, Q] by class over all clients, and their numbers f32[K].

    Args:
      query, task: what a row's vector and label are.
      federation: with a leaf "label".
      num_classes: K.
    """

    @jax.jit
    def of_client(rows: Mapping[str, Array], real: Array) -> tuple[Array, Array]:
        inputs, label, _ = task.prepare(dict(rows), None)
        share = jax.nn.one_hot(label, num_classes) * real[:, None]
        return share.T @ query(inputs), share.sum(0)

    totals = None
    for client in range(len(federation.count)):
        index = federation.index.padded(client)
        real = (np.arange(len(index)) < federation.count[client]).astype(np.float32)
        rows = {name: np.asarray(x)[index] for name, x in federation.examples.items()}
        own = of_client(rows, real)
        totals = own if totals is None else jax.tree.map(jnp.add, totals, own)
    assert totals is not None
    return totals


def route(vectors: Array, prototypes: Array, number: Array) -> Array:
    """i32[B], the stage of the nearest prototype; those of no row are nobody's.

    Args:
      vectors: f32[B, Q].
      prototypes, number: of a `Bank`.
    """
    gaps = jnp.square(vectors[:, None, None] - prototypes[None]).sum(-1)
    gaps = jnp.where(number[None] > 0, gaps, jnp.inf)
    return jnp.argmin(gaps.min(-1), axis=1).astype(jnp.int32)


def predict(
    model: Model, variables: Variables, bank: Bank, inputs: Any, *, query: Query = flattened
) -> Array:
    """Outputs [B, ...], of each row by the adapter that it is routed to; traceable.

    Args:
      model: with an adapter.
      variables: whose backbone is shared.
      bank: of `learn_adapters`.
      inputs: of the model.
      query: as there.
    """
    chosen = route(query(inputs), bank.prototypes, bank.number)
    one = lambda params: model.apply(variables._replace(params=params), inputs)[0]
    outputs = lax.map(one, bank.params)  # [T, B, ...]
    return jax.vmap(lambda own, stage: own[stage], in_axes=(1, 0))(outputs, chosen)


def learn_adapters(
    algorithm: Algorithm,
    model: Model,
    task: Task,
    stages: Sequence[Stage],
    variables: Variables,
    *,
    cohort_size: int,
    num_classes: int,
    query: Query = flattened,
    seed: int = 0,
    metric: str = "accuracy",
    folder: str | pathlib.Path | None = None,
    mesh: Mesh | None = None,
) -> Routed:
    """As `learn`, with an adapter for each stage, and rows of all stages routed among them.

    Args:
      algorithm: of one bucket, with a global model, over `model`.
      model: with an adapter; what is trained starts anew in every stage.
      task: a classification; rows have a leaf "label".
      stages, variables, cohort_size, seed, metric, folder, mesh: as in `learn`.
      num_classes: K, of the prototypes.
      query: makes vectors of the model's inputs; it must not change from stage to stage.
    Raises:
      ValueError: a model without an adapter, whose every parameter would be kept T times.
      Preempted: as in `learn`.
    """
    if model.adapter is None:
        raise ValueError(
            "A stage is learned by an adapter of its own, and the model has none; put one around "
            "it (jaxfm.adapters, --adapter)."
        )
    num = len(stages[0].federation.count)
    people = [
        Population(stage.federation, profiles(num), np.zeros(num, np.int32)) for stage in stages
    ]
    engine = compile_rounds(algorithm, people[0], cohort_size=cohort_size, mesh=mesh)
    bank = _empty(task, stages, variables, num_classes, query)
    backbone = jax.tree.map(np.asarray, variables)  # rounds donate what they are given
    measure = jax.jit(
        lambda shared, bank, test: _metric(model, shared, task, bank, test, query, metric)
    )
    with checkpoints(folder) as saved, stops(folder) as asked:
        done = 0
        if saved is not None and saved.latest_step() is not None:
            done, bank = saved.restore(like=bank)
        bank = jax.tree.map(np.array, bank)
        for number in range(done, len(stages)):
            stage, key = stages[number], jax.random.key(seed)
            start = jax.tree.map(jnp.array, backbone)
            state = engine.init(start, jax.random.fold_in(key, number))
            for _ in range(stage.rounds):
                state, _ = engine.run(state, people[number])
            sums, rows = prototype_sums(query, task, stage.federation, num_classes)
            bank.prototypes[number] = sums / np.maximum(rows, 1)[:, None]
            bank.number[number] = rows
            params = jax.tree.map(np.asarray, state.server.variables.params)
            jax.tree.map(lambda all_, own, n=number: all_.__setitem__(n, own), bank.params, params)
            for j, other in enumerate(stages):
                bank.accuracy[number, j] = measure(backbone, bank, other.test)
            if saved is not None:
                saved.save(number + 1, bank)
            if asked() and number < len(stages) - 1:
                raise Preempted(number + 1, folder, "stage")
    return Routed(bank, scores(bank.accuracy))


def _empty(
    task: Task, stages: Sequence[Stage], variables: Variables, num_classes: int, query: Query
) -> Bank:
    total = len(stages)
    row = {name: np.asarray(x)[:1] for name, x in stages[0].federation.examples.items()}
    width = jax.eval_shape(lambda row: query(task.prepare(row, None)[0]), row).shape[1]
    return Bank(
        params=jax.tree.map(lambda x: np.zeros((total, *x.shape), x.dtype), variables.params),
        prototypes=np.zeros((total, num_classes, width), np.float32),
        number=np.zeros((total, num_classes), np.float32),
        accuracy=np.zeros((total, total)),
    )


def _metric(
    model: Model, variables: Variables, task: Task, bank: Bank, test: Mapping[str, Array],
    query: Query, metric: str,
) -> Array:  # fmt: skip
    inputs, targets, weight = task.prepare(dict(test), None)
    outputs = predict(model, variables, bank, inputs, query=query)
    total, count = task.metrics(outputs, targets, weight)[metric]
    return total / count
