"""The laws of every decoder, on a rotary model with grouped queries and on GPT-2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from jaxfm import subnet
from jaxfm.models.families.decoder import DecoderConfig, decoder, gpt2_config
from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.model import early_exit_drafter, model_drafter
from jaxfm.parallel.generation import advance, generate, start
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tokenizer import ByteTokenizer

SIZES = {"vocab_size": 260, "embed_dim": 24, "num_layers": 2, "num_heads": 4, "mlp_dim": 32,
         "max_len": 64}  # fmt: skip
CONFIGS = {
    "rotary": DecoderConfig(num_kv_heads=2, sliding_window=11, **SIZES),
    "gpt2": gpt2_config(**SIZES),
}
MODELS = {name: decoder(config) for name, config in CONFIGS.items()}
VARIABLES = {name: model.init(jax.random.key(0)) for name, model in MODELS.items()}
UNSAID = 259  # a special token that no continuation here has
PROMPTS = [[7, 8, 9, 7, 8, 9, 7], [40], [5, 6] * 5]
NEW = [16, 16, 9]


def negated(variables):
    """Predicts what the model finds least likely: each draft is wrong."""
    flip = lambda scale: {**scale, "scale": -scale["scale"]}
    params = {**variables.params, "head": {"norm": flip(variables.params["head"]["norm"])}}
    return variables._replace(params=params)


def narrow(model, variables):
    keep = subnet.width(
        subnet.axis_sizes(variables, model.axes), {"mlp": 0.5, "kv_heads": 0.5, "embed": 0.75}
    )
    return subnet.extract(variables, model.axes, keep)


def uneven(model, variables):
    """A subnet whose layers have different widths."""
    keep = {"kv_heads": [np.array([0]), np.array([0, 1])], "mlp": [np.arange(9), np.arange(20)]}
    return subnet.extract(variables, model.axes, subnet.Subnet(keep))


def draft_with(variables_of, length=3):
    return lambda model, variables: speculative(
        model, variables, model_drafter(model, variables_of(model, variables)), length=length
    )


DECODERS = {
    "plain": plain,
    "lookup": lambda model, variables: lookup(model, variables, length=4),
    "wrong": draft_with(lambda model, variables: negated(variables)),
    "itself": draft_with(lambda model, variables: variables),
    "narrow": draft_with(narrow, length=1),
    "uneven": draft_with(uneven),
    "exit": lambda model, variables: speculative(
        model, variables, early_exit_drafter(model, variables, 1), length=2
    ),
}
everywhere = pytest.mark.parametrize("family", list(MODELS))


@pytest.fixture(scope="module")
def reference():
    """Greedy continuations without a cache: argmax over `apply` on the growing prefix."""
    found = {}
    for family, model in MODELS.items():
        forward = jax.jit(lambda variables, tokens, model=model: model.apply(variables, tokens)[0])
        tokens = np.zeros((len(PROMPTS), 32), np.int32)
        lengths = np.array([len(prompt) for prompt in PROMPTS])
        for row, prompt in zip(tokens, PROMPTS):
            row[: len(prompt)] = prompt
        logprobs = np.zeros(tokens.shape, np.float32)
        rows = np.arange(len(PROMPTS))
        for _ in range(max(NEW)):
            logits = np.asarray(forward(VARIABLES[family], jnp.asarray(tokens)))
            last = logits[rows, lengths - 1]
            best = last.argmax(-1)
            tokens[rows, lengths] = best
            logprobs[rows, lengths] = jax.nn.log_softmax(last)[rows, best]
            lengths += 1
        spans = [slice(len(prompt), len(prompt) + n) for prompt, n in zip(PROMPTS, NEW)]
        assert not (tokens == UNSAID).any()
        found[family] = (
            [row[span].tolist() for row, span in zip(tokens, spans)],
            [row[span] for row, span in zip(logprobs, spans)],
        )
    return found


def run(family, name, stop=UNSAID):
    made = DECODERS[name](MODELS[family], VARIABLES[family])
    return generate(
        made, PROMPTS, max_new_tokens=NEW, logprobs=True, ticks=4, tokenizer=ByteTokenizer(),
        stop_tokens=[stop],
    )  # fmt: skip


@pytest.mark.parametrize(
    "family, name",
    [(family, name) for family in MODELS for name in DECODERS
     if (family, name) not in {("rotary", "narrow"), ("rotary", "exit"), ("gpt2", "uneven")}],
)  # fmt: skip
def test_greedy_is_the_uncached_model_whatever_drafts(family, name, reference):
    tokens, logprobs = reference[family]
    result = run(family, name)
    assert [part.tolist() for part in result.tokens] == tokens
    for ours, theirs in zip(result.logprobs, logprobs):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert result.finish == ["length"] * 3
    drafted, accepted, passes = (
        getattr(result.stats, f) for f in ("drafted", "accepted", "passes")
    )
    assert (accepted <= drafted).all()
    # Each pass commits the accepted drafts and one token more.
    assert (passes + accepted.sum(1)).tolist() == NEW
    if name == "wrong":
        assert accepted.sum() == 0 and drafted.sum() > 0
    if name == "itself":
        assert (accepted == drafted).all() and passes.tolist() == [4, 4, 3]


@everywhere
@pytest.mark.parametrize("name", ["plain", "lookup", "itself"])
def test_stops_inside_a_block_end_where_plain_ends(family, name, reference):
    """Every place of the continuation in turn is a stop, so all places of a block are met."""
    tokens = reference[family][0]
    table = ByteTokenizer().token_bytes()
    for place in (1, 2, 3, 5):
        stop = tokens[0][place]
        result = run(family, name, stop)
        for ours, whole in zip(result.tokens, tokens):
            end = whole.index(stop) + 1 if stop in whole else len(whole)
            assert ours.tolist() == whole[:end]
        assert result.finish[0] == "stop token"
        spoken = b"".join(table[token] for token in result.tokens[0][:-1])
        assert result.text[0] == spoken.decode(errors="replace")


@pytest.mark.parametrize("name", ["plain", "lookup", "itself"])
def test_stop_strings_inside_a_block_end_where_plain_ends(name):
    # A model that always says "abcd": the next letter follows from the token alone.
    model, variables = MODELS["gpt2"], alphabet(VARIABLES["gpt2"])
    made = DECODERS[name](model, variables)
    kw = {"max_new_tokens": 16, "ticks": 2, "tokenizer": ByteTokenizer()}
    forever = "bcdabcdabcdabcda"
    for stop, text, count in (("da", "bc", 4), ("cdabc", "b", 6), ("d", "bc", 3), ("zz", None, 16)):
        result = generate(made, ["abcda", "xc"], stop_strings=[stop, "yy"], **kw)
        assert result.text[0] == (text or forever)
        assert len(result.tokens[0]) == count
        assert result.finish[0] == ("stop string" if text else "length")


def alphabet(variables):
    """GPT-2 reduced to a -> b -> c -> d -> a: the first MLP adds the next letter's direction."""
    params = jax.tree.map(np.zeros_like, variables.params)
    params["head"]["norm"]["scale"] += 1
    params["layers"]["mlp_norm"]["scale"] += 1
    for i, letter in enumerate(b"abcd"):
        params["embed"]["tokens"]["table"][letter, i] = 1
        params["layers"]["mlp"]["up"]["kernel"][0, i, i] = 4
        params["layers"]["mlp"]["down"]["kernel"][0, i, (i + 1) % 4] = 4
    return variables._replace(params=jax.tree.map(jnp.asarray, params))


