"""Discrete prompts found over clients: which template and exemplars a frozen model answers best by.

    score_i(c) = mean over rows (x, y) of client i of log p(y | c, x)         among the label words
    reward_i(c) = 1 + max(score_i(c), -clip) / clip                           in [0, 1]

A round: the server asks for some candidates c, each client of a cohort scores them on rows that
never leave it, and the sums of rewards are all that travels. A bandit (`federated.bandits`) turns
them into the candidates of the next round. With noise the sums are those of a Gaussian mechanism:
other rows of one client move the A sums of a round by at most sqrt(A) in the 2-norm. Who reported
is not hidden.

Source: the application stage of Yu, Muñoz and Jannesari 2023 (Federated Foundation Models, section
3.3); Bun and Steinke 2016 for the accounting (propositions 1.3 and 1.6, lemma 1.7).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.bandits import Arms, Bandit, init_arms, lower_bound, mean_reward
from jaxfm.model import Array, Key
from jaxfm.parallel.scoring import Score


class Rows(NamedTuple):
    """Labelled texts of one owner.

    Attributes:
      texts: a text a row.
      labels: i64[N], number of each row's label.
    """

    texts: tuple[str, ...]
    labels: np.ndarray


class Pool(NamedTuple):
    """What candidates are made of; the server's own, or public.

    Attributes:
      templates: each with "{text}" once, and "{label}" once after it.
      exemplars: rows that may stand before the text.
      words: what the model is to say for each label.
    """

    templates: tuple[str, ...]
    exemplars: Rows
    words: tuple[str, ...]


class SearchState(NamedTuple):
    """All that a search needs to go on.

    Attributes:
      arms: the candidates.
      round: i32[], rounds done.
      key: of the whole search.
    """

    arms: Arms
    round: Array
    key: Key


class RoundReport(NamedTuple):
    """What one round did.

    Attributes:
      asked: i32[A] candidates.
      clients: those that reported.
      mean: f32[A], the mean reward of each candidate, with noise where there is some.
    """

    asked: np.ndarray
    clients: tuple[int, ...]
    mean: np.ndarray


def check_pool(pool: Pool) -> None:
    """Raises ValueError for templates without places, words that are equal, unknown labels."""
    for template in pool.templates:
        parts = template.partition("{text}")[2].partition("{label}")
        whole = template.count("{text}") == template.count("{label}") == 1
        if not whole or not parts[1]:
            raise ValueError(
                f"The template {template!r} needs {{text}} once, and {{label}} once after it."
            )
    if not pool.templates:
        raise ValueError("The pool has no template; give at least one.")
    words = [word.strip() for word in pool.words]
    if len(words) < 2 or len(set(words)) < len(words) or not all(words):
        raise ValueError(f"words={pool.words}: give two or more words, all different.")
    labels = pool.exemplars.labels
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(words):
        raise ValueError(f"Exemplars have labels beyond those of the {len(words)} words.")


def prompt(pool: Pool, template: int, exemplars: Sequence[int], text: str) -> tuple[str, list[str]]:
    """Returns the prompt of a text up to its answer, and the words that may follow.

    Exemplars stand before it in the same template, with blank lines between. A space before the
    place of the label becomes part of the words, as most tokenizers have it.
    """
    form = pool.templates[template]
    shots = [
        _filled(form, pool.exemplars.texts[i], pool.words[pool.exemplars.labels[i]])
        for i in exemplars
        if i >= 0
    ]
    before = _filled(form.partition("{label}")[0], text, "")
    bare = before.rstrip(" ") if form.partition("{label}")[0].endswith(" ") else before
    space = before[len(bare) :]
    return "\n\n".join([*shots, bare]), [space + word for word in pool.words]


def _filled(form: str, text: str, word: str) -> str:
    """The template with its places filled, whatever braces the text has."""
    before, _, after = form.partition("{text}")
    return before + text + after.replace("{label}", word)


def log_likelihoods(
    score: Score, pool: Pool, template: int, exemplars: Sequence[int], rows: Rows
) -> np.ndarray:
    """Returns f32[N, num words], log p of each label given a row, among all labels."""
    made = [prompt(pool, template, exemplars, text) for text in rows.texts]
    logp = score([text for text, _ in made], made[0][1])
    with np.errstate(invalid="ignore"):  # NaN is told by the reward
        return logp - np.logaddexp.reduce(logp, axis=1, keepdims=True)


def reward(
    score: Score, pool: Pool, template: int, exemplars: Sequence[int], rows: Rows, clip: float
) -> float:
    """Returns what a client reports of a candidate: a number from 0 to 1, or NaN."""
    logp = log_likelihoods(score, pool, template, exemplars, rows)
    mean = float(logp[np.arange(len(rows.texts)), rows.labels].mean())
    return 1 + max(mean, -clip) / clip if math.isfinite(mean) else math.nan


def first_state(pool: Pool, num_arms: int, shots: int, key: Key) -> SearchState:
    """Returns a search before its first round.

    The first candidates are the templates without exemplars; others have a template in turn and
    exemplars drawn from the pool.

    Args:
      pool: of templates and exemplars.
      num_arms: N candidates.
      shots: K, most exemplars of a candidate.
      key: typed.
    Raises:
      ValueError: a pool that `check_pool` refuses, or no candidate.
    """
    check_pool(pool)
    if num_arms < 1 or shots < 0:
        raise ValueError(f"num_arms={num_arms}, shots={shots}: give 1 or more, and 0 or more.")
    draw, own = jax.random.split(key)
    known = len(pool.exemplars.texts)
    template = np.arange(num_arms) % len(pool.templates)
    exemplars = np.full((num_arms, shots), -1)
    if known and shots:
        drawn = np.asarray(jax.random.randint(draw, (num_arms, shots), 0, known))
        exemplars = np.where(np.arange(num_arms)[:, None] < len(pool.templates), -1, drawn)
    return SearchState(
        init_arms(jnp.asarray(template), jnp.asarray(exemplars)), jnp.zeros((), jnp.int32), own
    )


def search_prompts(
    score: Score,
    pool: Pool,
    clients: Sequence[Rows],
    bandit: Bandit,
    state: SearchState,
    *,
    num_rounds: int,
    cohort_size: int,
    rows_a_round: int = 8,
    clip: float = 4.0,
    drop_rate: float = 0.0,
    noise_multiplier: float = 0.0,
) -> Iterator[tuple[SearchState, RoundReport]]:
    """Yields the state and a report after each round until `num_rounds` are done.

    All that is random follows from the state's key and round, so a search that goes on from a saved
    state ends as an uninterrupted one. Clients without rows, that drop out, or whose score is not
    finite report nothing.

    Args:
      score: of `jaxfm.parallel.scoring.word_scorer`.
      pool: of templates and exemplars.
      clients: their private rows.
      bandit: which candidates are tried.
      state: of `first_state`, or a later one.
      num_rounds: in all.
      cohort_size: clients drawn a round.
      rows_a_round: rows that a client scores by, drawn anew each round.
      clip: log-likelihoods below -clip count as -clip, in nats.
      drop_rate: probability that a client of a cohort does not report.
      noise_multiplier: deviation of the Gaussian noise in each sum over its sensitivity sqrt(A).
    Raises:
      ValueError: a setting out of range.
    """
    if not 1 <= cohort_size <= len(clients):
        raise ValueError(f"cohort_size={cohort_size}: give 1 to {len(clients)}, all clients.")
    for name, value in (("rows_a_round", rows_a_round), ("clip", clip)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: give a number above 0.")
    if not 0 <= drop_rate < 1 or not 0 <= noise_multiplier < math.inf:
        raise ValueError(
            f"drop_rate={drop_rate}, noise_multiplier={noise_multiplier}: give a probability below "
            "1, and a number of at least 0."
        )
    ask, tell = jax.jit(bandit.ask), jax.jit(bandit.tell)
    while int(state.round) < num_rounds:
        key = jax.random.fold_in(state.key, state.round)
        ask_key, cohort_key, row_key, noise_key, tell_key = jax.random.split(key, 5)
        asked = ask(state.arms, ask_key)
        arms, held = [int(arm) for arm in asked], jax.device_get(state.arms)
        order_key, drop_key = jax.random.split(cohort_key)
        cohort = np.asarray(jax.random.permutation(order_key, len(clients))[:cohort_size])
        present = np.asarray(jax.random.uniform(drop_key, (cohort_size,))) >= drop_rate
        totals, counts = np.zeros(len(arms), np.float32), np.zeros(len(arms), np.float32)
        reported = []
        for client in cohort[present]:
            own = _some_rows(clients[client], rows_a_round, jax.random.fold_in(row_key, client))
            said = [_said(score, pool, held, arm, own, clip) for arm in arms]
            counted = np.isfinite(said)
            totals += np.where(counted, said, 0).astype(np.float32)
            counts += counted
            reported += [int(client)] if counted.any() else []
        if noise_multiplier:
            deviation = noise_multiplier * math.sqrt(len(arms))
            totals += deviation * np.asarray(jax.random.normal(noise_key, (len(arms),)))
        new = tell(state.arms, asked, jnp.asarray(counts), jnp.asarray(totals), tell_key)
        state = SearchState(new, state.round + 1, state.key)
        mean = totals / np.maximum(counts, 1)
        yield state, RoundReport(np.asarray(asked), tuple(reported), mean)


def _some_rows(rows: Rows, most: int, key: Key) -> Rows:
    if len(rows.texts) <= most:
        return rows
    chosen = np.asarray(jax.random.permutation(key, len(rows.texts))[:most])
    return Rows(tuple(rows.texts[i] for i in chosen), np.asarray(rows.labels)[chosen])


def _said(score: Score, pool: Pool, arms: Arms, arm: int, rows: Rows, clip: float) -> float:
    """A client's reward of a candidate; NaN where there is nothing to say."""
    if arm < 0 or not rows.texts:
        return math.nan
    return reward(score, pool, int(arms.template[arm]), arms.exemplars[arm].tolist(), rows, clip)


