"""Backbones of few bits, and many adapters in one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.adapters import (
    adapter_of,
    attach,
    detach,
    dora,
    for_requests,
    lora,
    merge,
    quantized,
    together,
)
from jaxfm.adapters.backbone import levels, packed
from jaxfm.kernels import Quantized
from jaxfm.parallel import generate, lookup, plain
from jaxfm.testing import random_variables, tiny_cnn, tiny_decoder

TOKENS = np.random.default_rng(0).integers(0, 64, (3, 7)).astype(np.int32)
MODEL = tiny_decoder()
BASE = random_variables(MODEL)


def shaken(variables, seed, size=0.3):
    leaves, form = jax.tree.flatten(variables.params)
    noise = np.random.default_rng(seed)
    moved = [x + size * noise.normal(size=x.shape).astype(x.dtype) for x in leaves]
    return variables._replace(params=jax.tree.unflatten(form, moved))


def restored(kernel, num_inputs, format, group):
    held = packed(jnp.asarray(kernel), num_inputs, format, group)
    table = levels(format)
    node = Quantized(
        held["codes"], held["steps"], None if table is None else jnp.asarray(table),
        sizes=kernel.shape, number=jnp.dtype(jnp.float32),
    )  # fmt: skip
    return np.asarray(node.whole()), held


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("shape, num_inputs", [((10, 6), 1), ((3, 5, 4), 2), ((5, 2, 3), 1)])
def test_each_number_becomes_the_nearest_level_of_its_group(format, shape, num_inputs):
    kernel = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    kernel.reshape(-1)[:3] = 0
    got, held = restored(kernel, num_inputs, format, 4)
    flat = kernel.reshape(int(np.prod(shape[:num_inputs])), -1)
    table = np.arange(-127, 128) / 127 if format == "int8" else levels(format)
    for start in range(0, len(flat), 4):
        rows = flat[start : start + 4]
        wide = np.abs(rows).max(0) * np.asarray(table, np.float32)[:, None]  # [levels, fan_out]
        nearest = np.abs(rows[None] - wide[:, None]).min(0)
        mine = np.abs(got.reshape(flat.shape)[start : start + 4] - rows)
        np.testing.assert_allclose(mine, nearest, atol=1e-6)
    assert (got.reshape(-1)[:3] == 0).all()
    rows = 4 * -(-len(flat) // 4)
    assert held["codes"].shape == (rows if format == "int8" else rows // 2, flat.shape[1])


def test_levels_of_nf4_are_those_of_the_paper():
    """Appendix E of Dettmers et al. 2023 lists them."""
    table = levels("nf4")
    assert len(table) == 16 and table[7] == 0 and table[0] == -1 and table[15] == 1
    some = [-0.6961928, -0.5250731, -0.3949175, 0.0795803, 0.1609302, 0.7229568]
    np.testing.assert_allclose(table[[1, 2, 3, 8, 9, 14]], some, atol=1e-6)


def test_a_product_by_a_rounded_kernel_is_bounded():
    """|x (W - deq)| <= sum |x| step / 2, with the widest gap of the levels as the step."""
    rng = np.random.default_rng(2)
    kernel = rng.normal(size=(64, 8)).astype(np.float32)
    x = rng.normal(size=(5, 64)).astype(np.float32)
    for format, gap in (
        ("int8", 1 / 127),
        ("int4", 1 / 7),
        ("nf4", float(np.diff(levels("nf4")).max())),
    ):
        got, _ = restored(kernel, 1, format, 16)
        steps = np.abs(kernel.reshape(4, 16, 8)).max(1).repeat(16, 0)
        bound = np.abs(x) @ (steps * gap / 2)
        assert (np.abs(x @ got - x @ kernel) <= bound + 1e-5).all()


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_rounded_backbone_under_an_adapter(format):
    small = quantized(MODEL, format, group=8)
    held = attach(small, BASE, jax.random.key(0))
    rounded = detach(small, held)[1]
    want = jax.jit(MODEL.apply)(rounded, TOKENS)[0]
    np.testing.assert_allclose(jax.jit(small.apply)(held, TOKENS)[0], want, rtol=1e-5, atol=1e-5)
    assert {str(x.dtype) for x in jax.tree.leaves(held.frozen)} == {"uint8", "float32"}
    for make in (lora, dora):
        adapted = make(small, 2, targets="linear")
        fresh = attach(adapted, held, jax.random.key(1))
        np.testing.assert_allclose(
            jax.jit(adapted.apply)(fresh, TOKENS)[0], want, rtol=1e-4, atol=1e-4
        )
        trained = shaken(fresh, 3)
        model, merged = merge(adapted, trained)
        assert model is MODEL and not merged.frozen
        got = jax.jit(adapted.apply)(trained, TOKENS)[0]
        np.testing.assert_allclose(
            got, jax.jit(model.apply)(merged, TOKENS)[0], rtol=2e-4, atol=2e-4
        )
    prompt = [[1, 2, 3, 1, 2]]
    a, b = (
        generate(d, prompt, max_new_tokens=6).tokens[0].tolist()
        for d in (plain(adapted, trained), plain(model, merged))
    )
    assert a == b


def test_a_batch_of_adapters_equals_them_one_by_one():
    adapted = lora(MODEL, 2, targets="linear", alpha=6.0)
    variables = attach(adapted, BASE, jax.random.key(0))
    alone = [shaken(variables, seed) for seed in (1, 2, 3)]
    model, all_of_them = together(adapted, variables, [v.params for v in alone])
    ids = [2, 0, 2]
    served = for_requests(all_of_them, ids)
    got = jax.jit(model.apply)(served, TOKENS)[0]
    one = jax.jit(adapted.apply)
    for row, number in enumerate(ids):
        want = one(alone[number], TOKENS[row : row + 1])[0]
        np.testing.assert_allclose(got[row : row + 1], want, rtol=2e-4, atol=2e-4)
    prompts = [[1, 2, 3, 4, 1, 2], [5, 6], [1, 2, 3, 4, 1, 2]]
    for make in (plain, lookup):
        texts = generate(make(model, served), prompts, max_new_tokens=6).tokens
        for row, number in enumerate(ids):
            own = generate(make(adapted, alone[number]), [prompts[row]], max_new_tokens=6).tokens
            assert texts[row].tolist() == own[0].tolist()


def test_other_requests_compile_nothing():
    adapted = lora(MODEL, 1)
    variables = attach(adapted, BASE, jax.random.key(0))
    model, many = together(adapted, variables, [shaken(variables, i).params for i in range(4)])
    run = jax.jit(model.apply)
    for ids in ([0, 1, 2], [3, 3, 0]):
        run(for_requests(many, ids), TOKENS)
    assert run._cache_size() == 1


def test_adapters_of_smaller_rank_are_filled_up():
    adapted = lora(MODEL, 2, targets="attention.q,attention.o")
    variables = attach(adapted, BASE, jax.random.key(0))
    alone = shaken(variables, 1)
    cut = lambda path, x: x[..., :1] if path[-1].key == "a" else x[:, :1]
    small = jax.tree_util.tree_map_with_path(cut, alone.params)
    zero = lambda path, x: x.at[..., 1:].set(0) if path[-1].key == "a" else x.at[:, 1:].set(0)
    same = alone._replace(params=jax.tree_util.tree_map_with_path(zero, alone.params))
    model, many = together(adapted, variables, [small, alone.params])
    got = jax.jit(model.apply)(for_requests(many, [0, 0, 0]), TOKENS)[0]
    want = jax.jit(adapted.apply)(same, TOKENS)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def one_more(variables):
    return {**variables.params, "head": {"kernel": jnp.ones((2, 2))}}


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: quantized(MODEL, "int3"), "format='int3': give 'int8', 'int4' or 'nf4'"),
        (lambda: quantized(MODEL, group=5), "group=5: give an even number"),
        (lambda: quantized(lora(MODEL)), "has an adapter already"),
        (lambda: quantized(tiny_cnn(), targets="conv2"), "no linear map of jaxfm's own"),
        (lambda: together(dora(MODEL, 2), BASE, [{}]), "Only LoRA adapters"),
        (lambda: together(lora(MODEL, 2), BASE, []), "adapters is empty"),
    ],
)
def test_what_cannot_be_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_adapters_that_do_not_fit_are_refused_by_number():
    adapted = lora(MODEL, 2)
    variables = attach(adapted, BASE, jax.random.key(0))
    wider = jax.tree.map(lambda x: jnp.concatenate([x, x], 1), variables.params)
    for wrong, sentence in (
        (one_more(variables), r"adapters\[1\] .*head.kernel"),
        (wider, r"adapters\[1\] .*different bases"),
    ):
        with pytest.raises(ValueError, match=sentence):
            together(adapted, variables, [variables.params, wrong])
    many = together(adapted, variables, [variables.params])[1]
    for ids in ([1], [-1], []):
        with pytest.raises(ValueError, match=r"give numbers from 0 to 0"):
            for_requests(many, ids)


def test_bytes_of_a_backbone():
    """4 bits and a float32 step for 64 numbers: 4.5 bits a number."""
    small = jax.eval_shape(quantized(MODEL, "nf4", group=8).init, jax.random.key(0))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(small.frozen))
    sites = adapter_of(quantized(MODEL)).config.targets
    numbers = sum(
        BASE.params["layers"][name.split(".")[1]][name.split(".")[2]]["kernel"].size
        for name in sites
    )
    assert held == numbers * (0.5 + 4 / 8)
