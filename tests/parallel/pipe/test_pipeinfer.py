"""The laws of the pipe: plain decoding's tokens whatever is drafted, in as few ticks as it may."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.parallel import generate, make_mesh, plain
from jaxfm.parallel.drafters.composite import composite_drafter
from jaxfm.parallel.drafters.lookup import lookup_drafter
from jaxfm.parallel.drafters.model import early_exit_drafter, model_drafter
from jaxfm.parallel.drafters.scripted import scripted_drafter
from jaxfm.parallel.generation import advance, start
from jaxfm.parallel.pipe.pipeinfer import pipeinfer, pipelined
from jaxfm.parallel.pipe.scheduler import limits
from jaxfm.parallel.pipe.speed import Pipe
from jaxfm.parallel.simulation.heads import Head
from jaxfm.parallel.simulation.simulator import simulate
from jaxfm.parallel.simulation.xla_copy_probe import cache_copies
from jaxfm.testing import random_variables, tiny_decoder, tiny_gpt2
from jaxfm.tokenizer import ByteTokenizer

MODELS = {
    "llama": tiny_decoder(num_layers=3),
    "window": tiny_decoder(num_layers=3, sliding_window=5),
    "gpt2": tiny_gpt2(num_layers=3),
}
VARIABLES = {name: random_variables(model) for name, model in MODELS.items()}
PROMPTS = [[1, 2, 3, 4, 5], [9], [6, 7] * 4]
NEW = [24, 20, 22]
SAMPLED = {"temperature": [0.8, 0.0, 1.1], "top_p": 0.95, "key": jax.random.key(3)}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(stage=2)


@functools.cache
def expected(family, kind):
    """What plain decoding on one device gives, greedy or sampled."""
    decoder = plain(MODELS[family], VARIABLES[family])
    more = SAMPLED if kind == "sampled" else {}
    return generate(decoder, PROMPTS, max_new_tokens=NEW, logprobs=True, **more)


def texts(result, length=64):
    rows = np.zeros((len(PROMPTS), length), np.int32)
    for row, prompt, tokens in zip(rows, PROMPTS, result.tokens):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + len(tokens)] = tokens
    return rows


def unsaid(result):
    """A token that no continuation has; stopping at it, or at another, is the same program."""
    said = {t for tokens in result.tokens for t in tokens.tolist()}
    return min(set(range(64)) - said)


def same(ours, theirs):
    assert [t.tolist() for t in ours.tokens] == [t.tolist() for t in theirs.tokens]
    if ours.logprobs is not None:
        for a, b in zip(ours.logprobs, theirs.logprobs):
            np.testing.assert_allclose(a, b, atol=2e-4)


SETTINGS = {
    "plain": (None, {}),
    "exit": (lambda m, v: early_exit_drafter(m, v, 1), {}),
    "tree": (lambda m, v: early_exit_drafter(m, v, 2), {"width": 3, "levels": 2}),
    "copied": (lambda m, v: composite_drafter(lookup_drafter(), model_drafter(m, v)),
               {"levels": 2}),
}  # fmt: skip
CASES = [("llama", "plain", "greedy"), ("llama", "tree", "sampled")]
MORE = [
    ("llama", "exit", "greedy"),
    *(("gpt2", "exit", "greedy"), ("window", "tree", "greedy"), ("llama", "tree", "greedy")),
    *(("llama", "copied", "greedy"), ("llama", "copied", "sampled")),
]


@pytest.mark.parametrize(
    "family, name, kind", CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]
)
def test_tokens_are_those_of_plain_decoding(family, name, kind, mesh):
    """Three texts share the pipe; the sampled ones are the very draws of plain decoding."""
    model, variables = MODELS[family], VARIABLES[family]
    make, settings = SETTINGS[name]
    drafter = make(model, variables) if make else None
    decoder = pipeinfer(model, variables, drafter, mesh=mesh, **settings)
    more = dict(SAMPLED) if kind == "sampled" else {}
    more |= {"stop_tokens": [unsaid(expected(family, kind))]}
    result = generate(decoder, PROMPTS, max_new_tokens=NEW, logprobs=True, ticks=7, **more)
    same(result, expected(family, kind))
    counters, stats = result.counters, result.stats
    assert (stats.accepted <= stats.drafted).all()
    # Every token is an answer that was foreseen or a correction.
    assert (counters.corrections + stats.accepted.sum(1)).tolist() == NEW
    assert counters.executed[1] <= counters.executed[0] <= counters.ticks
    if name == "plain":
        assert counters.drafted == 0 and counters.executed.tolist() == [sum(NEW)] * 2


def scripted(ranks, mesh, **settings):
    """The pipe whose draft knows the greedy texts and has the right token at the places `ranks`
    tells. One program for all of them; a width below 3 is a matter of its limits."""
    drafter = scripted_drafter(texts(expected("llama", "greedy")), ranks, 64)
    kept = limits(**({"width": 1} | settings))
    return pipeinfer(
        MODELS["llama"], VARIABLES["llama"], drafter, mesh=mesh, width=3, limits=kept, record=128
    )


SHAPE = (len(PROMPTS), 64)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros(SHAPE, bool), np.ones(SHAPE, bool),
     np.arange(64)[None] % 3 == np.zeros((3, 1)), np.random.default_rng(1).random(SHAPE) > 0.66],
    ids=["right", "wrong", "every third", "random"],
)  # fmt: skip
def test_ticks_are_as_few_as_the_answers_allow(wrong, mesh):
    """(1 - a) S + a a token for a draft that answers within a tick; the first text loses nothing to
    the others."""
    decoder = scripted(np.where(wrong, 99, 0), mesh)
    alone = generate(decoder, PROMPTS[:1], max_new_tokens=NEW[0], cells=128)
    right = int(alone.stats.accepted.sum())
    # The last token is known at the start of a tick that is counted, too.
    assert alone.counters.ticks == (NEW[0] - right) * 2 + right + 1
    misses = wrong[0, len(PROMPTS[0]) : len(PROMPTS[0]) + NEW[0]]
    # Only the last token is not drafted for; the first has no draft in time where S is 1.
    assert abs((NEW[0] - right) - misses.sum()) <= 1
    together = generate(decoder, PROMPTS, max_new_tokens=NEW, cells=128)
    same(together, expected("llama", "greedy"))
    assert together.stats.passes[0] == alone.stats.passes[0]


def test_cancelled_packets_compute_nothing(mesh):
    """The second stage runs right tokens alone where each answer corrects the draft."""
    decoder = scripted(np.full(SHAPE, 99), mesh)
    result = generate(decoder, PROMPTS[:1], max_new_tokens=NEW[0], cells=128)
    counters = result.counters
    assert counters.executed[1] == NEW[0]
    assert counters.executed[0] + counters.cancelled[0] >= counters.launched[0] - 1
    assert counters.cancelled[1] >= NEW[0] - 2
    timeline = counters.timeline[: counters.ticks]
    assert (timeline[:, :2] == 1).sum(0).tolist() == counters.executed.tolist()
    assert (timeline[:, :2] == 2).sum(0).tolist() == counters.cancelled.tolist()
    assert timeline[:, 2].sum() == counters.drafted


def test_limits_change_without_a_compilation(mesh, caplog):
    ranks = np.where(np.arange(64)[None] % 4 == np.zeros((3, 1)), 2, 0)
    run = lambda **kw: generate(
        scripted(ranks, mesh, **kw),
        PROMPTS[:1],
        max_new_tokens=NEW[0],
        cells=128,
        ticks=5,
    )
    free = run()
    before = advance._cache_size(), start._cache_size()
    off, narrow, picky, tree = run(width=0), run(window=1), run(accept=1.0), run(width=3)
    assert (advance._cache_size(), start._cache_size()) == before
    for result in (off, narrow, picky, tree):
        assert result.tokens[0].tolist() == free.tokens[0].tolist()
    assert off.counters.drafted == 0 and off.counters.ticks == NEW[0] * 2 + 1
    assert picky.counters.launched.tolist() == [NEW[0]] * 2  # nothing is that probable
    assert free.counters.ticks < narrow.counters.ticks <= off.counters.ticks
    assert tree.counters.corrections[0] <= 1 < free.counters.corrections[0]


@pytest.mark.parametrize("width", [1, 3])
def test_the_simulator_counts_the_engines_ticks(width, mesh):
    """Tick for tick: the same stages busy, the same packets cancelled."""
    for seed in range(4):
        ranks = np.random.default_rng(seed).integers(0, 5, SHAPE)
        decoder = scripted(ranks, mesh, width=width)
        result = generate(decoder, PROMPTS[:1], max_new_tokens=NEW[0], cells=128)
        first = len(PROMPTS[0])
        head = Head(ranks[0, first : first + NEW[0]], width=width)
        played = simulate(head, Pipe(stages=2))
        assert played.times[-1] + 1 == result.counters.ticks
        assert played.accepted == result.stats.accepted.sum()
        assert played.busy == result.counters.executed.sum()


def test_the_cache_is_never_copied(mesh):
    """No copy of a stage's keys or values in the optimised program."""
    model, variables = MODELS["llama"], VARIABLES["llama"]
    decoder = pipeinfer(model, variables, early_exit_drafter(model, variables, 1), mesh=mesh)
    assert cache_copies(decoder) == 0


