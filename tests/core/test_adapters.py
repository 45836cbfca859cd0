"""Adapters: a fresh one changes nothing, a trained one equals its formula, and merges."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxfm.adapters import (
    adapter_of,
    attach,
    bitfit,
    bottleneck,
    choose,
    detach,
    dora,
    head_only,
    lora,
    merge,
    only,
    pairs,
)
from jaxfm.adapters.adapter import fetch, leaf_paths
from jaxfm.data.federation import federate
from jaxfm.federated import Local, Population, compile_rounds, profiles
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.kernels import LowRank
from jaxfm.model import from_nnx, layers_of, unstack, with_layers
from jaxfm.parallel import early_exit_drafter, generate, lookup, plain, speculative
from jaxfm.subnet import axis_sizes, extract, mask, width
from jaxfm.tasks import causal_lm
from jaxfm.testing import random_variables, tiny_cnn, tiny_decoder, tiny_encoder, tiny_vit

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 7)).astype(np.int32)
IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
MODELS = {
    "decoder": (tiny_decoder(), TOKENS, "linear"),
    "encoder": (tiny_encoder(), {"tokens": TOKENS}, "linear"),
    "vit": (tiny_vit(), IMAGES, "linear,head.classifier"),
    "cnn": (tiny_cnn(), IMAGES[..., :1], "conv2,dense"),
    "own": (from_nnx(lambda rngs: nnx.Linear(3, 4, rngs=rngs)), IMAGES[0, 0], "kernel"),
}
KINDS = {"lora": lora, "dora": dora, "bottleneck": bottleneck}
PAIRS = [
    (family, kind) for family in MODELS for kind in KINDS
    if kind != "bottleneck" or family in ("decoder", "encoder", "vit")
    if family != "own"
]  # fmt: skip


def shaken(variables, size=0.3):
    """The variables with their trained part moved at random."""
    leaves, form = jax.tree.flatten(variables.params)
    noise = np.random.default_rng(7)
    moved = [x + size * noise.normal(size=x.shape).astype(x.dtype) for x in leaves]
    return variables._replace(params=jax.tree.unflatten(form, moved))


@pytest.mark.parametrize("family, kind", PAIRS)
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_merges(family, kind):
    model, inputs, targets = MODELS[family]
    base = random_variables(model)
    adapted = KINDS[kind](model, 2, targets=targets)
    variables = attach(adapted, base, jax.random.key(3))
    chex.assert_trees_all_equal_shapes(variables, jax.eval_shape(adapted.init, jax.random.key(0)))
    assert jax.tree.structure(variables.params) == jax.tree.structure(
        jax.tree.map(lambda x: 0, adapted.axes.params, is_leaf=lambda x: isinstance(x, tuple))
    )
    call = jax.jit(adapted.apply)
    before = jax.jit(model.apply)(base, inputs)[0]
    np.testing.assert_allclose(call(variables, inputs)[0], before, rtol=2e-5, atol=2e-5)
    trained = shaken(variables)
    after = call(trained, inputs)[0]
    assert np.abs(after - before).max() > 1e-2
    if kind == "bottleneck":
        with pytest.raises(ValueError, match="is not linear: it cannot be merged"):
            merge(adapted, trained)
    else:
        merged_model, merged = merge(adapted, trained)
        chex.assert_trees_all_equal_shapes(merged, base)
        got = jax.jit(merged_model.apply)(merged, inputs)[0]
        np.testing.assert_allclose(got, after, rtol=1e-4, atol=1e-4)
    below, own = detach(adapted, trained)
    assert below is model
    chex.assert_trees_all_equal(own, base)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_kernels_are_those_of_the_formula(kind):
    model = tiny_decoder()
    base = random_variables(model)
    adapted = KINDS[kind](model, 3, targets="attention.q,attention.o", alpha=5.0)
    variables = shaken(attach(adapted, base, jax.random.key(3)))
    merged = merge(adapted, variables)[1]
    for name, inputs in (("q", 1), ("o", 3)):
        own = variables.params["layers"]["attention"][name][kind]
        for layer in range(2):
            w = np.asarray(base.params["layers"]["attention"][name]["kernel"][layer], np.float64)
            flat = w.reshape(int(np.prod(w.shape[:inputs])), -1)
            a, b = (np.asarray(own[x][layer], np.float64) for x in "ab")
            flat = flat + 5 / 3 * a.reshape(-1, 3) @ b.reshape(3, -1)
            if kind == "dora":
                norms = np.sqrt((flat**2).sum(0))
                flat = flat / norms * np.asarray(own["magnitude"][layer]).reshape(-1)
            got = merged.params["layers"]["attention"][name]["kernel"][layer]
            np.testing.assert_allclose(got, flat.reshape(w.shape), rtol=1e-5, atol=1e-5)


def test_scales_and_ranks():
    model = tiny_decoder()
    stable = lora(model, 4, alpha=6.0, rank_stabilized=True, ranks={"attention.v": 1})
    assert adapter_of(stable).config.scale(4) == 3.0
    variables = jax.eval_shape(stable.init, jax.random.key(0))
    ranks = {path[2]: a.shape[-1] for path, (a, _) in pairs(variables.params).items()}
    assert ranks == {"q": 4, "k": 4, "v": 1, "o": 4}
    assert axis_sizes(variables, stable.axes)["rank_1"] == 1


def test_gradients_are_those_of_the_merged_model():
    """By the chain rule: dL/dA = s dL/dW B', dL/dB = s A' dL/dW."""
    model, tokens = tiny_decoder(), TOKENS
    adapted = lora(model, 2, targets="mlp.up", alpha=6.0)
    variables = shaken(attach(adapted, random_variables(model), jax.random.key(3)))
    target = jax.random.normal(jax.random.key(5), (2, 7, 64))
    loss = lambda model: lambda v: (model.apply(v, tokens)[0] * target).sum()
    got = jax.jit(jax.grad(loss(adapted)))(variables).params["layers"]["mlp"]["up"]["lora"]
    dw = jax.jit(jax.grad(loss(model)))(merge(adapted, variables)[1])
    dw = dw.params["layers"]["mlp"]["up"]["kernel"]
    own = variables.params["layers"]["mlp"]["up"]["lora"]
    np.testing.assert_allclose(
        got["a"], 3 * jnp.einsum("lio,lro->lir", dw, own["b"]), rtol=2e-3, atol=2e-3
    )
    np.testing.assert_allclose(
        got["b"], 3 * jnp.einsum("lir,lio->lro", own["a"], dw), rtol=2e-3, atol=2e-3
    )


def test_the_backward_pass_has_no_gradient_of_the_backbone():
    """No array of the whole kernel's shape is multiplied out, forward or backward."""
    kernel = jnp.ones((5, 7))
    f = lambda a, b, x: LowRank(kernel, a, b).times(x, 1).sum()
    jaxpr = jax.make_jaxpr(jax.grad(f, (0, 1)))(
        jnp.ones((5, 2)), jnp.ones((2, 7)), jnp.ones((3, 5))
    )
    made = [v.aval.shape for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars]
    assert (5, 7) not in made


