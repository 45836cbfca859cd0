"""The laws of subnets, for every family of models.

apply(mask(v)) == apply(extract(v)); extract(embed(s)) == s; cover == embed of ones;
mask == embed of extract; embed is the adjoint of extract; the compiler counts an extracted model
as one built at that size.
"""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxfm.model import Variables, layers_of, num_layers, unstack, with_layers
from jaxfm.models import build
from jaxfm.models.families.cnn import cnn
from jaxfm.models.families.decoder import resized
from jaxfm.subnet import (
    Subnet,
    axis_sizes,
    centre,
    cover,
    embed,
    extract,
    is_taps,
    kernel_sizes,
    mask,
    width,
)
from jaxfm.testing import (
    random_variables,
    tiny_cnn,
    tiny_decoder,
    tiny_encoder,
    tiny_gpt2,
    tiny_vit,
)

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 64, (2, 7)).astype(np.int32)
IMAGES = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
FAMILIES = {
    "decoder": (tiny_decoder(tied=False, qkv_bias=True, out_bias=True, mlp_bias=True), TOKENS),
    "gpt2": (tiny_gpt2(), TOKENS),
    "encoder": (tiny_encoder(), {"tokens": TOKENS, "mask": TOKENS > 8}),
    "classifying encoder": (tiny_encoder(head="classify", family="roberta"), {"tokens": TOKENS}),
    "vit": (tiny_vit(), IMAGES),
    "cnn": (tiny_cnn(), IMAGES[..., :1]),
}
WHOLE = {"rotary_dim", "layer", "vocab", "position", "type", "channel", "class"}
# Zeros are exact, but the sums around them are taken in another order: a few units in the last
# place of float32, on outputs of size one, through a handful of layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def drawn(family: str) -> Variables:
    return random_variables(FAMILIES[family][0])


APPLY = {name: jax.jit(model.apply) for name, (model, _) in FAMILIES.items()}


