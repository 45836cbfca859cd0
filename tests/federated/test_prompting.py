"""Prompts found over clients: scores, bandits, noise, and what travels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.adapters import soft_prompt
from jaxfm.checkpoint import Checkpointer
from jaxfm.federated.bandits import (
    evolution,
    init_arms,
    lower_bound,
    successive_halving,
    ucb1,
)
from jaxfm.federated.prompting import (
    Pool,
    Rows,
    check_pool,
    epsilon,
    first_state,
    log_likelihoods,
    prompt,
    ranking,
    reward,
    search_prompts,
)
from jaxfm.parallel.scoring import word_scorer
from jaxfm.testing import random_variables, tiny_decoder
from jaxfm.tokenizer import ByteTokenizer

MODEL = tiny_decoder(vocab_size=260, num_layers=1, max_len=64, sliding_window=40)
VARIABLES = random_variables(MODEL)
POOL = Pool(
    ("{text} is {label}.", "Q: {text} A: {label}", "{text}\n{label}"),
    Rows(("sun", "mud"), np.array([1, 0])),
    ("bad", "good", "so-so"),
)


@pytest.mark.parametrize("prompted", [False, True])
def test_words_are_scored_as_if_each_were_read_alone(prompted):
    """Against the whole model on prompt and word, one after another; also a prompted one."""
    model = soft_prompt(MODEL, 3) if prompted else MODEL
    variables = random_variables(model)
    tokenizer = ByteTokenizer()
    score = word_scorer(model, variables, tokenizer)
    prompts, words = ["ab", "abcdefg", "x" * 80], [" bad", " good", "s"]
    ours = score(prompts, words)
    apply = jax.jit(model.apply)
    most = 61 - 5 if prompted else 64 - 5
    for text, row in zip(prompts, ours, strict=True):
        for word, value in zip(words, row, strict=True):
            start, end = tokenizer.encode(text)[-most:], tokenizer.encode(word)
            tokens = np.zeros((1, most + 5), np.int32)
            tokens[0, : len(start) + len(end)] = start + end
            logp = jax.nn.log_softmax(apply(variables, tokens)[0][0], axis=-1)
            places = np.arange(len(start) - 1, len(start) + len(end) - 1)
            np.testing.assert_allclose(value, logp[places, end].sum(), atol=2e-4)


def test_prompts_have_exemplars_in_the_same_template():
    text, words = prompt(POOL, 0, [1, -1, 0], "a {label} b")
    assert text == "mud is bad.\n\nsun is good.\n\na {label} b is"
    assert words == [" bad", " good", " so-so"]
    assert prompt(POOL, 2, [], "x") == ("x\n", ["bad", "good", "so-so"])


def test_rewards_are_clipped_means_of_the_right_words_among_all():
    score = lambda prompts, words: np.log(np.array([[0.2, 0.1, 0.1]] * len(prompts)))
    rows = Rows(("a", "b"), np.array([0, 1]))
    logp = log_likelihoods(score, POOL, 0, [], rows)
    np.testing.assert_allclose(np.exp(logp), [[0.5, 0.25, 0.25]] * 2)
    expected = 1 + (np.log(0.5) + np.log(0.25)) / 2 / 4
    np.testing.assert_allclose(reward(score, POOL, 0, [], rows, 4.0), expected)
    assert reward(score, POOL, 0, [], rows, 0.1) == 0


def play(bandit, means, rounds, seed=0):
    """A search with Bernoulli rewards of known means, four reports a try."""
    means = np.asarray(means)
    arms = init_arms(np.arange(len(means)), np.zeros((len(means), 0)))
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    ask, tell = jax.jit(bandit.ask), jax.jit(bandit.tell)
    for i in range(rounds):
        asked = np.asarray(ask(arms, key))
        real = asked >= 0
        totals = np.where(real, rng.binomial(4, means[asked]), 0).astype(np.float32)
        arms = tell(arms, asked, 4.0 * real.astype(np.float32), totals, jax.random.fold_in(key, i))
    assert tell._cache_size() == ask._cache_size() == 1
    return arms


def test_ucb1_tries_the_best_most_and_all_at_least_once():
    arms = play(ucb1(2), [0.2, 0.8, 0.3, 0.4, 0.1], 80)
    assert int(np.argmax(arms.asked)) == 1 == int(np.argmax(lower_bound(arms)))
    assert arms.asked.min() >= 1
    assert arms.asked.sum() == 160


def test_halving_ends_with_the_best_and_spreads_its_tries_evenly():
    arms = play(successive_halving(5, 30, 2), [0.2, 0.3, 0.9, 0.4, 0.1], 30)
    assert np.flatnonzero(arms.alive).tolist() == [2]
    # 60 tries on 3 levels: 4 for each of 5, 6 for each of 3, the others to the last two.
    assert sorted(np.asarray(arms.asked).tolist())[:2] == [4, 4]


def test_children_take_the_places_of_the_worse_half_and_combine_parents():
    bandit = evolution(4, 9, 2, tries=1, mutation=0.0)
    arms = init_arms(np.arange(4), np.arange(8).reshape(4, 2))
    rewards = np.array([0.1, 0.9, 0.2, 0.8], np.float32)
    key = jax.random.key(1)
    for _ in range(2):
        asked = bandit.ask(arms, key)
        arms = bandit.tell(arms, asked, jnp.ones(2), jnp.asarray(rewards)[asked], key)
    np.testing.assert_array_equal(arms.template[np.array([1, 3])], [1, 3])
    assert {int(t) for t in arms.template[np.array([0, 2])]} <= {1, 3}
    assert {int(e) for e in arms.exemplars[np.array([0, 2])].ravel()} <= {2, 3, 6, 7}
    np.testing.assert_array_equal(arms.reports, [0, 1, 0, 1])


def fake(prompts, words):
    """A model that says the right thing after "A:" and anything after others."""
    good = np.array([[6.0, 0.0, 0.0]])
    return np.concatenate([good if text.endswith("A:") else 0 * good for text in prompts])


CLIENTS = [Rows(("a", "b", "c"), np.zeros(3, int)), Rows((), np.zeros(0, int))] + [
    Rows(("d",), np.zeros(1, int)) for _ in range(3)
]


def run(state, rounds, score=fake, **more):
    settings = {"num_rounds": rounds, "cohort_size": 3, "rows_a_round": 2} | more
    return list(search_prompts(score, POOL, CLIENTS, ucb1(2), state, **settings))


def test_a_search_finds_the_template_and_goes_on_where_it_stopped(tmp_path):
    first = first_state(POOL, 6, 1, jax.random.key(0))
    whole = run(first, 12, drop_rate=0.2, noise_multiplier=0.1)
    state = whole[-1][0]
    assert int(state.arms.template[ranking(state.arms)[0]]) == 1
    assert all(1 not in report.clients for _, report in whole)  # it has no rows
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, whole[4][0])
        checkpoints.wait()
        _, middle = checkpoints.restore(like=first)
    again = run(middle, 12, drop_rate=0.2, noise_multiplier=0.1)
    assert len(again) == 7
    jax.tree.map(np.testing.assert_array_equal, again[-1][0].arms, state.arms)


def test_scores_that_are_not_finite_count_for_nothing():
    bad = lambda prompts, words: np.full((len(prompts), 3), np.nan)
    [(state, report)] = run(first_state(POOL, 3, 0, jax.random.key(0)), 1, score=bad)
    assert report.clients == () and float(state.arms.reports.sum()) == 0
    assert ranking(state.arms) == []


def test_noise_has_the_deviation_of_the_sensitivity():
    """Sums of rewards with noise less those without: deviation 2 sqrt(A) within a tenth."""
    first = first_state(POOL, 100, 0, jax.random.key(3))
    settings = {"num_rounds": 4, "cohort_size": 2, "rows_a_round": 1}
    quiet, loud = (
        list(search_prompts(fake, POOL, CLIENTS[2:], ucb1(100), first, **settings, **more))
        for more in ({}, {"noise_multiplier": 2.0})
    )
    noise = [b.mean * 2 - a.mean * 2 for (_, a), (_, b) in zip(quiet, loud, strict=True)]
    np.testing.assert_allclose(np.std(noise), 2 * np.sqrt(100), rtol=0.1)


def test_epsilon_is_that_of_concentrated_privacy():
    """Bun and Steinke: rho = 20 / (2 * 100) and 2 sqrt(rho ln 1e5) more."""
    np.testing.assert_allclose(epsilon(10.0, 20, 1e-5), 0.1 + 2 * np.sqrt(0.1 * np.log(1e5)))
    assert epsilon(0.0, 20, 1e-5) == np.inf
    with pytest.raises(ValueError, match="delta=1: give a probability"):
        epsilon(1.0, 1, 1)


def test_bad_pools_and_settings_are_told_in_one_sentence():
    for templates in (("no text",), ("{label} {text}",), ("{text} {text} {label}",)):
        with pytest.raises(ValueError, match=r"needs \{text\} once"):
            check_pool(POOL._replace(templates=templates))
    with pytest.raises(ValueError, match="all different"):
        check_pool(POOL._replace(words=("yes", " yes")))
    with pytest.raises(ValueError, match="labels beyond those of the 3 words"):
        check_pool(POOL._replace(exemplars=Rows(("x",), np.array([3]))))
    with pytest.raises(ValueError, match="has no template"):
        check_pool(POOL._replace(templates=()))
    first = first_state(POOL, 3, 0, jax.random.key(0))
    for match, settings in {
        "cohort_size=9": {"cohort_size": 9},
        "clip=0": {"clip": 0},
        "drop_rate=1": {"drop_rate": 1},
    }.items():
        with pytest.raises(ValueError, match=match):
            run(first, 1, **settings)
    with pytest.raises(ValueError, match="tries=0"):
        evolution(2, 2, tries=0)
    with pytest.raises(ValueError, match="longer than the model's 64 positions"):
        word_scorer(MODEL, VARIABLES, ByteTokenizer())(["a"], ["b" * 64, "c"])
