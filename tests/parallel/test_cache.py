import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.model import layers_of, unstack, with_layers
from jaxfm.models.families.decoder import DecoderConfig, decoder
from jaxfm.parallel import cache as cache_module
from jaxfm.parallel.cache import Block, causal_model, init_cache, keep, visible
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.model import early_exit_drafter
from jaxfm.parallel.generation import advance
from jaxfm.parallel.sampling import Sampling
from jaxfm.parallel.simulation.xla_copy_probe import count_operations, tick_program
from jaxfm.parallel.verification import Rules, Stats, Text

CONFIG = DecoderConfig(
    vocab_size=32, embed_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=24
)
MODEL = decoder(CONFIG)
NET = causal_model(MODEL)
VARIABLES = MODEL.init(jax.random.key(0))
APART = with_layers(VARIABLES, unstack(layers_of(VARIABLES)))
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)

# Compiled once for all tests.
prefill = jax.jit(cache_module.prefill, static_argnums=(0, 4, 5))
extend = jax.jit(cache_module.extend, static_argnums=0)
read = jax.jit(cache_module.read, static_argnums=0)
apply = jax.jit(MODEL.apply)


@jax.jit
def logits_of(x):
    return NET.stages.head(VARIABLES, x)


@pytest.mark.parametrize("variables", [VARIABLES, APART], ids=["stacked", "dict of layers"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_reading_on_from_a_prefilled_cache_equals_apply(variables, chunk):
    lengths = jnp.array([9, 5], jnp.int32)  # unequal prompts, right-padded

    cache = prefill(NET, variables, TOKENS, lengths, 16, chunk)
    following = jnp.take_along_axis(TOKENS, lengths[:, None] + jnp.arange(3)[None], axis=1)
    logits = logits_of(extend(NET, variables, cache, following, lengths, jnp.ones((2, 3), bool))[0])
    expected = apply(VARIABLES, TOKENS)[0]
    np.testing.assert_allclose(logits[0], expected[0, 9:12], atol=2e-5)
    np.testing.assert_allclose(logits[1], expected[1, 5:8], atol=2e-5)


def test_what_was_rejected_is_neither_seen_nor_in_the_way():
    live = jnp.ones((2, 4), bool)
    start = jnp.array([4, 4], jnp.int32)
    cache = prefill(NET, VARIABLES, TOKENS[:, :4], start, 16)
    wrong = (TOKENS[:, 4:8] + 1) % 32
    spoilt = extend(NET, VARIABLES, cache, wrong, start, live)[1]
    assert keep(spoilt, start).bits.sum() == 8
    x, after = extend(NET, VARIABLES, spoilt, TOKENS[:, 4:8], start, live)
    expected = apply(VARIABLES, TOKENS[:, :8])[0]
    np.testing.assert_allclose(logits_of(x), expected[:, 4:], atol=2e-5)
    assert after.positions[1, :8].tolist() == list(range(8))


def test_branches_share_cells_by_bits():
    """Two continuations of one text in one pass give what each gives alone."""
    prompt, one, two = TOKENS[:1, :4], TOKENS[:1, 4:7], (TOKENS[:1, 4:7] + 5) % 32
    cache = prefill(NET, VARIABLES, prompt, jnp.array([4], jnp.int32), 16)
    cache = cache._replace(bits=cache.bits * 7)  # the prompt is part of the truth and both branches
    tree = Block(
        jnp.concatenate([one, two], axis=1),
        jnp.array([[4, 5, 6, 4, 5, 6]], jnp.int32),
        jnp.array([[9, 8, 7, 10, 11, 12]], jnp.int32),  # any free cells will do
        jnp.array([[2, 2, 2, 4, 4, 4]], jnp.uint32),
    )
    x, cache = read(NET, VARIABLES, cache, tree)
    logits = logits_of(x)
    for branch, part in ((one, logits[:, :3]), (two, logits[:, 3:])):
        alone = apply(VARIABLES, jnp.concatenate([prompt, branch], axis=1))[0]
        np.testing.assert_allclose(part, alone[:, 4:], atol=2e-5)
    assert sorted(cache.positions[0, cache.bits[0] == 4].tolist()) == [4, 5, 6]


def test_a_query_sees_earlier_cells_of_its_branches_within_the_window():
    seen = visible(
        jnp.array([[5]], jnp.int32), jnp.array([[0b110]], jnp.uint32),
        jnp.array([[2, 3, 5, 6, 4, 4]], jnp.int32),
        jnp.array([[7, 2, 4, 7, 1, 0]], jnp.uint32), 3,
    )  # fmt: skip
    assert seen.tolist() == [[[False, True, True, False, False, False]]]


def without_a_head(variables, i):
    """Layer `i` keeps the first of its two groups of heads only."""
    variables = jax.tree.map(lambda x: x, variables)
    attention = variables.params["layers"][i]["attention"]
    for name, axis in (("q", 1), ("k", 1), ("v", 1), ("o", 0)):
        attention[name]["kernel"] = jax.lax.slice_in_dim(attention[name]["kernel"], 0, 1, axis=axis)
    return variables


UNEVEN = without_a_head(APART, "1")


def test_cache_is_sized_by_the_parameters_of_each_layer():
    uneven = UNEVEN
    cache = init_cache(NET, uneven, 2, 16)
    assert [k.shape for k in cache.k] == [(2, 2, 16, 4), (2, 1, 16, 4), (2, 2, 16, 4)]
    assert init_cache(NET, VARIABLES, 2, 16).v.shape == (3, 2, 2, 16, 4)
    # ... and such a model decodes by its cache as it does without.
    lengths = jnp.array([9, 9], jnp.int32)
    cache = prefill(NET, uneven, TOKENS[:, :9], lengths, 16)
    x, _ = extend(NET, uneven, cache, TOKENS[:, 9:], lengths, jnp.ones((2, 3), bool))
    expected = apply(uneven, TOKENS)[0]
    np.testing.assert_allclose(logits_of(x), expected[:, 9:], atol=2e-5)


@pytest.mark.parametrize("form", ["stacked", "dict", "uneven"])
def test_no_tick_copies_the_cache(form):
    """Counts copies of keys and values in the compiled loop of ticks: of all, or of one layer, as
    they are or transposed. (XLA's CPU backend copies slices of a stack: layers are apart there.)"""
    cells, batch = 37, 2  # sizes that occur nowhere else
    variables = {"stacked": VARIABLES, "dict": APART, "uneven": UNEVEN}[form]
    program = plain(MODEL, VARIABLES).functions
    pair = (variables, None)
    tokens = jnp.zeros((batch, cells), jnp.int32)
    ones = jnp.ones((batch,), jnp.int32)
    stats = Stats(ones * 0, jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, 0), jnp.int32))
    text = Text(tokens, ones, ones * 9, ones < 0, ones * 0, stats, ones < 0)
    rules = Rules(Sampling(jax.random.key(0), ones), jnp.zeros((0,), jnp.int32))
    state = jax.eval_shape(lambda: program.start(pair, tokens, ones, cells, None))
    compiled = advance.lower(program, pair, state, text, rules, 4).compile().as_text()
    whole = r"f32\[3,2,2,37,4\]" if form == "stacked" else r"f32\[2,2,37,4\]"
    assert re.search(whole, compiled), "the cache's shape is not in the program"
    assert not re.findall(rf"= {whole}\S* copy\(", compiled)
    if form != "stacked":
        size = max(leaf.size for leaf in jax.tree.leaves(state[0][:2]))
        moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose|slice)\(", compiled)
        assert all(math.prod(map(int, shape.split(","))) < size for shape in moved)


@pytest.mark.parametrize("draft, most", [(0, 150), (3, 310)])
def test_a_tick_starts_few_operations(draft, most):
    """On a small model a tick takes as long as its operations are many, so their number is held."""
    decoder = plain(MODEL, VARIABLES)
    if draft:
        drafter = early_exit_drafter(MODEL, VARIABLES, 1)
        decoder = speculative(MODEL, VARIABLES, drafter, length=draft)
    assert 40 < count_operations(tick_program(decoder)[0]) < most


def test_a_model_without_stages_does_not_decode():
    with pytest.raises(ValueError, match="no stages; only causal language models"):
        causal_model(MODEL._replace(stages=None))