def test_dropout_only_in_training_and_differs_by_layer_and_site():
    model = tiny_decoder()
    adapted = lora(model, 2, dropout=0.5)
    variables = shaken(attach(adapted, random_variables(model), jax.random.key(3)), 1.0)
    apply = jax.jit(adapted.apply, static_argnames="train")
    still = apply(variables, TOKENS)[0]
    drawn = [apply(variables, TOKENS, train=True, key=jax.random.key(i))[0] for i in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-3
    assert np.abs(drawn[0] - still).max() > 1e-3
    low = adapter_of(adapted).join(variables, jax.random.key(0)).params["layers"]["attention"]
    keys = np.concatenate([jax.random.key_data(low[name]["kernel"].key) for name in "qkvo"])
    assert len(np.unique(keys, axis=0)) == 8


def test_dropout_keeps_the_mean():
    x, a = jnp.ones((1, 4000)), jnp.full((4000, 1), 1 / 4000)
    low = LowRank(jnp.zeros((4000, 1)), a, jnp.ones((1, 1)), jax.random.key(0), dropout=0.25)
    assert abs(float(low.times(x, 1)[0, 0]) - 1) < 0.04


def test_federating_moves_adapters_only():
    model = tiny_decoder()
    adapted = lora(model, 2, targets="linear")
    start = attach(adapted, random_variables(model), jax.random.key(1))
    tokens = np.random.default_rng(0).integers(0, 16, (12, 9)).astype(np.int32)
    data = federate({"tokens": tokens}, [np.arange(3), np.arange(3, 9), np.arange(9, 12)])
    algorithm = fed_avg(adapted, causal_lm(), Local(optax.adam(0.05), 2))
    people = Population(data, profiles(3), bucket=np.zeros(3, np.int32))
    engine = compile_rounds(algorithm, people, cohort_size=2)
    state = engine.init(start, jax.random.key(4))
    for _ in range(2):
        state, _ = engine.run(state)
    trained = state.server.variables
    chex.assert_trees_all_equal(trained.frozen, start.frozen)
    for path in leaf_paths(trained.params):
        assert np.abs(fetch(trained.params, path) - fetch(start.params, path)).max() > 0
    prompt = [[1, 2, 3, 4, 1, 2, 3]]
    decoders = (
        plain(adapted, trained),
        plain(*merge(adapted, trained)),
        lookup(adapted, trained),
        speculative(adapted, trained, early_exit_drafter(adapted, trained, 1)),
    )
    texts = [generate(d, prompt, max_new_tokens=8).tokens[0].tolist() for d in decoders]
    assert len(set(map(tuple, texts))) == 1


def test_an_adapted_model_is_cut_and_masked_alike():
    adapted = lora(tiny_decoder(), 2, targets="linear")
    variables = shaken(attach(adapted, random_variables(tiny_decoder()), jax.random.key(1)))
    subnet = width(axis_sizes(variables, adapted.axes), {"rank": 1, "mlp": 0.5, "kv_heads": 1})
    small, masked = (f(variables, adapted.axes, subnet) for f in (extract, mask))
    a, b = (jax.jit(adapted.apply)(v, TOKENS)[0] for v in (small, masked))
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    assert {a.shape[-1] for a, _ in pairs(small.params).values()} == {1}


def test_unequal_layers_take_adapters():
    adapted = lora(tiny_decoder(), 2, ranks={"attention.v": 1})
    variables = shaken(attach(adapted, random_variables(tiny_decoder()), jax.random.key(1)))
    apart = with_layers(variables, unstack(layers_of(variables)))
    a, b = (jax.jit(adapted.apply)(v, TOKENS)[0] for v in (variables, apart))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_parts_of_a_model():
    vit = tiny_vit()
    last = jax.eval_shape(head_only(vit).init, jax.random.key(0))
    assert set(last.params) == {"head"}
    biased = jax.eval_shape(bitfit(vit, trained="head.classifier").init, jax.random.key(0))
    names = {".".join(path) for path in leaf_paths(biased.params)}
    assert names - {"head.classifier.kernel"} == {n for n in names if n.endswith(".bias")}
    assert "layers.attention.q.bias" in names
    base = random_variables(vit)
    held = attach(head_only(vit), base, jax.random.key(0))
    a, b = (jax.jit(m.apply)(v, IMAGES)[0] for m, v in ((vit, base), (head_only(vit), held)))
    np.testing.assert_array_equal(a, b)


def test_what_is_trained_beside_an_adapter_stays_trained():
    vit = tiny_vit()
    adapted = lora(vit, 2, trained="head")
    variables = shaken(attach(adapted, random_variables(vit), jax.random.key(0)))
    assert set(variables.params) == {"head", "layers"}
    model, own = detach(adapted, variables)
    assert model is vit and not own.frozen
    chex.assert_trees_all_equal(own.params["head"], variables.params["head"])


def test_adapters_stand_around_each_other():
    model = tiny_decoder()
    inner = lora(model, 2, targets="attention.q")
    first = shaken(attach(inner, random_variables(model), jax.random.key(0)))
    outer = bottleneck(inner, 3, targets="mlp.down")
    both = shaken(attach(outer, first, jax.random.key(1)))
    assert [path[-2] for path in leaf_paths(both.params)] == ["bottleneck"] * 3
    below, own = detach(outer, both)
    assert below is inner
    chex.assert_trees_all_equal(own, first)
    two, seen = (jax.jit(m.apply)(v, TOKENS)[0] for m, v in ((outer, both), (inner, first)))
    assert np.abs(two - seen).max() > 1e-2


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda m: lora(m, 0), r"rank=0 at layers.attention.k: give a rank from 1 to 8"),
        (lambda m: lora(m, 9), r"rank=9 at layers.attention.k: give a rank from 1 to 8"),
        (lambda m: lora(m, targets="atention"), "did you mean 'attention'"),
        (lambda m: lora(m, targets="attention.w"), r"'attention.w' matches no kernel"),
        (lambda m: lora(m, 2, alpha=0), "alpha=0.0: give a finite number above 0"),
        (lambda m: lora(m, 2, alpha=float("nan")), "alpha=nan"),
        (lambda m: lora(m, 2, dropout=1.0), "dropout=1.0: give a probability"),
        (lambda m: lora(m, 2, ranks={"mlp.up": 1}), "matches none of the targets"),
        (lambda m: lora(m, 2, trained="haed"), "trained='haed' matches no parameter"),
        (lambda m: bottleneck(m, 0), "size=0: give at least 1"),
        (lambda m: bottleneck(tiny_cnn(), 2, targets="conv2"), "no linear map of jaxfm's own"),
        (lambda m: only(m, ()), "trained is empty"),
        (lambda m: merge(m, random_variables(m)), "no adapter; put one around it"),
        (lambda m: attach(lora(m, 2), random_variables(tiny_encoder()), None), "they (lack|hold)"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(tiny_decoder())


def test_targets_by_their_usual_names():
    names = lambda text: [site.path[-2] for site in choose(tiny_decoder(), text)]
    assert names("q_proj,v_proj") == names("qv") == names(["attention.v", "q"]) == ["q", "v"]
    assert set(names("linear")) == {"q", "k", "v", "o", "gate", "up", "down"}