def test_a_request_does_not_depend_on_its_neighbours():
    """Draws are keyed by request and position: a batch of one gives what a batch of three gives."""
    made = plain(MODELS["rotary"], VARIABLES["rotary"])
    settings = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 8, "key": jax.random.key(5)}
    together = generate(made, PROMPTS, **settings)
    alone = generate(made, PROMPTS[:1], **settings)
    assert together.tokens[0].tolist() == alone.tokens[0].tolist()
    again = generate(made, PROMPTS, **settings, ticks=3)
    assert [t.tolist() for t in again.tokens] == [t.tolist() for t in together.tokens]
    mixed = generate(made, PROMPTS, **(settings | {"temperature": [0.0, 0.9, 0.9]}))
    assert mixed.tokens[0].tolist() == generate(made, PROMPTS, max_new_tokens=8).tokens[0].tolist()


TINY = decoder(
    DecoderConfig(vocab_size=6, embed_dim=8, num_layers=1, num_heads=1, mlp_dim=8, max_len=8)
)


@pytest.mark.parametrize(
    "name", ["plain", pytest.param("lookup", marks=pytest.mark.slow), "speculative"]
)
def test_sampled_texts_have_the_models_distribution(name):
    """Chi-square of all three-token texts over 100,000 requests, through the whole engine."""
    requests = 100_000
    grow = lambda variables: jax.tree.map(lambda x: x * 2, variables)
    target, draft = (grow(TINY.init(jax.random.key(i))) for i in range(2))
    made = {
        "plain": lambda: plain(TINY, target),
        "lookup": lambda: lookup(TINY, target, length=2),
        "speculative": lambda: speculative(TINY, target, model_drafter(TINY, draft), length=2),
    }[name]()
    prompt = [1, 2, 1]
    result = generate(
        made, [prompt] * requests, max_new_tokens=3, cells=8, temperature=1.2, top_p=0.95,
        key=jax.random.key(11),
    )  # fmt: skip
    texts = np.stack(result.tokens)
    every = np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), -1).reshape(-1, 3)
    inputs = np.concatenate([np.tile(prompt, (216, 1)), every], axis=1)
    logits = np.asarray(TINY.apply(target, jnp.asarray(inputs, jnp.int32))[0], np.float64)[:, 2:5]
    probs = nucleus(logits / 1.2, 0.95)
    expected = np.take_along_axis(probs, every[..., None], axis=-1)[..., 0].prod(1) * requests
    seen = np.bincount(texts @ [36, 6, 1], minlength=216)
    assert (seen[expected == 0] == 0).all()
    often = expected >= 5
    seen, expected = (np.append(x[often], x[~often].sum()) for x in (seen, expected))
    seen, expected = seen[expected > 0], expected[expected > 0]
    assert len(seen) > 20
    assert stats.chisquare(seen, expected * (requests / expected.sum())).pvalue > 1e-3
    if name == "speculative":
        assert 0.1 < result.stats.accepted.sum() / result.stats.drafted.sum() < 0.95