def ranking(arms: Arms) -> list[int]:
    """Returns the candidates that are alive, the best first, by their lower bounds."""
    bounds = np.where(arms.alive, lower_bound(arms), -np.inf)
    order, arms = np.argsort(-bounds, kind="stable"), jax.device_get(arms)
    return [int(arm) for arm in order if arms.alive[arm] and arms.reports[arm] > 0]


def described(pool: Pool, arms: Arms, arm: int) -> dict[str, Any]:
    """Returns what a page says of a candidate."""
    return {
        "template": pool.templates[int(arms.template[arm])],
        "exemplars": [
            (pool.exemplars.texts[i], pool.words[pool.exemplars.labels[i]])
            for i in np.asarray(arms.exemplars[arm])
            if i >= 0
        ],
        "mean_reward": float(mean_reward(arms)[arm]),
        "reports": float(arms.reports[arm]),
        "rounds": float(arms.asked[arm]),
    }


def epsilon(noise_multiplier: float, num_rounds: int, delta: float) -> float:
    """Returns the epsilon at which a client that takes part in all rounds is protected.

    That is, its rows may be any others. Each round is a Gaussian mechanism of
    rho = 1 / (2 noise_multiplier^2) in zero-concentrated differential privacy, and
    epsilon = rho + 2 sqrt(rho ln(1 / delta)). Without noise it is infinite.

    Raises:
      ValueError: a delta outside (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta}: give a probability above 0 and below 1.")
    if not noise_multiplier:
        return math.inf
    rho = num_rounds / (2 * noise_multiplier**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))
