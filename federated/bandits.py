"""Bandits over a pool of candidates whose worth is only known by noisy reports.

    arms = init_arms(template, exemplars)
    asked = bandit.ask(arms, key)                             who is tried next
    arms = bandit.tell(arms, asked, reports, totals, key)     what was said of them

Rewards are between 0 and 1. All is pure and of fixed shapes, so that a stopped search goes on from
its arrays to the identical result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import Array, Key


class Arms(NamedTuple):
    """A pool of N candidates, and what is known of them.

    Attributes:
      template: i32[N], number of the template.
      exemplars: i32[N, K], numbers of the exemplars, in order; -1: none in this place.
      asked: f32[N], rounds in which a candidate was tried.
      reports: f32[N], rewards that were reported.
      total: f32[N], their sum.
      alive: bool[N], whether it is still in the race.
    """

    template: Array
    exemplars: Array
    asked: Array
    reports: Array
    total: Array
    alive: Array


class Bandit(NamedTuple):
    """Which candidates are tried.

    Attributes:
      ask: `(arms, key) -> i32[A]`, candidates for one round; -1: none in this place.
      tell: `(arms, asked i32[A], reports f32[A], totals f32[A], key) -> arms`.
    """

    ask: Callable[[Arms, Key], Array]
    tell: Callable[[Arms, Array, Array, Array, Key], Arms]


def init_arms(template: Array, exemplars: Array) -> Arms:
    """Returns a pool of which nothing is known."""
    zeros = jnp.zeros(template.shape, jnp.float32)
    return Arms(
        jnp.asarray(template, jnp.int32), jnp.asarray(exemplars, jnp.int32),
        zeros, zeros, zeros, jnp.ones(template.shape, bool),
    )  # fmt: skip


def mean_reward(arms: Arms) -> Array:
    """Returns f32[N], the mean of a candidate's rewards; 0 where there is none."""
    return arms.total / jnp.maximum(arms.reports, 1)


def lower_bound(arms: Arms) -> Array:
    """Returns f32[N], the mean less its half-width by Hoeffding's inequality, by which we rank.

    A candidate that had luck in its few reports is not ahead of one that was good in many. Those
    without reports come last.
    """
    among = jnp.log(jnp.maximum(arms.reports.sum(), 2))
    bound = mean_reward(arms) - jnp.sqrt(among / (2 * jnp.maximum(arms.reports, 1)))
    return jnp.where(arms.reports > 0, bound, -jnp.inf)


def ucb1(asked: int = 4, *, width: float = 2.0) -> Bandit:
    """Tries the candidates of the largest mean + sqrt(width ln n / n_i), unknown ones first.

    Args:
      asked: A, candidates a round.
      width: of the bound; larger values try more.
    Source: Auer, Cesa-Bianchi and Fischer 2002, figure 1.
    """

    def ask(arms: Arms, key: Key) -> Array:
        among = jnp.log(jnp.maximum(arms.reports.sum(), 1))
        bound = mean_reward(arms) + jnp.sqrt(width * among / jnp.maximum(arms.reports, 1))
        return lax.top_k(jnp.where(arms.reports > 0, bound, jnp.inf), asked)[1]

    return Bandit(ask, lambda arms, tried, *said: _told(arms, tried, *said[:2]))