def nucleus(scores, top_p):
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    order = np.argsort(-probs, axis=-1)
    ranked = np.take_along_axis(probs, order, axis=-1)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
    np.put_along_axis(probs, order, ranked, axis=-1)
    return probs / probs.sum(-1, keepdims=True)


def test_a_second_call_compiles_nothing(caplog):
    """Not for other prompts, lengths, temperatures or keys, nor for a decoder made anew."""
    model, variables = MODELS["gpt2"], VARIABLES["gpt2"]
    settings = {"temperature": 0.5, "top_k": 5, "ticks": 2, "stop_tokens": [3], "max_new_tokens": 6}
    call = lambda prompts, seed, **changed: generate(
        lookup(model, variables), prompts, key=jax.random.key(seed), **(settings | changed)
    )
    call([[1, 2, 3], [4]], 0)
    before = advance._cache_size(), start._cache_size()
    with jax.log_compiles():
        caplog.clear()
        call([[9, 8, 7, 6], [4, 5]], 1, temperature=[0.9, 0.0], top_k=[3, 9], max_new_tokens=[9, 4])
    assert (advance._cache_size(), start._cache_size()) == before
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert not [m for m in compiled if "(advance)" in m or "(start)" in m], compiled


def test_variables_on_all_devices_compile_one_loop():
    """A federated run leaves its model so; the first piece's program must be the second's, too."""
    mesh = make_mesh(clients=len(jax.devices()))
    spread = jax.device_put(VARIABLES["gpt2"], NamedSharding(mesh, PartitionSpec()))
    call = lambda variables: generate(
        plain(MODELS["gpt2"], variables), [[1, 2, 3, 4]], max_new_tokens=6, ticks=2
    ).tokens[0]
    before = advance._cache_size()
    on_all = call(spread)
    assert advance._cache_size() == before + 1
    np.testing.assert_array_equal(on_all, call(VARIABLES["gpt2"]))
