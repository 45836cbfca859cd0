"""One compiled loop for every strategy: ask, project, evaluate, tell.

The whole search is one program on the device; its state is one pytree, so that a search stopped at
any step goes on to the identical result. Every evaluation is kept: the curve, the best candidate
and the Pareto front are read from them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.checkpoint import Checkpointer
from jaxfm.model import Array, Key
from jaxfm.search.strategies.pareto import pareto_front
from jaxfm.search.strategies.strategy import Problem, Strategy


class SearchState(NamedTuple):
    """Everything that a search needs to go on.

    Attributes:
      step: i32[], batches evaluated.
      key: key of the whole run; step t uses `fold_in(key, t)`.
      strategy: the state of the strategy.
      counts: i32[T, n, G], channels of every candidate; 0 where not yet evaluated.
      scores: f32[T, n] as measured; NaN where evaluation failed or is still to come.
    """

    step: Array
    key: Key
    strategy: Any
    counts: Array
    scores: Array


class Result(NamedTuple):
    """What a search found.

    Attributes:
      best_counts: i32[G], the candidate with the highest score, the first one of equals.
      best_score: its score.
      curve: f32[N], best score after each evaluation.
      counts: i32[N, G], every candidate in order.
      scores: f32[N], NaN where evaluation failed.
      front: i32[P], rows that no other row beats in the score and in all of `Problem.costs`.
      state: the final state.
    """

    best_counts: np.ndarray
    best_score: float
    curve: np.ndarray
    counts: np.ndarray
    scores: np.ndarray
    front: np.ndarray
    state: SearchState


class Search(NamedTuple):
    """A search as pure functions; `search` compiles each at most once.

    Attributes:
      init: `(key) -> SearchState`.
      advance: `(state, num_steps) -> SearchState`; donates the state. The number of steps is an
        argument of the compiled program, not a constant in it.
      result: `(state) -> Result`.
      num_steps: T.
    """

    init: Callable[[Key], SearchState]
    advance: Callable[[SearchState, int], SearchState]
    result: Callable[[SearchState], Result]
    num_steps: int


def search(problem: Problem, strategy: Strategy, evaluations: int) -> Search:
    """Returns `strategy` on `problem`, ready to be compiled; for one run see `run`.

    Raises:
      ValueError: `evaluations` is not a positive multiple of the strategy's batch.
    """
    if evaluations < 1 or evaluations % strategy.batch:
        raise ValueError(
            f"evaluations={evaluations} must be a positive multiple of {strategy.batch}, the "
            "candidates that the strategy asks for at a time."
        )
    num_steps = evaluations // strategy.batch
    shape = (num_steps, strategy.batch)

    @jax.jit
    def init(key: Key) -> SearchState:
        start_key, run_key = jax.random.split(key)
        counts = jnp.zeros((*shape, len(problem.sizes)), jnp.int32)
        scores = jnp.full(shape, jnp.nan, jnp.float32)
        return SearchState(jnp.int32(0), run_key, strategy.init(start_key), counts, scores)

    def step(data: Any, state: SearchState) -> SearchState:
        actions, inner = strategy.ask(state.strategy, jax.random.fold_in(state.key, state.step))
        counts = jax.vmap(problem.project)(actions)
        measured = problem.evaluate(data, counts)
        inner = strategy.tell(inner, actions, counts, _finite(measured))
        return SearchState(
            step=state.step + 1,
            key=state.key,
            strategy=inner,
            counts=state.counts.at[state.step].set(counts),
            scores=state.scores.at[state.step].set(measured),
        )

    def steps(data: Any, state: SearchState, num: Array) -> SearchState:
        return lax.fori_loop(0, num, lambda _, s: step(data, s), state)

    compiled = jax.jit(steps, donate_argnums=1)

    def advance(state: SearchState, num: int) -> SearchState:
        return compiled(problem.data, state, jnp.int32(num))

    return Search(init, advance, lambda state: _result(problem, state), num_steps)


def run(
    problem: Problem,
    strategy: Strategy,
    evaluations: int,
    key: Key,
    *,
    checkpoints: Checkpointer | None = None,
    every: int = 10,
) -> Result:
    """Searches with `evaluations` candidates and goes on from the newest checkpoint, if any.

    Args:
      problem: what is searched.
      strategy: how it is searched.
      evaluations: number of candidates, a multiple of the strategy's batch.
      key: source of all randomness: the same key gives the same result.
      checkpoints: where the state is saved after each `every` batches; None runs in one go.
      every: batches between two checkpoints.

    Raises:
      ValueError: as `search`, or `every` < 1.
    """
    if every < 1:
        raise ValueError(f"every={every} must be at least 1: the batches between two checkpoints.")
    loop = search(problem, strategy, evaluations)
    state = loop.init(key)
    if checkpoints is None:
        return loop.result(loop.advance(state, loop.num_steps))
    done = 0
    if checkpoints.latest_step() is not None:
        done, state = checkpoints.restore(like=state)
    while done < loop.num_steps:
        num = min(every, loop.num_steps - done)
        state = loop.advance(state, num)
        done += num
        checkpoints.save(done, state)
    return loop.result(state)


def _finite(scores: Array) -> Array:
    """Gives failed candidates the worst score of their batch, so that no update is poisoned."""
    good = jnp.isfinite(scores)
    worst = jnp.min(jnp.where(good, scores, jnp.inf))
    return jnp.where(good, scores, jnp.where(jnp.any(good), worst, 0.0))


def _result(problem: Problem, state: SearchState) -> Result:
    done = int(state.step)
    counts = np.asarray(state.counts)[:done].reshape(-1, len(problem.sizes))
    scores = np.asarray(state.scores)[:done].reshape(-1)
    if not np.isfinite(scores).any():
        raise ValueError(
            f"None of the {len(scores)} candidates so far has a finite score; check the evaluation."
        )
    ordered = np.where(np.isfinite(scores), scores, -np.inf)
    costs = np.asarray(jax.vmap(problem.costs)(jnp.asarray(counts, jnp.float32)))
    best = int(np.argmax(ordered))
    return Result(
        best_counts=counts[best],
        best_score=float(ordered[best]),
        curve=np.maximum.accumulate(ordered),
        counts=counts,
        scores=scores,
        front=pareto_front(np.concatenate([-ordered[:, None], costs], axis=1)),
        state=state,
    )