def successive_halving(num_arms: int, num_rounds: int, asked: int = 4) -> Bandit:
    """Tries all that are alive equally often, then drops the worse half, until one is left.

    Args:
      num_arms: N.
      num_rounds: of the whole search, over which the tries are spread.
      asked: A, candidates a round.
    Source: Karnin, Koren and Somekh 2013, algorithm 1; means are over all of a candidate's reports.
    """
    sizes = [num_arms]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 2))
    levels = max(len(sizes) - 1, 1)
    each = [max(1.0, num_rounds * asked // (levels * size)) for size in sizes]
    targets, kept = jnp.asarray(np.cumsum(each), jnp.float32), jnp.asarray(sizes, jnp.int32)

    def tell(arms: Arms, tried: Array, reports: Array, totals: Array, key: Key) -> Arms:
        arms = _told(arms, tried, reports, totals)
        level = jnp.argmax(kept == arms.alive.sum())
        after = kept[jnp.minimum(level + 1, len(sizes) - 1)]
        score = jnp.where(arms.alive, mean_reward(arms), -jnp.inf)
        place = jnp.argsort(jnp.argsort(-score, stable=True), stable=True)
        is_over = jnp.where(arms.alive, arms.asked, jnp.inf).min() >= targets[level]
        return arms._replace(alive=arms.alive & (~is_over | (place < after)))

    return Bandit(lambda arms, key: _least_tried(arms, asked), tell)


def evolution(
    num_templates: int,
    num_exemplars: int,
    asked: int = 4,
    *,
    tries: int = 2,
    mutation: float = 0.2,
) -> Bandit:
    """Tries all candidates, then puts children of the better half in the places of the worse.

    A child has the template of one parent and, place by place, an exemplar of either; each of these
    is drawn anew from the pool with probability `mutation`.

    Args:
      num_templates, num_exemplars: in the pool.
      asked: A, candidates a round.
      tries: rounds in which each candidate is tried before the next generation.
      mutation: probability.
    Raises:
      ValueError: a setting out of range.
    """
    if tries < 1 or not 0 <= mutation <= 1:
        raise ValueError(
            f"tries={tries}, mutation={mutation}: give at least one try, and a probability."
        )

    def tell(arms: Arms, tried: Array, reports: Array, totals: Array, key: Key) -> Arms:
        arms = _told(arms, tried, reports, totals)
        return lax.cond(arms.asked.min() >= tries, _children, lambda arms, key: arms, arms, key)

    def _children(arms: Arms, key: Key) -> Arms:
        number, places = arms.exemplars.shape
        parents, chosen, new, word, other = jax.random.split(key, 5)
        order = jnp.argsort(-lower_bound(arms), stable=True)
        half = max(1, number // 2)
        first, second = order[jax.random.randint(parents, (2, number), 0, half)]
        from_first = jax.random.bernoulli(chosen, 0.5, (number, places))
        exemplars = jnp.where(from_first, arms.exemplars[first], arms.exemplars[second])
        is_new = jax.random.bernoulli(new, mutation, (number, places + 1))
        drawn = jax.random.randint(word, (number, places), 0, max(1, num_exemplars))
        if num_exemplars:
            exemplars = jnp.where(is_new[:, 1:], drawn, exemplars)
        template = jnp.where(
            is_new[:, 0], jax.random.randint(other, (number,), 0, num_templates),
            arms.template[first],
        )  # fmt: skip
        is_child = jnp.zeros((number,), bool).at[order[half:]].set(True)
        keep = lambda child, old: jnp.where(is_child, child, old)
        zeros = jnp.zeros_like(arms.total)
        return Arms(
            keep(template, arms.template),
            jnp.where(is_child[:, None], exemplars, arms.exemplars),
            keep(zeros, arms.asked), keep(zeros, arms.reports), keep(zeros, arms.total),
            arms.alive,
        )  # fmt: skip

    return Bandit(lambda arms, key: _least_tried(arms, asked), tell)


def _least_tried(arms: Arms, asked: int) -> Array:
    """Those alive that were tried least often, the first ones first."""
    order = lax.top_k(jnp.where(arms.alive, -arms.asked, -jnp.inf), asked)[1]
    return jnp.where(arms.alive[order], order, -1)


def _told(arms: Arms, asked: Array, reports: Array, totals: Array) -> Arms:
    """The pool with what was reported of some; rewards of nobody count nothing."""
    at = jnp.where(asked < 0, arms.total.shape[0], asked)
    add = lambda old, new: old.at[at].add(new, mode="drop")
    return arms._replace(
        asked=add(arms.asked, jnp.ones_like(totals)),
        reports=add(arms.reports, reports),
        total=add(arms.total, totals),
    )
