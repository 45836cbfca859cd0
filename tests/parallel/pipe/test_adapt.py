"""A pipe that chooses its settings: off where drafts do not pay, on again where they do."""

import jax
import numpy as np
import pytest

from jaxfm.parallel import generate, make_mesh, plain
from jaxfm.parallel.drafters.lookup import lookup_drafter
from jaxfm.parallel.drafters.scripted import scripted_drafter
from jaxfm.parallel.generation import advance
from jaxfm.parallel.pipe.adapt import OFF, SINGLE, WIDE, adapt, among, count, kind, limits_published
from jaxfm.parallel.pipe.pipeinfer import pipeinfer, pipelined
from jaxfm.parallel.pipe.speed import (
    Choice,
    Pipe,
    choose,
    linear_cost,
    lockstep_rate,
    plain_rate,
)
from jaxfm.testing import random_variables, tiny_decoder

MODEL = tiny_decoder(max_len=1024)
VARIABLES = random_variables(MODEL)
PROMPT, NEW = [1, 2, 3], 700
CELLS = {"cells": 768, "ticks": 8}


def price(counts, seconds):
    """A tick costs 1, half as much again with a draft, and a fifth more with wide packets."""
    return float(counts.ticks + 0.5 * counts.drafted + 0.2 * counts.wide)


@pytest.fixture(scope="module")
def truth():
    return generate(plain(MODEL, VARIABLES), [PROMPT], max_new_tokens=NEW, **CELLS).tokens[0]


@pytest.fixture(scope="module")
def play(truth):
    """Decodes adaptively with the right tokens at the places told; returns what came of it."""
    row = np.zeros((1, CELLS["cells"]), np.int32)
    row[0, : len(PROMPT) + NEW] = [*PROMPT, *truth]
    mesh = make_mesh(stage=2)

    def run(ranks, **settings):
        ranks = np.broadcast_to(ranks, row.shape)
        drafter = scripted_drafter(row, ranks, 64)
        decoder = adapt(
            pipeinfer(MODEL, VARIABLES, drafter, mesh=mesh, width=3), price=price, **settings
        )
        result = generate(decoder, [PROMPT], max_new_tokens=NEW, **CELLS)
        assert result.tokens[0].tolist() == truth.tolist()
        speed = 2 * NEW / price(result.counters, 0.0)  # plain decoding takes two ticks a token
        return result, speed, result.decoder.policy.state

    return run


PLACES = np.random.default_rng(0).random(CELLS["cells"])


def test_a_draft_that_is_never_right_is_switched_off(play):
    play(9)
    compiled = advance._cache_size()
    for ranks in (9, np.where(PLACES < 0.1, 0, 9)):
        result, speed, learned = play(ranks)
        assert kind(learned.choice) == OFF
        assert speed >= 0.97
        assert result.counters.drafted < 0.1 * result.counters.ticks
    assert advance._cache_size() == compiled


def test_a_draft_that_is_right_is_used_to_the_full(play):
    _, speed, learned = play(0)
    assert kind(learned.choice) == SINGLE  # the first candidate is always right: no need for more
    assert speed > 1.25  # 2 / 1.5, less what was tried
    _, speed, learned = play(np.where(PLACES < 0.5, 0, 2))
    assert learned.choice.width == 3 and speed > 1.1  # 2 / 1.7
    np.testing.assert_allclose(among(learned), [0.5, 0.5, 1.0], atol=0.15)


def test_speculation_is_switched_on_again_where_the_text_becomes_easy(play):
    half = np.arange(CELLS["cells"]) < NEW // 2
    _, speed, learned = play(np.where(half, 9, 0))
    assert kind(learned.choice) == SINGLE and speed > 1.02
    _, _, learned = play(np.where(half, 0, 9), memory=64)
    assert kind(learned.choice) == OFF


def test_what_was_learned_goes_on_in_the_next_text(play):
    result, _, learned = play(9)
    again = generate(result.decoder, [PROMPT], max_new_tokens=32, **CELLS)
    assert again.counters.drafted == 0
    assert again.decoder.policy.state.hits.tolist() == learned.hits.tolist()


def test_candidates_that_were_not_offered_count_for_nothing():
    hits, tries = count(np.array([5, 0, 2]), 3, Choice(3, 1, 4, 0.0))
    assert hits.tolist() == [5, 0, 2] and tries.tolist() == [10, 5, 5]
    _, tries = count(np.array([5, 0, 0]), 3, Choice(1, 1, 4, 0.0))
    assert tries.tolist() == [8, 0, 0]
    assert [kind(Choice(w, k, 1, 0.0)) for w, k in ((0, 1), (1, 1), (1, 2), (3, 1))] == [
        OFF, SINGLE, WIDE, WIDE,
    ]  # fmt: skip


def test_in_lockstep_a_draft_must_pay_for_every_tick():
    pipe = Pipe(2, 1.0, 0.5, 0.0, linear_cost(0.1))
    assert lockstep_rate(pipe, 1.0) == pytest.approx(1 / 1.5)
    assert lockstep_rate(pipe, 0.0) == pytest.approx(plain_rate(pipe) / 1.5)
    assert choose(pipe, [0.5], rate=lockstep_rate).width == 0
    assert choose(pipe, [0.9, 0.95], rate=lockstep_rate).width == 1


def test_wrong_policies_are_refused():
    decoder = pipelined(MODEL, VARIABLES)
    with pytest.raises(ValueError, match="no draft"):
        adapt(decoder)
    with pytest.raises(ValueError, match="pipeinfer"):
        adapt(plain(MODEL, VARIABLES))
    for settings in ({"margin": 1.0}, {"memory": 0}):
        with pytest.raises(ValueError, match=str(*settings.values())):
            adapt(pipeinfer(MODEL, VARIABLES, lookup_drafter()), **settings)
    limits = jax.device_get(limits_published())
    assert (limits.width, limits.accept, limits.recovery) == (3, np.float32(0.1), 0)
