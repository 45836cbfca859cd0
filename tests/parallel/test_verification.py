import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.parallel.drafters.lookup import continuation
from jaxfm.parallel.sampling import Sampling
from jaxfm.parallel.stop import automaton
from jaxfm.parallel.verification import (
    Draft,
    Rules,
    Stats,
    Text,
    Verdict,
    commit,
    newest,
    room,
    verify,
)

GREEDY = Sampling(jax.random.key(0), jnp.zeros((3,), jnp.int32))


def ints(*values):
    return jnp.array(values, jnp.int32)


def text(tokens, length, limit, done=(False,), width=2):
    batch = len(length)
    zeros = jnp.zeros((batch,), jnp.int32)
    counts = jnp.zeros((batch, width), jnp.int32)
    done = jnp.broadcast_to(jnp.array(done), (batch,))
    return Text(
        ints(*tokens),
        ints(*length),
        ints(*limit),
        done,
        zeros,
        Stats(zeros, counts, counts),
        zeros > 0,
    )


def test_greedy_accepts_up_to_the_first_difference_and_corrects_it():
    logits = jax.nn.one_hot(ints([1, 2, 3], [1, 2, 3], [1, 2, 3]), 5)
    draft = Draft(ints([1, 2], [1, 4], [1, 2]), ints(2, 2, 1))
    verdict = verify(logits, draft, GREEDY, ints(7, 7, 7))
    assert verdict.accepted.tolist() == [2, 1, 1]
    assert verdict.tokens[0].tolist() == [1, 2, 3]
    assert verdict.tokens[1, :2].tolist() == [1, 2]
    # The third proposed one token only: the next one is the target's own.
    assert verdict.tokens[2, :2].tolist() == [1, 2]


def test_each_text_advances_by_its_own_count_up_to_limit_and_stop():
    before = text([[9] * 8] * 4, [3, 3, 3, 3], [8, 5, 8, 8], (False, False, False, True))
    verdict = Verdict(ints(*[[1, 2, 3]] * 4), ints(1, 2, 2, 2))
    after = commit(before, verdict, ints(2, 2, 2, 2), Rules(GREEDY, ints(2)))
    # The first two stop at token 2, which is kept; the last was done before.
    assert after.length.tolist() == [5, 5, 5, 3]
    assert after.tokens[0].tolist() == [9, 9, 9, 1, 2, 9, 9, 9]
    assert after.tokens[3].tolist() == [9] * 8
    assert after.done.tolist() == [True, True, True, True]
    assert after.stats.passes.tolist() == [1, 1, 1, 0]
    free = commit(before, verdict, ints(2, 2, 2, 2), Rules(GREEDY, ints()))
    assert free.length.tolist() == [5, 5, 6, 3]
    assert free.done.tolist() == [False, True, False, True]
    assert free.stats.accepted.tolist() == [[1, 0], [1, 1], [1, 1], [0, 0]]


def test_a_stop_string_ends_a_text_within_a_block_and_across_blocks():
    table = jnp.asarray(automaton(["ab"], [b"a", b"b", b"xa", b"bb"]))
    rules = Rules(GREEDY, ints(), table)
    before = text([[0] * 8] * 3, [1, 1, 1], [8, 8, 8])
    after = commit(before, Verdict(ints([2, 1, 0], [1, 0, 2], [1, 2, 2]), ints(2, 2, 0)),
                   ints(2, 2, 2), rules)  # fmt: skip
    assert after.done.tolist() == [True, False, False]
    assert after.length.tolist() == [3, 4, 2]
    after = commit(after, Verdict(ints([0, 0, 0], [3, 0, 0], [1, 1, 1]), ints(0, 0, 0)),
                   ints(0, 0, 0), rules)  # fmt: skip
    assert after.done.tolist() == [True, True, False]
    assert after.length.tolist() == [3, 5, 3]


def test_room_and_newest():
    state = text([[1, 2, 3, 4], [5, 6, 7, 8]], [1, 4], [4, 5], (False, False))
    assert newest(state, 2).tolist() == [[1, 1], [7, 8]]
    assert room(state, 4).tolist() == [2, 0]
    assert room(state._replace(done=jnp.array([True, True])), 4).tolist() == [0, 0]


def test_lookup_continues_the_longest_then_latest_earlier_ending():
    rows = [
        [1, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3, 0],  # "1 2 3" beats the later "2 3"
        [5, 1, 5, 2, 5, 0, 0, 0, 0, 0, 0, 0],  # the latest 5
        [1, 2, 1, 2, 1, 2, 0, 0, 0, 0, 0, 0],  # goes on with its period
        [1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0],  # nothing
        [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    tokens, found = continuation(ints(*rows), ints(11, 5, 6, 4, 1), 4, max_ngram=3)
    assert found.tolist() == [True, True, True, False, False]
    assert tokens[:3].tolist() == [[4, 9, 2, 3], [2, 5, 2, 5], [1, 2, 1, 2]]
    assert not continuation(ints(*rows), ints(11, 5, 6, 4, 1), 4, 3, min_ngram=2)[1][1]


def test_lookup_agrees_with_a_search_in_python():
    random = np.random.default_rng(0)
    rows = random.integers(0, 3, (40, 24)).astype(np.int32)
    lengths = random.integers(1, 25, 40).astype(np.int32)
    tokens, found = continuation(jnp.asarray(rows), jnp.asarray(lengths), 1, max_ngram=4)
    for row, length, token, some in zip(rows, lengths, tokens[:, 0], found):
        known = row[:length].tolist()
        expected = None
        for n in range(min(4, length - 1), 0, -1):
            ends = [i for i in range(n, length) if known[i - n : i] == known[length - n :]]
            if ends:
                expected = known[ends[-1]]
                break
        assert (token if some else None) == expected