@pytest.mark.parametrize("kind", ["sampled", pytest.param("greedy", marks=pytest.mark.slow)])
def test_stops_inside_a_packet_end_where_plain_ends(kind, mesh):
    model, variables = MODELS["llama"], VARIABLES["llama"]
    drafter = early_exit_drafter(model, variables, 2)
    decoder = pipeinfer(model, variables, drafter, mesh=mesh, width=3, levels=2)
    whole = expected("llama", kind).tokens
    more = SAMPLED if kind == "sampled" else {}
    for place in (1, 4):
        stop = int(whole[0][place])
        result = generate(
            decoder, PROMPTS, max_new_tokens=NEW, logprobs=True, ticks=7, stop_tokens=[stop], **more
        )
        for ours, all_ in zip(result.tokens, map(list, whole)):
            end = all_.index(stop) + 1 if stop in all_ else len(all_)
            assert ours.tolist() == all_[:end]
        assert result.finish[0] == "stop token"


def test_prompts_are_read_in_chunks_through_the_pipe(mesh):
    decoder = pipelined(MODELS["llama"], VARIABLES["llama"], mesh=mesh, split=(2, 1))
    result = generate(decoder, PROMPTS, max_new_tokens=NEW, prefill_chunk=4)
    same(result, expected("llama", "greedy"))
    assert result.counters.prefill == 3 * 4 + 1  # prompts of 16 places


