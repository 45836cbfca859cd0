"""The laws of reading: what a graph holds, and which channels must be cut together."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from random_networks import (
    EVERY_BLOCK,
    Shape,
    conv,
    convolutional,
    decoder,
    group_norm,
    half_split,
    keep_some,
    squared_relu,
)

from jaxfm import extract
from jaxfm.model import layers_of, unstack, with_layers
from jaxfm.search import cut, model_network, network, to_subnet
from jaxfm.search.trace.graph import Constant, flatten
from jaxfm.search.trace.labels import Labels, merge, plain
from jaxfm.search.trace.models import axis_names
from jaxfm.search.trace.shape_rules import segments
from jaxfm.subnet import is_taps
from jaxfm.testing import random_variables, tiny_cnn, tiny_decoder, tiny_resnet, tiny_vit

shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)


def groups_of(function, params, *inputs, **options):
    """Size and members of every group."""
    net = network(function, params, *inputs, **options)
    return {(g.size, frozenset(f"{m.path}:{m.axis}" for m in g.members)) for g in net.groups}


# Programs


def test_calls_are_inlined_and_what_nobody_needs_is_dropped():
    inner = jax.jit(jax.checkpoint(lambda x: squared_relu(jnp.sin(x))))

    def function(x):
        jnp.cos(x)  # needed by no output
        return inner(x) * jnp.sqrt(jnp.float32(4.0))

    graph, values = flatten(function, shape(3))
    assert [op.name for op in graph.ops] == ["sin", "max", "square", "mul"]
    (scale,) = [a.value for a in graph.ops[-1].inputs if isinstance(a, Constant)]
    assert scale == 2.0
    assert values.shapes[graph.outputs[0]] == (3,)


def test_a_loop_keeps_its_body():
    layer = lambda x, w: (jnp.tanh(x @ w), jax.jit(jnp.sum)(x))
    graph, values = flatten(lambda x, w: lax.scan(layer, x, w), shape(2, 4), shape(3, 4, 4))
    (loop,) = graph.ops
    assert [op.name for op in loop.body.ops if op.name != "reduce_sum"] == ["dot_general", "tanh"]
    assert values.shapes[loop.body.inputs[1]] == (4, 4)


def test_a_channel_shuffle_is_one_permutation():
    swap = lambda x: x.swapaxes(1, 2).reshape(2, 15)
    function = lambda x: swap(x.reshape(2, 3, 5))
    graph, _ = flatten(function, shape(2, 15))
    (op,) = graph.ops
    x = np.arange(30.0).reshape(2, 15)
    np.testing.assert_array_equal(x.take(op.params["index"], op.params["axis"]), function(x))
    # A value in between that is used elsewhere must stay.
    graph, _ = flatten(lambda x: (between := x.reshape(2, 3, 5), swap(between)), shape(2, 15))
    assert [op.name for op in graph.ops] == ["reshape", "transpose", "reshape"]


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_known_entries_of_an_axis_are_picked(mode):
    index = np.array([2, -1, 0, 2]) if mode == "fill" else np.array([2, 4, 0, 2])
    function = lambda x: jnp.take(x, index, axis=1, mode=mode)
    (op,) = flatten(function, shape(3, 5, 4))[0].ops
    np.testing.assert_array_equal(op.params["index"], index % 5)
    assert (op.name, op.params["axis"]) == ("permute", 1)
    (op,) = flatten(lambda x: x[..., index], shape(3, 4, 5))[0].ops
    assert (op.name, op.params["axis"]) == ("permute", 2)
    several = lambda x: x[jnp.array([0, 1]), :, jnp.array([2, 3])]
    assert flatten(several, shape(3, 5, 4))[0].ops[-1].name == "gather"
    outside = lambda x: jnp.take(x, jnp.array([7]), axis=1, mode="fill")
    assert flatten(outside, shape(3, 5, 4))[0].ops[-1].name == "gather"


def test_keys_and_values_of_an_outer_trace_are_not_folded():
    raw, keys = np.array([1, 2], np.uint32), jax.random.split(jax.random.key(0), 2)
    for key in (lambda: jax.random.key(0), lambda: jax.random.wrap_key_data(raw), lambda: keys[0]):
        noisy = lambda x, key=key: x + jax.random.normal(key(), (3,))
        assert flatten(noisy, shape(3))[0].ops[-1].name == "add"

    @jax.jit
    def outer(index, x):
        picks = lambda x: jnp.take(x, index + 1, axis=0, mode="clip")
        assert flatten(picks, x)[0].ops[-1].name == "gather"
        return x

    outer(jnp.array([0, 1]), jnp.zeros(3))


def test_axes_of_a_reshape_pair_up_as_finely_as_they_can():
    assert segments((4, 6), (4, 6)) == [([0], [0]), ([1], [1])]
    assert segments((2, 3, 4), (6, 4)) == [([0, 1], [0]), ([2], [1])]
    assert segments((6, 1, 4), (2, 3, 4)) == [([0], [0, 1]), ([2], [2]), ([1], [])]
    assert segments((4, 6), (8, 3)) == [([0, 1], [0, 1])]


# Labels


def test_axes_that_meet_are_one_and_a_frozen_one_says_why():
    labels = Labels()
    a, b, c = (labels.fresh(4) for _ in range(3))
    labels.unify(a, b, "a meets b")
    np.testing.assert_array_equal(labels.resolve(a), labels.resolve(b))
    labels.freeze(b[1:2], "b is an output")
    assert labels.resolve(a).reshape(-1).astype(bool).tolist() == [True, False, True, True]
    assert labels.reason(a) == "b is an output"
    assert labels.reason(c) is None
    labels.unify(a, plain(4), "met a plain one")
    assert not labels.resolve(a).size


def test_a_split_axis_is_the_merge_of_its_parts():
    labels = Labels()
    whole = labels.fresh(12)
    heads, dims = labels.split(whole, [3, 4], "mixed")
    np.testing.assert_array_equal(labels.resolve(whole), labels.resolve(merge([heads, dims])))
    again = labels.split(merge([heads, dims]), [3, 4], "mixed")
    for part, other in zip((heads, dims), again):
        np.testing.assert_array_equal(labels.resolve(part), labels.resolve(other))
    labels.split(whole, [2, 6], "a reshape mixes it")
    assert labels.reason(whole) == "a reshape mixes it"


@given(st.data())
def test_ids_are_joined_until_blocks_stay_equal(data):
    blocks, size = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 6))
    labels = Labels()
    places = st.lists(st.integers(0, 7), min_size=blocks * size, max_size=blocks * size)
    axis = labels.fresh(8)[np.array(data.draw(places))]
    while labels.balance(axis, blocks, "uneven"):
        pass
    found = labels.resolve(axis)
    assert found.shape[1]  # nothing that could stay was frozen
    for i in np.unique(found):
        assert len({np.count_nonzero(part == i) for part in np.split(found, blocks)}) == 1


def test_what_evens_out_a_frozen_channel_is_frozen():
    labels = Labels()
    axis = labels.fresh(6)
    labels.freeze(axis[:1], "an output")
    labels.balance(axis, 2, "uneven")
    assert not labels.resolve(axis).size and labels.reason(axis[5:]) == "uneven"


# Groups


def test_a_residual_stream_is_one_group():
    params = {"in": shape(3, 8), "up": shape(8, 5), "down": shape(5, 8), "out": shape(8, 2)}

    def function(p, x):
        y = x @ p["in"]
        return (y + jax.nn.relu(y @ p["up"]) @ p["down"]) @ p["out"]

    assert groups_of(function, params, shape(4, 3)) == {
        (8, frozenset({"in:1", "up:0", "down:1", "out:0"})),
        (5, frozenset({"up:1", "down:0"})),
    }


def test_concatenated_axes_keep_groups_of_their_own():
    params = {"a": shape(3, 4), "b": shape(3, 6), "out": shape(10, 2)}
    join = lambda p, x: jnp.concatenate([x @ p["a"], x @ p["b"]], -1) @ p["out"]
    assert groups_of(join, params, shape(4, 3)) == {
        (4, frozenset({"a:1", "out:0"})),
        (6, frozenset({"b:1", "out:0"})),
    }
    # Split elsewhere, index i of a meets i + 1 of b, which leaves the first and last of b alone.
    joined = lambda p, x: jnp.concatenate([x @ p["a"], x @ p["b"]], -1)
    product = lambda p, x: jnp.multiply(*jnp.split(joined(p, x), 2, -1)) @ p["half"]
    params = {"a": shape(3, 4), "b": shape(3, 6), "half": shape(5, 2)}
    assert groups_of(product, params, shape(4, 3)) == {(4, frozenset({"a:1", "b:1", "half:0"}))}


def test_a_flattened_image_is_cut_by_channels():
    params = {"conv": shape(3, 3, 3, 6), "out": shape(6 * 16, 2)}
    flat = lambda p, x: conv(x, p["conv"]).reshape(2, -1) @ p["out"]
    net = network(flat, params, shape(2, 4, 4, 3))
    (group,) = net.groups
    assert (group.name, group.size) == ("conv:3", 6)
    leaf = {leaf.path: leaf for leaf in net.leaves}["out"]
    np.testing.assert_array_equal(leaf.axes[0][:, 0], np.tile(np.arange(1, 7), 16))


def test_convolutions_cut_what_belongs_together():
    depthwise = lambda p, x: conv(conv(conv(x, p["a"]), p["d"], groups=4), p["b"])
    params = {"a": shape(1, 1, 3, 4), "d": shape(3, 3, 1, 8), "b": shape(1, 1, 8, 2)}
    assert groups_of(depthwise, params, shape(2, 4, 4, 3)) == {
        (4, frozenset({"a:3", "d:3", "b:2"}))
    }
    grouped = lambda p, x: conv(conv(conv(x, p["a"]), p["g"], groups=2), p["b"])
    params = {"a": shape(1, 1, 3, 8), "g": shape(3, 3, 4, 6), "b": shape(1, 1, 6, 2)}
    assert groups_of(grouped, params, shape(2, 4, 4, 3)) == {
        (4, frozenset({"a:3", "g:2"})),
        (3, frozenset({"g:3", "b:2"})),
    }


def test_a_shuffle_between_grouped_convolutions_leaves_channels_to_choose():
    def unit(p, x):
        x = conv(x, p["a"], groups=3)
        x = x.reshape(*x.shape[:-1], 3, -1).swapaxes(-1, -2).reshape(x.shape)
        return conv(conv(x, p["b"], groups=3), p["c"])

    params = {"a": shape(1, 1, 2, 60), "b": shape(1, 1, 20, 6), "c": shape(1, 1, 6, 2)}
    found = groups_of(unit, params, shape(2, 4, 4, 6))
    # 20 channels a group: those with one place in b come from three different groups of a.
    assert (20, frozenset({"a:3", "b:2"})) in found and (2, frozenset({"b:3", "c:2"})) in found
    params = {"a": shape(1, 1, 2, 18), "b": shape(1, 1, 6, 6), "c": shape(1, 1, 6, 2)}
    # 6 a group: they come from one, so three of them stay or go together.
    assert (2, frozenset({"a:3", "b:2"})) in groups_of(unit, params, shape(2, 4, 4, 6))


def test_heads_are_shared_by_their_queries():
    case = decoder(Shape(kv_heads=2, q_per_kv=3, fused=False), 0)
    net = network(case.function, case.params, case.x)
    members = lambda g: {f"{m.path.removeprefix('layers/')}:{m.axis}" for m in g.members}
    found = sorted((g.size, g.layers, sorted(members(g))) for g in net.groups)
    assert found == [
        (2, 2, ["k:2", "o:1", "q:2", "v:2"]),  # heads of keys and values with their queries
        (3, 2, ["o:1", "q:2"]),  # queries of each
        (4, 2, ["k:2", "q:2"]),  # dimensions of the products
        (4, 2, ["o:1", "v:2"]),  # dimensions of the values
        (6, None, ["down:2", "embed:1", "gate:1", "head:0", "k:1", "norm:1", "o:2", "q:1",
                   "up:1", "v:1"]),
        (10, 2, ["down:1", "gate:2", "up:2"]),
    ]  # fmt: skip


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_fused_projection_has_the_groups_of_separate_ones(gated, tied):
    sizes = []
    for fused in (True, False):
        for scanned in (True, False):
            case = decoder(Shape(2, 2, fused, gated, scanned, remat=fused, tied=tied), 0)
            net = network(case.function, case.params, case.x)
            assert {g.layers for g in net.groups} == ({None, 2} if scanned else {None})
            sizes.append(sorted(g.size for g in net.groups))
    assert all(found == sizes[0] for found in sizes) and len(sizes[0]) == 6


@pytest.mark.parametrize("blocks", [(group_norm, half_split), (half_split, group_norm)])
def test_parts_of_groups_that_stay_are_read_alike_again(blocks):
    # One half of a merged axis is always there: its units move to another column of the axis.
    case = convolutional(blocks, True, 0)
    net = network(case.function, case.params, case.x)
    assert len(net.groups) == 2
    assert net.plan(0, case.x).axes


@pytest.mark.parametrize("blocks", EVERY_BLOCK)
def test_units_are_numbered_once_and_occur_where_members_say(blocks):
    case = convolutional(blocks, False, 0)
    net = network(case.function, case.params, case.x)
    assert [g.first for g in net.groups] == [1, *(1 + np.cumsum(net.sizes))[:-1]]
    for group in net.groups:
        units = np.arange(group.first, group.first + group.size)
        places = {
            (i, d) for i, leaf in enumerate(net.leaves) for d, axis in enumerate(leaf.axes)
            if np.isin(axis, units).any()
        }  # fmt: skip
        assert places == {(m.leaf, m.axis) for m in group.members}
        assert group.name in {f"{m.path}:{m.axis}" for m in group.members}
    for leaf in net.leaves:
        for d, axis in enumerate(leaf.axes):
            assert len(axis) == leaf.shape[d]
            fixed = len(axis) > 1 and not axis.shape[1]
            assert (f"{leaf.path}:{d}" in net.frozen) == fixed


def test_shapes_are_enough_and_further_inputs_give_the_same_groups():
    case = convolutional(EVERY_BLOCK[1], False, 0)
    shapes = jax.tree.map(lambda x: shape(*x.shape), case.params)
    plans = [network(case.function, case.params, case.x), network(case.function, shapes, case.x)]
    assert plans[0].groups == plans[1].groups
    assert plans[0].plan(0, case.x) is plans[0].plan(0, case.x)
    wider = plans[0].plan(0, np.zeros((5, 6, 6, 3), np.float32))
    assert wider.axes.keys() == plans[0].plan(0, case.x).axes.keys()


# What cannot be cut


CHAIN = {"a": shape(3, 8), "b": shape(8, 8), "c": shape(8, 2)}


def chain(between):
    return lambda p, x: between(x @ p["a"]) @ p["b"] @ p["c"]


def test_an_unknown_primitive_freezes_what_it_touches_and_is_reported():
    spectrum = chain(lambda x: jnp.fft.fft(x).real)
    net = network(spectrum, CHAIN, shape(4, 3))
    assert net.unknown == {"fft": 1}
    assert net.frozen["a:1"] == "'fft' has no rule"
    assert net.frozen["b:0"] == "it meets an axis that cannot be cut in 'dot_general'"
    assert [g.name for g in net.groups] == ["b:1"]


def test_to_prune_what_is_frozen_names_the_axis_and_the_reason():
    with pytest.raises(ValueError, match=r"No axis.*w:1: 'fft' has no rule"):
        network(lambda p, x: jnp.fft.fft(x @ p["w"]).real.mean(-1), {"w": shape(3, 8)}, shape(4, 3))
    with pytest.raises(ValueError, match=r"c:1: it is an output of the model"):
        network(lambda p, x: x @ p["c"], {"c": shape(3, 2)}, shape(4, 3))
    model = tiny_resnet()
    variables = random_variables(model)
    net = model_network(model, variables, shape(2, 8, 8, 3))
    with pytest.raises(ValueError, match=r"params/[a-z0-9/]+:\d is cut but has no logical axis"):
        to_subnet(net, model, variables, keep_some(net, 0))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda x: x / x.prod(-1, keepdims=True), "'reduce_prod' reduces over all of it"),
        (lambda x: x * x.argmax(-1)[:, None].astype(x.dtype), "'argmax' reduces over all of it"),
        (lambda x: x / x.max(-1, keepdims=True), None),
        (lambda x: jnp.sort(x, -1), "it is sorted"),
        (lambda x: jnp.cumsum(x, -1), "'cumsum' runs along it"),
        (lambda x: lax.top_k(x, 8)[0], "top_k selects along it"),
        (lambda x: x + jnp.ones((4, 1)), None),
        (lambda x: x * jnp.arange(8.0)[None], None),
    ],
)
def test_order_and_extremes_freeze_an_axis(between, reason):
    net = network(chain(between), CHAIN, shape(4, 3))
    assert net.frozen.get("a:1") == reason
    assert ("a:1" in {g.name for g in net.groups}) == (reason is None)


def test_what_is_ignored_stays_and_what_is_tied_goes_together():
    both = {"a:1", "b:1"}
    assert {g.name for g in network(chain(jnp.tanh), CHAIN, shape(4, 3)).groups} == both
    net = network(chain(jnp.tanh), CHAIN, shape(4, 3), ignore=["a"])
    assert [g.name for g in net.groups] == ["b:1"]
    assert net.frozen["a:1"] == "it is ignored, as requested"
    net = network(chain(jnp.tanh), CHAIN, shape(4, 3), ignore=["b:1"])
    assert [g.name for g in net.groups] == ["a:1"]
    (group,) = network(chain(jnp.tanh), CHAIN, shape(4, 3), ties=[("a:1", "b:1")]).groups
    assert {f"{m.path}:{m.axis}" for m in group.members} == {"a:1", "b:0", "b:1", "c:0"}
    with pytest.raises(ValueError, match=r"'layer' matches no parameter"):
        network(chain(jnp.tanh), CHAIN, shape(4, 3), ignore=["layer"])
    with pytest.raises(ValueError, match=r"give 'path:axis'"):
        network(chain(jnp.tanh), CHAIN, shape(4, 3), ties=[("a", "b:1")])


def test_further_functions_join_what_they_join():
    params = {"a": shape(3, 8), "b": shape(3, 8), "c": shape(8, 2)}
    apart = lambda p, x: (x @ p["a"] @ p["c"], x @ p["b"] @ p["c"])
    alone = lambda p, x: x @ p["a"] @ p["c"]
    assert groups_of(alone, params, shape(4, 3)) == {
        (8, frozenset({"a:1", "c:0"})),
        *((n, frozenset({f"b:{d}"})) for d, n in enumerate((3, 8))),  # b is not used at all
    }
    (group,) = network(alone, params, shape(4, 3), also=(apart,)).groups
    assert {f"{m.path}:{m.axis}" for m in group.members} == {"a:1", "b:1", "c:0"}


# Our own models


TOKENS, IMAGE = jax.ShapeDtypeStruct((2, 5), jnp.int32), shape(2, 8, 8, 3)
MODELS = {
    "cnn": (tiny_cnn(), shape(2, 8, 8, 1)),
    "resnet": (tiny_resnet(), IMAGE),
    "vit": (tiny_vit(), IMAGE),
    "decoder": (tiny_decoder(), TOKENS),
}
LOOSE = [(name, False) for name in MODELS] + [("vit", True), ("decoder", True)]


@pytest.mark.parametrize(("name", "loose"), LOOSE)
def test_groups_of_our_models_are_their_logical_axes(name, loose):
    model, x = MODELS[name]
    variables = random_variables(model)
    if loose:
        variables = with_layers(variables, unstack(layers_of(variables)))
    net = model_network(model, variables, x)
    names = axis_names(model, variables)
    units: dict = {}
    for leaf in net.leaves:
        place = leaf.path.split("/layers/")[-1].split("/")[0] if loose else ""
        for axis, logical in zip(leaf.axes, names[leaf.path], strict=True):
            if axis.shape[1] and logical is not None:
                where = "" if logical == "embed" else place
                units.setdefault((logical, where), set()).add(axis.tobytes())
    assert not net.unknown
    assert all(len(found) == 1 for found in units.values())  # one name, one set of units
    distinct = {found for sets in units.values() for found in sets}
    assert len(distinct) == len(units)  # and no two names share them
    free = {"layer", "class", "channel", "position", "vocab", "rotary_dim", None}
    cuttable = {
        logical
        for leaf in net.leaves
        for n, logical in zip(leaf.shape, names[leaf.path])
        if n > 1 and not is_taps(logical)  # places, and no units
    } - free
    assert {logical for logical, _ in units} == cuttable


@pytest.mark.parametrize(("name", "loose"), [("cnn", False), ("vit", False), ("decoder", True)])
def test_a_subnet_of_kept_units_extracts_what_cut_cuts(name, loose):
    model, x = MODELS[name]
    stacked = variables = random_variables(model)
    if loose:
        variables = with_layers(variables, unstack(layers_of(variables)))
    net = model_network(model, variables, x)
    kept = keep_some(net, 3)
    subnet = to_subnet(net, model, variables, kept)
    both = jax.jit(
        lambda v, loose: (extract(v, model.axes, subnet), cut(net, loose, kept)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    extracted, small = both(stacked, variables)
    chex.assert_trees_all_equal(extracted, small)