def sample(rng: np.random.Generator, sizes: dict[str, int], layers: int | None) -> Subnet:
    """Half of every axis that can be cut, drawn anew for each layer and head where that may be."""
    keep = {}
    for name in sorted(set(sizes) - WHOLE):
        size = sizes[name]
        lead: tuple[int, ...] = ()
        if layers and name in ("mlp", "kv_heads", "q_per_kv"):
            lead = (layers,)
        if layers and name in ("qk_dim", "v_dim"):
            lead = (layers, sizes["kv_heads"])
        rows = [rng.permutation(size)[: -(-size // 2)] for _ in range(int(np.prod(lead)))]
        keep[name] = np.reshape(rows, (*lead, -1)).astype(np.int32)
    return Subnet(keep)


def subnet_of(family: str, seed: int) -> Subnet:
    axes, rng = FAMILIES[family][0].axes, np.random.default_rng(seed)
    sizes = axis_sizes(drawn(family), axes)
    keep = dict(sample(rng, sizes, sizes.get("layer")).keep)
    for name, size in kernel_sizes(drawn(family), axes).items():
        keep[name] = centre(size, int(rng.choice([1, 3, 5])))
    return Subnet(keep)


# Families of the same blocks as another one are slow tests where a law compiles a lot.
slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
BLOCKS = [slow(n) if n in ("gpt2", "classifying encoder") else n for n in FAMILIES]
each_family = pytest.mark.parametrize("family", FAMILIES)
each_layout = pytest.mark.parametrize("family", ["decoder", "classifying encoder", "vit", "cnn"])


@pytest.mark.parametrize("family", BLOCKS)
@hypothesis.settings(max_examples=3)
@hypothesis.given(seed=st.integers(0, 10**6))
def test_a_masked_model_computes_what_the_extracted_one_does(family, seed):
    (model, inputs), variables = FAMILIES[family], drawn(family)
    subnet = subnet_of(family, seed)
    masked, _ = APPLY[family](mask(variables, model.axes, subnet), inputs)
    small, _ = APPLY[family](extract(variables, model.axes, subnet), inputs)
    whole, _ = APPLY[family](variables, inputs)
    np.testing.assert_allclose(masked, small, **CLOSE)
    assert not np.allclose(whole, masked, **CLOSE)


@each_layout
@hypothesis.settings(max_examples=3)
@hypothesis.given(seed=st.integers(0, 10**6))
def test_embed_extract_cover_and_mask_agree(family, seed):
    axes, variables = FAMILIES[family][0].axes, drawn(family)
    subnet = subnet_of(family, seed)
    small = extract(variables, axes, subnet)
    ones = jax.tree.map(jnp.ones_like, small)
    back = embed(small, axes, subnet, variables)
    chex.assert_trees_all_equal(extract(back, axes, subnet), small)
    chex.assert_trees_all_equal(
        cover(axes, subnet, variables), embed(ones, axes, subnet, variables)
    )
    chex.assert_trees_all_equal(mask(variables, axes, subnet), back)


@each_layout
def test_embed_is_the_adjoint_of_extract(family):
    axes, variables = FAMILIES[family][0].axes, drawn(family)
    subnet = subnet_of(family, 7)
    small = extract(variables, axes, subnet)
    other = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), x.dtype), small)
    dot = lambda a, b: sum(
        np.vdot(np.float64(x), np.float64(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    lifted = embed(other, axes, subnet, variables)
    np.testing.assert_allclose(dot(small, other), dot(variables, lifted), rtol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "encoder"])
def test_depth_is_cut_by_naming_layers(family):
    (model, inputs), variables = FAMILIES[family], drawn(family)
    sub = extract(variables, model.axes, Subnet({"layer": np.array([1])}))
    assert num_layers(layers_of(sub)) == 1
    last = jax.tree.map(lambda x: x[1:], layers_of(variables))
    for mine, theirs in zip(layers_of(sub), last, strict=True):
        chex.assert_trees_all_equal(mine, theirs)
    turned = extract(variables, model.axes, Subnet({"layer": np.array([1, 0])}))
    assert not np.allclose(APPLY[family](turned, inputs)[0], APPLY[family](variables, inputs)[0])


@pytest.mark.parametrize("family", ["decoder", slow("gpt2")])
def test_layers_of_unequal_width_obey_the_same_laws(family):
    (model, inputs), variables = FAMILIES[family], drawn(family)
    sizes = axis_sizes(variables, model.axes)
    heads = [np.array([1, 0]), np.array([1])]
    keep = {"mlp": [np.array([5, 2]), np.arange(9)], "kv_heads": heads, "embed": np.arange(3, 11)}
    if "qk_dim" in sizes:  # cut anew in each head: lists of [kv_heads, kept]
        rows = np.stack([RNG.permutation(sizes["qk_dim"])[:2] for _ in range(sizes["kv_heads"])])
        keep["qk_dim"] = [rows, rows[:, :1]]
    subnet = Subnet(keep)
    small = extract(variables, model.axes, subnet)
    assert sorted(small.params["layers"]) == ["0", "1"]
    masked = mask(variables, model.axes, subnet)
    expected, _ = APPLY[family](masked, inputs)
    np.testing.assert_allclose(APPLY[family](small, inputs)[0], expected, **CLOSE)
    chex.assert_trees_all_equal(embed(small, model.axes, subnet, variables), masked)
    ones = jax.tree.map(jnp.ones_like, small)
    chex.assert_trees_all_equal(
        cover(model.axes, subnet, variables), embed(ones, model.axes, subnet, variables)
    )


def test_unequal_layers_may_be_reordered_and_cut_to_fewer():
    model, inputs = FAMILIES["decoder"]
    variables = drawn("decoder")
    ragged = [np.array([5, 2]), np.arange(9)]
    small = extract(variables, model.axes, Subnet({"mlp": ragged, "layer": np.array([1])}))
    plain = Subnet({"mlp": np.stack([ragged[1]] * 2), "layer": np.array([1])})
    expected = APPLY["decoder"](extract(variables, model.axes, plain), inputs)[0]
    np.testing.assert_allclose(APPLY["decoder"](small, inputs)[0], expected, **CLOSE)


def test_candidates_of_unequal_width_share_one_compilation():
    model, inputs = FAMILIES["gpt2"]
    variables = drawn("gpt2")
    sizes = axis_sizes(variables, model.axes)
    mlp, heads = sizes["mlp"], sizes["kv_heads"]
    counts = [(24, 4), (10, 2), (1, 1)]
    pad = lambda row, size, most: np.pad(row, (0, most - len(row)), constant_values=size)
    pick = lambda size, n: RNG.permutation(size)[:n]
    kept = [
        {"mlp": [pick(mlp, m) for _ in range(2)], "kv_heads": [pick(heads, h) for _ in range(2)]}
        for m, h in counts
    ]
    padded = {
        name: np.stack([[pad(row, size, size) for row in one[name]] for one in kept])
        for name, size in (("mlp", mlp), ("kv_heads", heads))
    }

    @jax.jit
    @chex.assert_max_traces(n=1)
    def score(keep):
        run = lambda keep: model.apply(mask(variables, model.axes, Subnet(keep)), inputs)[0]
        return jax.vmap(run)(keep)

    outputs = score(padded)
    score(jax.tree.map(lambda x: x[::-1].copy(), padded))  # other candidates, the same program
    for output, one in zip(outputs, kept, strict=True):
        expected, _ = APPLY["gpt2"](extract(variables, model.axes, Subnet(one)), inputs)
        np.testing.assert_allclose(output, expected, **CLOSE)


def flops(model, variables, inputs) -> float:
    """What the compiler counts. A scan's body is counted once, so layers are run in a loop."""
    if "layers" in variables.params:
        split = lambda variables: with_layers(variables, unstack(layers_of(variables)))
        variables = jax.eval_shape(split, variables)
    run = jax.jit(lambda variables: model.apply(variables, inputs)[0])
    return run.lower(variables).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("family", ["decoder", "encoder", "vit"])
def test_an_extracted_model_costs_what_one_of_that_size_costs(family):
    (model, inputs), variables = FAMILIES[family], drawn(family)
    sizes = axis_sizes(variables, model.axes)
    half = {"embed": 0.5, "mlp": 0.25, "kv_heads": 0.5, "layer": 0.5}
    small = extract(variables, model.axes, width(sizes, half))
    native = build(resized(model.config, axis_sizes(small, model.axes)))
    shapes = jax.eval_shape(native.init, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(small, shapes)
    count = flops(model, small, inputs)
    assert count == flops(native, shapes, inputs)
    assert count < 0.5 * flops(model, variables, inputs)


def test_an_extracted_cnn_costs_what_one_of_that_size_costs():
    (model, inputs), variables = FAMILIES["cnn"], drawn("cnn")
    half = dict.fromkeys(("conv1", "conv2", "dense"), 0.5)
    small = extract(variables, model.axes, width(axis_sizes(variables, model.axes), half))
    native = cnn(tiny_cnn(conv_channels=(2, 3), dense_dim=6).config)
    shapes = jax.eval_shape(native.init, jax.random.key(0))
    assert flops(model, small, inputs) == flops(native, shapes, inputs)


def test_a_width_is_a_window_that_wraps_around():
    keep = width({"mlp": 6, "embed": 5}, {"mlp": 3, "embed": 0.5}, offset=4).keep
    assert keep["mlp"].tolist() == [0, 4, 5]
    assert keep["embed"].tolist() == [0, 1, 4]


@pytest.mark.parametrize(
    "keep, message",
    [
        ({"heads": 2}, r"no axis 'heads'; it has \['mlp'\]"),
        ({"mlp": 0.0}, r"keep\['mlp'\]=0.0 leaves 0 of 6 indices"),
        ({"mlp": 7}, "leaves 7 of 6 indices; give a ratio in"),
    ],
)
def test_a_width_that_does_not_fit_is_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        width({"mlp": 6}, keep)


@pytest.mark.parametrize(
    "keep, message",
    [
        ({"mpl": [0]}, r"no axis 'mpl'; it has \['embed'"),
        ({"mlp": [0, 24]}, r"keep\['mlp'\] has indices from 0 to 24; the axis has size 24"),
        ({"mlp": [-1, 3]}, "indices from -1 to 3"),
        ({"mlp": [3, 1, 3]}, r"names an index twice: \[3, 1, 3\]"),
        ({"mlp": [[1, 2], [3, 3]]}, "names an index twice"),
        ({"rotary_dim": [0, 1]}, "'rotary_dim' cannot be cut: its pairs turn at frequencies"),
        ({"mlp": np.zeros((2, 0), int)}, "is empty; at least one index must stay"),
        ({"mlp": np.ones(24, bool)}, "must hold integer index arrays, got bool"),
        ({"mlp": np.zeros((3, 2), int) + np.arange(2)}, r"has leading shape \(3,\)"),
        ({"layer": [[0], [1]]}, r"has leading shape \(2,\)"),
        ({"kv_heads": np.zeros((2, 2, 1), int)}, r"has leading shape \(2, 2\)"),
    ],
)
def test_a_subnet_that_does_not_fit_is_refused(keep, message):
    model, _ = FAMILIES["decoder"]
    subnet = Subnet({name: np.array(index) for name, index in keep.items()})
    for cut in (extract, lambda *args: cover(args[1], args[2], args[0])):
        if cut is extract or "24;" not in message:  # cover takes one past the end as padding
            with pytest.raises(ValueError, match=message):
                cut(drawn("decoder"), model.axes, subnet)


@pytest.mark.parametrize("taps", [[0, 1, 2], [2, 3], [3, 2, 1], [0, 2, 4]])
def test_of_a_kernel_only_the_centre_is_a_kernel(taps):
    model, _ = FAMILIES["cnn"]
    assert kernel_sizes(drawn("cnn"), model.axes) == {"kernel_conv1": 5, "kernel_conv2": 5}
    assert not any(map(is_taps, axis_sizes(drawn("cnn"), model.axes)))  # no ratio cuts them
    with pytest.raises(ValueError, match=r"is not the centre|have no centre"):
        extract(drawn("cnn"), model.axes, Subnet({"kernel_conv1": np.array(taps)}))


def test_a_list_must_hold_one_array_a_layer():
    model, _ = FAMILIES["decoder"]
    with pytest.raises(ValueError, match="a list means one array per layer"):
        extract(drawn("decoder"), model.axes, Subnet({"mlp": [0, 1]}))
    with pytest.raises(ValueError, match=r"has leading shape \(3,\).*sizes \(2,\)"):
        extract(drawn("decoder"), model.axes, Subnet({"mlp": [np.arange(2)] * 3}))


def test_values_of_bfloat16_updates_come_back_in_their_own_dtype():
    model, _ = FAMILIES["decoder"]
    variables, subnet = drawn("decoder"), subnet_of("decoder", 3)
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), extract(variables, model.axes, subnet))
    back = embed(small, model.axes, subnet, variables)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(back)} == {"bfloat16"}
