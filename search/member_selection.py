"""Which member of a trained supernet serves each budget.

Some members are scored; a predictor learns from them which ones are good, and evolution finds the
best for each budget. It competes with the member that keeps the same share of everything; the one
with the better score is the budget's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, Key, Model, Variables
from jaxfm.search.elastic.evolve import evolve, fit_predictor
from jaxfm.search.elastic.supernet import Supernet
from jaxfm.search.evaluation import Examples, input_batches, score_sign
from jaxfm.search.recalibration import recalibrate
from jaxfm.search.strategies.project import Budget
from jaxfm.tasks import Task, evaluate
from jaxfm.tasks.evaluation import metric_totals


class MemberJudge(NamedTuple):
    """How members are scored.

    Attributes:
      score: `(counts i32[n, G]) -> f32[n]` on the reward rows, higher is better: accuracy, or the
        negated loss. All members share one program.
      extract: `(counts i32[G]) -> Variables` of a member, with its own statistics.
      report: `(variables) -> metrics` on the report rows.
    """

    score: Callable[[np.ndarray], np.ndarray]
    extract: Callable[[np.ndarray], Variables]
    report: Callable[[Variables], dict[str, float]]


class MemberChoice(NamedTuple):
    """The member of one budget.

    Attributes:
      name: "evolved" or "uniform".
      counts: i32[G].
      variables: of its own size, with its own statistics.
      scores: score of both candidates by name.
      reports: report of both candidates by name.
    """

    name: str
    counts: np.ndarray
    variables: Variables
    scores: dict[str, float]
    reports: dict[str, dict[str, float]]


class MemberSearch(NamedTuple):
    """The members of all budgets, and what they were chosen by.

    Attributes:
      choices: one for each budget.
      counts, scores: i32[n, G] and f32[n], the members that the predictor learned from.
      rank_correlation: Spearman's ρ of the predictor on held-out members.
    """

    choices: tuple[MemberChoice, ...]
    counts: np.ndarray
    scores: np.ndarray
    rank_correlation: float


def judge_members(
    net: Supernet,
    variables: Variables,
    model: Model,
    task: Task,
    *,
    reward: Examples,
    calibration: Examples,
    report: Examples,
    batch_size: int = 32,
) -> MemberJudge:
    """Returns how the members of a supernet are scored.

    Args:
      net: the supernet.
      variables: after its training.
      model: the model that it was made of.
      task: what the members are for.
      reward: rows that score members.
      calibration: rows that re-estimate a member's statistics.
      report: rows that only reports look at.
      batch_size: rows per batch.
    """
    metric = "accuracy" if "label" in reward else "loss"
    batches = input_batches(task, calibration, batch_size)
    rows = jax.tree.map(jnp.asarray, dict(reward))
    train = lambda v, x: model.apply(v, x, train=True)[1]
    calibrate = jax.jit(lambda v: recalibrate(train, v, batches))

    @jax.jit
    def scores(variables: Variables, counts: Array, rows) -> Array:
        def one(counts: Array) -> Array:
            member = recalibrate(train, net.mask(variables, counts), batches)
            totals = metric_totals(model.apply, member, task, rows, batch_size=batch_size)
            total, weight = (part.sum() for part in totals[metric])
            return score_sign(metric) * total / weight

        return jax.lax.map(one, counts)

    return MemberJudge(
        score=lambda counts: np.asarray(scores(variables, jnp.asarray(counts), rows)),
        extract=lambda counts: calibrate(net.extract(variables, counts)),
        report=lambda variables: evaluate(model.apply, variables, task, report, batch_size),
    )


def choose_members(
    net: Supernet,
    judge: MemberJudge,
    budgets: Sequence[Budget],
    key: Key,
    *,
    num_scored: int = 64,
    log: Callable[[str], None] = print,
) -> MemberSearch:
    """Returns the member of each budget.

    Args:
      net: the supernet.
      judge: what `judge_members` returned.
      budgets: one for each member that is wanted.
      key: source of all randomness.
      num_scored: number of random members that the predictor learns from.
      log: takes lines that say what happens.
    Raises:
      ValueError: a budget below the smallest member, or too few members to learn from.
    """
    keys = jax.random.split(key, 3)
    drawn = np.asarray(net.sample(keys[0], num_scored))
    scores = judge.score(drawn)
    predictor = fit_predictor(net, drawn, scores, keys[1])
    log(f"{len(drawn)} members scored; ranks predicted: {predictor.rank_correlation:.2f}.")
    choices = []
    for i, budget in enumerate(budgets):
        evolved = evolve(net, predictor.predict, [budget], jax.random.fold_in(keys[2], i))
        (uniform,) = net.members([budget])
        choices.append(_better(judge, {"evolved": evolved, "uniform": uniform}))
    return MemberSearch(tuple(choices), drawn, scores, predictor.rank_correlation)


def _better(judge: MemberJudge, members: dict[str, np.ndarray]) -> MemberChoice:
    """Returns the member with the highest score, the first one of equals."""
    scores = dict(zip(members, judge.score(np.stack(list(members.values()))).tolist(), strict=True))
    extracted = {name: judge.extract(counts) for name, counts in members.items()}
    best = max(members, key=lambda name: scores[name])
    return MemberChoice(
        name=best,
        counts=members[best],
        variables=extracted[best],
        scores=scores,
        reports={name: judge.report(variables) for name, variables in extracted.items()},
    )