def test_wrong_settings_are_refused(mesh):
    model, variables = MODELS["llama"], VARIABLES["llama"]
    other = tiny_decoder(vocab_size=32)
    cases = [
        ({"width": 0}, "width=0"),
        ({"levels": 0}, "levels=0"),
        ({"split": (3, 0)}, "split"),
        ({"split": (1, 1)}, "2 of the model's 3"),
        ({"mesh": make_mesh(), "own_slot": True}, "at least 2"),
        ({"drafter": model_drafter(other, random_variables(other))}, "64 tokens and .* 32"),
    ]  # fmt: skip
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            pipeinfer(model, variables, **({"drafter": None, "mesh": mesh} | settings))
    with pytest.raises(ValueError, match="1 to 2"):
        early_exit_drafter(model, variables, 3)


MANY = """
import json, numpy as np, jax
from jaxfm.parallel import generate, make_mesh, plain
from jaxfm.parallel.drafters.model import early_exit_drafter
from jaxfm.parallel.drafters.scripted import scripted_drafter
from jaxfm.parallel.pipe.pipeinfer import pipeinfer
from jaxfm.testing import random_variables, tiny_decoder
model = tiny_decoder(num_layers=5)
variables = random_variables(model)
prompt, new = [3, 1, 4, 1, 5], 40
truth = generate(plain(model, variables), [prompt], max_new_tokens=new).tokens[0]
rows = np.array([[*prompt, *truth]], np.int32)
ranks = np.where(np.random.default_rng(0).random(rows.shape) < 0.7, 0, 9)
mesh = make_mesh(stage=4)
out = []
for own, drafter, kw in (
    (False, scripted_drafter(rows, ranks, 64), {"split": (1, 2, 1, 1)}),
    (True, early_exit_drafter(model, variables, 2), {"width": 3}),
):
    made = pipeinfer(model, variables, drafter, mesh=mesh, own_slot=own, **kw)
    got = generate(made, [prompt], max_new_tokens=new)
    out.append([got.tokens[0].tolist() == truth.tolist(), int(got.counters.ticks),
                int(got.stats.accepted.sum())])
print(json.dumps(out))
"""


@pytest.mark.slow
def test_four_devices_and_a_slot_of_the_draft():
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", MANY], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (chain_same, ticks, right), (tree_same, _, _) = json.loads(done.stdout.splitlines()[-1])
    assert chain_same and tree_same
    assert ticks == (40 - right) * 4 + right + 1


TINY = tiny_decoder(vocab_size=6, embed_dim=8, num_layers=2, num_heads=1, num_kv_heads=1, mlp_dim=8)


@pytest.mark.smoke
def test_a_tree_in_a_pipe_of_one_stage():
    model, variables = MODELS["llama"], VARIABLES["llama"]
    decoder = pipeinfer(model, variables, model_drafter(model, variables), levels=2, width=2)
    result = generate(decoder, PROMPTS[:1], max_new_tokens=10)
    assert result.tokens[0].tolist() == expected("llama", "greedy").tokens[0][:10].tolist()
    # Two tokens a tick, as the draft is the target; the first has no draft yet, the last none any
    # more.
    assert result.counters.ticks == 1 + 1 + 4 + 1


def test_text_streams_and_strings_stop(mesh):
    model = tiny_decoder(num_layers=3, vocab_size=260)
    variables = random_variables(model)
    tokenizer = ByteTokenizer()
    reference = generate(plain(model, variables), ["ab"], max_new_tokens=16, tokenizer=tokenizer)
    decoder = pipelined(model, variables, mesh=mesh)
    result = generate(decoder, ["ab"], max_new_tokens=16, tokenizer=tokenizer, ticks=3)
    assert result.text == reference.text
    assert isinstance(jnp.asarray(result.tokens[0]), jax.Array)
