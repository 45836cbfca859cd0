"""Learning from a stream, and what of it is forgotten.

    learned = learn(algorithm, model, task, stages, variables, cohort_size=5)
    learned.scores.average_accuracy, learned.scores.forgetting

With R[t, j] the accuracy on the test rows of stage j after stage t, of T stages:

    average accuracy   mean_j R[T-1, j]
    backward transfer  mean_{j < T-1} (R[T-1, j] - R[j, j])
    forgetting         mean_{j < T-1} (max_{j <= t < T-1} R[t, j] - R[T-1, j])

Sources: Lopez-Paz and Ranzato 2017 (GEM), section 2, for the first two; Chaudhry et al. 2018
(Riemannian Walk), section 3.1, for the last.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxfm.checkpoint import Checkpointer
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.continual.stream import Stage
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import RunState, compile_rounds
from jaxfm.model import Model, Variables
from jaxfm.preemption import Preempted, stop_requests
from jaxfm.tasks import Task, evaluate


class Scores(NamedTuple):
    """What a stream has left behind; see the module.

    Attributes:
      accuracy: f64[T, T], R.
      average_accuracy, backward_transfer, forgetting: of R.
    """

    accuracy: np.ndarray
    average_accuracy: float
    backward_transfer: float
    forgetting: float


class Learned(NamedTuple):
    """A run over a stream.

    Attributes:
      state: of the rounds, after the last one.
      scores: by the global model.
      loss: f64[rounds], the clients' mean training loss of each round.
    """

    state: RunState
    scores: Scores
    loss: np.ndarray


def scores(accuracy: np.ndarray) -> Scores:
    """The measures of R f[T, T]; what is above the diagonal is not read."""
    r = np.asarray(accuracy, np.float64)
    last = len(r) - 1
    if not last:
        return Scores(r, float(r[0, 0]), 0.0, 0.0)
    best = np.array([r[j:last, j].max() for j in range(last)])
    return Scores(
        accuracy=r,
        average_accuracy=float(r[last].mean()),
        backward_transfer=float((r[last, :last] - np.diag(r)[:last]).mean()),
        forgetting=float((best - r[last, :last]).mean()),
    )


def learn(
    algorithm: Algorithm,
    model: Model,
    task: Task,
    stages: Sequence[Stage],
    variables: Variables,
    *,
    cohort_size: int,
    seed: int = 0,
    between: Callable[[RunState, Population], RunState] | None = None,
    metric: str = "accuracy",
    batch_size: int = 64,
    folder: str | pathlib.Path | None = None,
    mesh: Mesh | None = None,
) -> Learned:
    """Runs an algorithm over all stages, one after another, and measures after each.

    Args:
      algorithm: of one bucket, with a global model.
      model, task: what is measured, and how.
      stages: of `by_groups`, perhaps `rehearsed`.
      variables: that the run starts from.
      cohort_size: clients drawn a round.
      seed: of the rounds.
      between: `(state, population of the stage) -> state`, called after each stage but the last,
        such as `Ewc.consolidate`.
      metric: of the task, by which R is measured.
      batch_size: rows that are measured at a time.
      folder: for a checkpoint after each stage, from which the same call goes on; None: none.
      mesh: as in `compile_rounds`.
    Raises:
      ValueError: stages whose examples differ in shape.
      Preempted: SIGTERM asked to stop; the state after the last stage is in the folder.
    """
    num_clients = len(stages[0].federation.count)
    people = [
        Population(stage.federation, profiles(num_clients), np.zeros(num_clients, np.int32))
        for stage in stages
    ]
    engine = compile_rounds(algorithm, people[0], cohort_size=cohort_size, mesh=mesh)
    state = engine.init(variables, jax.random.key(seed))
    record = _Record(
        accuracy=np.zeros((len(stages), len(stages))),
        loss=np.zeros(sum(stage.rounds for stage in stages)),
    )
    with checkpoints(folder) as saved, stops(folder) as asked:
        done = 0
        if saved is not None and saved.latest_step() is not None:
            done, (state, record) = saved.restore(like=(state, record))
        record = jax.tree.map(np.array, record)
        for number in range(done, len(stages)):
            stage = stages[number]
            first = sum(earlier.rounds for earlier in stages[:number])
            for place in range(first, first + stage.rounds):
                state, info = engine.run(state, people[number])
                total, count = jax.device_get((info.loss_total[0], info.loss_count[0]))
                record.loss[place] = (total / count)[0] if count[0] else np.nan
            for j, other in enumerate(stages):
                server = state.server
                figures = evaluate(model.apply, server.variables, task, other.test, batch_size)
                record.accuracy[number, j] = figures[metric]
            if between is not None and number < len(stages) - 1:
                state = between(state, people[number])
            if saved is not None:
                saved.save(number + 1, (state, record))
            if asked() and number < len(stages) - 1:
                raise Preempted(number + 1, folder, "stage")
    return Learned(state, scores(record.accuracy), record.loss)


class _Record(NamedTuple):
    """What is measured on the way."""

    accuracy: np.ndarray
    loss: np.ndarray


def checkpoints(folder: str | pathlib.Path | None) -> Any:
    """A context of the folder's checkpoints, the last of which is kept; None without a folder."""
    return contextlib.nullcontext() if folder is None else Checkpointer(folder, keep=1)


def stops(folder: str | pathlib.Path | None) -> Any:
    """A context of whether the run was asked to stop; never, where nothing can be saved."""
    return contextlib.nullcontext(lambda: False) if folder is None else stop_requests()
