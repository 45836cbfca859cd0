"""The laws of pruning: any function, exact budgets, what is saved runs again and trains on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import export
from random_networks import Shape, decoder
from safetensors.numpy import load_file

from jaxfm.model import layers_of, unstack, with_layers
from jaxfm.parallel import generate, model_drafter, plain, speculative
from jaxfm.search import (
    Budget,
    budgets,
    costs,
    halving,
    importance,
    load_pruned,
    masked,
    masks,
    model_network,
    network,
    nsga2,
    prune,
    pruned,
    ranks,
    repair,
    save_pruned,
    sliced,
    split_rows,
    task_problem,
    to_subnet,
    unit_activity,
)
from jaxfm.search.ranking import gradient
from jaxfm.search.strategies.loop import run
from jaxfm.search.strategies.random_search import random_search
from jaxfm.subnet import extract
from jaxfm.tasks import classification
from jaxfm.testing import random_variables, tiny_decoder, tiny_resnet

X = jax.random.normal(jax.random.key(0), (6, 5))
WIDE = {
    "up": jax.random.normal(jax.random.key(1), (5, 16)),
    "mid": jax.random.normal(jax.random.key(2), (16, 12)),
    "down": jax.random.normal(jax.random.key(3), (12, 3)),
}


def mlp(params, x):
    return jax.nn.tanh(jax.nn.relu(x @ params["up"]) @ params["mid"]) @ params["down"]


NET = network(mlp, WIDE, X)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        y = linen.LayerNorm()(linen.Dense(12)(x))
        y = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(y, y)
        return linen.Dense(3)(linen.gelu(y))


def test_a_users_nnx_model_in_five_lines():
    graph, params = nnx.split(Block(nnx.Rngs(0)))
    images = jax.random.normal(jax.random.key(4), (2, 6, 6, 3))
    small = prune(lambda p, x: nnx.merge(graph, p)(x), params, images, macs_ratio=0.5)
    assert jax.tree.leaves(small.params["conv"]["kernel"])[0].shape == (3, 3, 3, 4)
    assert small.apply(small.params, images).shape == (2, 4)
    dense, now = small.table()["macs"]
    assert 0.4 * dense < now <= 0.5 * dense


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.mid = nnx.Linear(8, 10, rngs=rngs)
        self.out = nnx.Linear(10, 4, rngs=rngs)

    def __call__(self, x):
        y = self.drop(nnx.relu(self.norm(self.first(x))))
        return self.out(nnx.tanh(self.mid(y)))


def test_random_keys_and_statistics_of_a_users_model(tmp_path):
    graph, params = nnx.split(Dropping(nnx.Rngs(0)))
    scale = jnp.array([5.0, 0.1, 4.0, 0.2, 3.0, 0.3, 2.0, 0.4])
    params["norm"]["scale"] = nnx.Param(scale)
    x = jax.random.normal(jax.random.key(4), (3, 6))
    run = lambda p, x: nnx.merge(graph, p)(x)
    small = prune(run, params, x, macs_ratio=0.5, importance="scale")
    # Means and variances of the norm are no parameters; of its group the largest scales stay, and
    # units that no norm follows are ranked by their weights.
    assert small.table()["parameters"][0] == 6 * 8 + 8 + 2 * 8 + 8 * 10 + 10 + 10 * 4 + 4
    first, mid = small.kept
    assert scale[first].min() >= scale[~first].max()
    scores = importance(small.network, params, "l2")
    assert np.asarray(scores[1])[mid].min() >= np.asarray(scores[1])[~mid].max()
    save_pruned(tmp_path, small)
    again = load_pruned(tmp_path, run, params, x)
    chex.assert_trees_all_equal(again.apply(again.params, x), small.apply(small.params, x))


def test_a_users_linen_model_with_attention():
    tokens = jax.random.normal(jax.random.key(4), (2, 5, 6))
    params = LinenBlock().init(jax.random.key(0), tokens)
    small = prune(LinenBlock().apply, params, tokens, budget={"parameters": 0.4})
    dense, now = small.table()["parameters"]
    assert now <= 0.4 * dense and now == sum(x.size for x in jax.tree.leaves(small.params))
    assert {name.split("/")[-2] for name in small.ratios()} >= {"Dense_0", "key", "value"}
    assert small.apply(small.params, tokens).shape == (2, 5, 3)


def test_all_budgets_hold_and_counts_are_multiples():
    latency = Budget("latency", lambda counts: counts.sum(), 16.0)
    small = prune(mlp, WIDE, X, budget=(latency,), macs_ratio=0.6, channel_multiple=4)
    counts = [int(mask.sum()) for mask in small.kept]
    assert sum(counts) <= 16 and all(k % 4 == 0 for k in counts)
    alone = prune(mlp, WIDE, X, budget=latency)
    assert sum(int(mask.sum()) for mask in alone.kept) <= 16
    assert small.table()["macs"][1] <= 0.6 * small.table()["macs"][0]


def test_what_matters_stays():
    params = jax.tree.map(jnp.array, WIDE)
    params["up"] = params["up"].at[:, 3].mul(100.0)
    for kind in ("l1", "l2", "activation"):
        small = prune(mlp, params, X, macs_ratio=0.2, importance=kind)
        group = next(i for i, g in enumerate(NET.groups) if g.name == "up:1")
        assert small.kept[group][3]
    slope = gradient(lambda p: mlp(p, X)[:, 0].sum(), params)
    scores = importance(NET, params, "taylor", gradient=slope)
    chex.assert_shape(scores[group], (16,))
    small = prune(mlp, params, X, macs_ratio=0.2, importance=scores)
    assert small.kept[group][np.argmax(np.asarray(scores[group]))]


def test_a_strategy_finds_what_uniform_pruning_misses():
    # The second half of "mid" is dead weight, so its group can go further than the other.
    params = WIDE | {"mid": WIDE["mid"].at[:, 4:].set(0.0)}
    target = mlp(params, X)
    score = lambda run, p: -jnp.square(run(p, X) - target).mean()
    search = lambda problem: nsga2(problem.sizes, batch=8)
    found = prune(mlp, params, X, macs_ratio=0.5, strategy=search, score=score, evaluations=160)
    alike = prune(mlp, params, X, macs_ratio=0.5)
    error = lambda small: float(jnp.square(small.apply(small.params, X) - target).mean())
    assert error(found) < 0.5 * error(alike)
    assert found.result.best_score == pytest.approx(-error(found), rel=1e-4)


def test_saved_loaded_exported_fine_tuned_and_pruned_again(tmp_path):
    small = prune(mlp, WIDE, X, macs_ratio=0.5)
    save_pruned(tmp_path, small)
    shapes = jax.eval_shape(lambda: WIDE)
    again = load_pruned(tmp_path, mlp, shapes, X)
    chex.assert_trees_all_equal(again.params, small.params)
    output = small.apply(small.params, X)
    chex.assert_trees_all_equal(again.apply(again.params, X), output)
    program = export.deserialize((tmp_path / "model.stablehlo").read_bytes())
    tensors = load_file(tmp_path / "params.safetensors")
    chex.assert_trees_all_close(program.call(tensors, X), output, rtol=1e-6)

    optimizer = optax.sgd(0.01)
    loss = lambda p: jnp.square(again.apply(p, X) - mlp(WIDE, X)).mean()
    state, params = optimizer.init(again.params), again.params
    for _ in range(5):
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
    assert loss(params) < loss(again.params)
    smaller = prune(again.apply, params, X, macs_ratio=0.5)
    assert smaller.apply(smaller.params, X).shape == (6, 3)
    assert smaller.table()["macs"][0] == small.table()["macs"][1]
    with pytest.raises(ValueError, match="another network"):
        load_pruned(tmp_path, again.apply, again.params, X)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_groups_of_one_axis_are_saved_apart(tmp_path, fused):
    case = decoder(Shape(2, 2, fused=fused), 0)
    small = prune(case.function, case.params, case.x, budget={"parameters": 0.6})
    names = [group.name for group in small.network.groups]
    assert len(set(names)) == len(names) == len(small.ratios())
    save_pruned(tmp_path, small)
    again = load_pruned(tmp_path, case.function, case.params, case.x)
    chex.assert_trees_all_equal(again.kept, small.kept)
    x = jnp.asarray(case.x)
    chex.assert_trees_all_equal(again.apply(again.params, x), small.apply(small.params, x))


def test_what_was_ignored_is_ignored_when_it_is_loaded(tmp_path):
    small = prune(mlp, WIDE, X, macs_ratio=0.6, ignore=["up"])
    assert small.params["up"].shape == (5, 16) and small.params["mid"].shape[1] < 12
    save_pruned(tmp_path, small)
    again = load_pruned(tmp_path, mlp, WIDE, X)
    chex.assert_trees_all_equal(again.apply(again.params, X), small.apply(small.params, X))
    with pytest.raises(ValueError, match="give it to `network`"):
        prune(NET, WIDE, X, macs_ratio=0.6, ignore=["up"])
    with pytest.raises(ValueError, match="give the Network that was cut"):
        load_pruned(tmp_path, NET, WIDE, X)


def test_a_parameter_that_is_used_twice_is_not_mended():
    tied = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["out"] @ p["w"].T
    params = {"w": WIDE["up"], "out": jax.random.normal(jax.random.key(6), (16, 16))}
    net = network(tied, params, X)
    some = masks(ranks(importance(net, params, "l2")), net.sizes // 2)
    mended = repair(net, params, some, X)
    chex.assert_trees_all_equal(mended["w"], params["w"])
    assert (mended["out"] != params["out"]).any()


def test_least_squares_makes_up_for_what_is_cut():
    x = jax.random.normal(jax.random.key(5), (64, 5)) @ jnp.diag(jnp.array([1, 1, 1e-3, 1e-3, 1]))
    order = ranks(importance(NET, WIDE, "l2"))
    some = masks(order, jnp.array([6 if g.name == "mid:1" else 8 for g in NET.groups]))
    error = lambda p: float(jnp.square(masked(NET)(p, some, x) - mlp(WIDE, x)).mean())
    mended = repair(NET, WIDE, some, x)
    assert error(mended) < 0.5 * error(WIDE)
    everything = tuple(jnp.ones(g.size, bool) for g in NET.groups)
    chex.assert_trees_all_close(repair(NET, WIDE, everything, x), WIDE, rtol=1e-5)


def test_stacked_layers_are_mended_one_by_one():
    layers = {
        "up": jax.random.normal(jax.random.key(7), (2, 5, 8)),
        "down": jax.random.normal(jax.random.key(8), (2, 8, 5)) / 8,
    }
    layer = lambda x, w: (x + jax.nn.relu(x @ w["up"]) @ w["down"], None)
    stack = lambda params, x: jax.lax.scan(layer, x, params)[0]
    net = network(stack, layers, X)
    (group,) = net.groups
    assert (group.size, group.layers) == (8, 2)
    some = (jnp.stack([jnp.arange(8) < 5, jnp.arange(8) >= 3]),)
    mended = repair(net, layers, some, X)
    error = lambda p: float(jnp.square(masked(net)(p, some, X) - stack(layers, X)).mean())
    assert error(mended) < 0.7 * error(layers)
    chex.assert_trees_all_close(
        repair(net, layers, (jnp.ones((2, 8), bool),), X), layers, rtol=1e-4
    )


IMAGES = {
    "image": jax.random.normal(jax.random.key(6), (20, 8, 8, 3)),
    "label": jnp.arange(20, dtype=jnp.int32) % 5,
}


def test_candidates_of_a_task_score_what_their_slices_do():
    model, task = tiny_resnet(), classification(5)
    variables = random_variables(model)
    net = model_network(model, variables, IMAGES["image"][:4])
    order = ranks(importance(net, variables, "l2"))
    limits = {"macs": 0.5}
    make = lambda **options: task_problem(
        net, variables, order, limits, task, IMAGES, calibration=IMAGES, metric="loss",
        batch_size=10, **options,
    )  # fmt: skip
    problem = make(width=2)
    result = run(problem, random_search(len(net.groups), batch=4), 8, jax.random.key(0))
    own, dense = costs(net), net.sizes.astype(np.int64)
    assert max(own.macs(k.astype(np.int64)) for k in result.counts) <= 0.5 * own.macs(dense)

    # The best one, cut: batch statistics by hand, and the loss on the same images.
    kept = tuple(np.asarray(m) for m in masks(order, jnp.asarray(result.best_counts)))
    small_train = sliced(net, kept, 1)
    train = jax.jit(lambda v, x: small_train(v, x)[1])
    small_apply = jax.jit(sliced(net, kept))

    def by_hand(variables) -> float:
        params = pruned(net, variables, kept).params
        stats = jax.tree.map(jnp.zeros_like, params.stats)
        for half in (IMAGES["image"][:10], IMAGES["image"][10:]):
            stats = train(params._replace(stats=stats), half)
        stats = jax.tree.map(lambda s: s / (1 - 0.9**2), stats)  # the share of the zeros
        outputs = small_apply(params._replace(stats=stats), IMAGES["image"])
        total, count = task.loss(outputs, IMAGES["label"], jnp.ones(20))
        return float(total / count)

    assert by_hand(variables) == pytest.approx(-result.best_score, rel=1e-3)
    mended = make(repaired=True)
    (score,) = jax.jit(mended.evaluate)(mended.data, jnp.asarray(result.best_counts)[None])
    own_masks = masks(order, jnp.asarray(result.best_counts))
    after = by_hand(jax.jit(lambda v: repair(net, v, own_masks, IMAGES["image"]))(variables))
    assert after == pytest.approx(-float(score), rel=1e-3) != by_hand(variables)
    with pytest.raises(ValueError, match="give examples"):
        task_problem(net, variables, order, limits, task, IMAGES, repaired=True)

    known = {k.tobytes(): s for k, s in zip(result.counts, result.scores)}
    again = lambda counts: jnp.array([known[np.asarray(k, np.int32).tobytes()] for k in counts])
    best, score = halving(result, [(again, 2), (again, 1)], top=3)
    assert score == pytest.approx(result.best_score)
    np.testing.assert_array_equal(best, result.best_counts)


def test_a_pruned_decoder_drafts_for_its_parent():
    model = tiny_decoder(num_layers=1)
    variables = random_variables(model)
    loose = with_layers(variables, unstack(layers_of(variables)))
    net = model_network(model, loose, jnp.ones((1, 6), jnp.int32))
    small = prune(net, loose, macs_ratio=0.6)
    draft = extract(variables, model.axes, to_subnet(net, model, loose, small.kept))
    prompts = [[1, 2, 3], [4, 5]]
    expected = generate(plain(model, variables), prompts, max_new_tokens=6)
    decoder = speculative(model, variables, model_drafter(model, draft), length=2)
    drafted = generate(decoder, prompts, max_new_tokens=6)
    np.testing.assert_array_equal(drafted.tokens, expected.tokens)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="macs_ratio"):
        prune(mlp, WIDE, X)
    with pytest.raises(ValueError, match="macs_ratio=50 must be a share"):
        prune(mlp, WIDE, X, macs_ratio=50)
    with pytest.raises(ValueError, match="no cost 'flops'"):
        prune(mlp, WIDE, X, budget={"flops": 0.5})
    with pytest.raises(ValueError, match="cannot be met"):
        prune(mlp, WIDE, X, macs_ratio=0.001)
    with pytest.raises(ValueError, match="together"):
        prune(mlp, WIDE, X, macs_ratio=0.5, score=lambda run, p: 0.0)
    with pytest.raises(ValueError, match="choose from"):
        prune(mlp, WIDE, X, macs_ratio=0.5, importance="weight")
    with pytest.raises(ValueError, match="taylor"):
        prune(mlp, WIDE, X, macs_ratio=0.5, importance="taylor")
    with pytest.raises(ValueError, match="leave none"):
        split_rows(10, 5, 5)


def test_rows_serve_one_purpose_each():
    parts = split_rows(20, 5, 8, seed=3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(20))
    assert [len(p) for p in parts] == [5, 8, 7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"macs_ratio": 0.5, "budget": {"macs": 0.3}}, "both limit"),
        ({"macs_ratio": 0.5, "ignore": ["up:7"]}, "'up:7' matches no parameter and no axis"),
        ({"macs_ratio": 0.5, "ignore": ["up:1#2"]}, "'up:1#2' matches no parameter and no axis"),
        ({"macs_ratio": 0.5, "ignore": "up"}, r"give a sequence of patterns, \['up'\]"),
        ({"macs_ratio": 0.5, "importance": "taylor"}, "gradient="),
        (
            {"macs_ratio": 0.5, "importance": (np.ones(3), np.ones(12))},
            r"shapes \[\(3,\), \(12,\)\]; give a tuple of shapes \[\(12,\), \(16,\)\]",
        ),
        ({"macs_ratio": 0.5, "importance": {"up:1": np.ones(16)}}, "are a dict"),
        (
            {"macs_ratio": 0.5, "strategy": lambda p: random_search(2), "score": lambda run, p: X},
            r"`score` returned shape \(6, 5\); it must return one number",
        ),
        (
            {"macs_ratio": 0.5, "strategy": random_search(2), "score": lambda run, p: 0.0},
            "a function of the problem",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        prune(mlp, WIDE, X, **settings)


@pytest.mark.parametrize("reader", [{"repaired": True}, {"importance": "activation"}])
def test_data_are_asked_for_where_they_are_read(reader):
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    with pytest.raises(ValueError, match="give data"):
        prune(mlp, WIDE, shape, macs_ratio=0.5, **reader)


def test_two_parameters_of_one_path_are_refused():
    params = {"a/b": WIDE["up"], "a": {"b": WIDE["mid"]}, "down": WIDE["down"]}
    own = lambda p, x: mlp({"up": p["a/b"], "mid": p["a"]["b"], "down": p["down"]}, x)
    with pytest.raises(ValueError, match="More than one parameter has the path 'a/b'"):
        prune(own, params, X, macs_ratio=0.5)


def test_numbers_of_numpy_are_shares_too():
    limit = lambda macs: budgets(NET, macs=macs)[0].limit
    assert limit(0.5) == limit(np.float32(0.5)) == limit(jnp.bfloat16(0.5)) > 1
    assert limit(1) == limit(np.int64(1)) == limit(jnp.int32(1)) == 1


def test_biases_of_stacked_layers_are_biases():
    keys = jax.random.split(jax.random.key(0), 4)
    layer = {
        "up": jax.random.normal(keys[0], (3, 4, 6)), "bias": jax.random.normal(keys[1], (3, 6)),
        "down": jax.random.normal(keys[2], (3, 6, 4)),
    }  # fmt: skip
    block = lambda x, p: x + jax.nn.relu(x @ p["up"] + p["bias"][None]) @ p["down"]
    x = jax.random.normal(keys[3], (2, 4))
    stacked = lambda p, x: jax.lax.scan(lambda x, p: (block(x, p), None), x, p)[0]

    def listed(p, x):
        for own in p:
            x = block(x, own)
        return x

    apart = [jax.tree.map(lambda leaf, i=i: leaf[i], layer) for i in range(3)]
    (together,) = importance(network(stacked, layer, x), layer, "l2")
    for row, one in zip(together, importance(network(listed, apart, x), apart, "l2"), strict=True):
        np.testing.assert_allclose(row, one, rtol=1e-5)


def test_biases_of_units_that_all_layers_share_are_biases_too():
    add = lambda h, bias: (h + bias[None], None)
    stream = lambda p, x: jax.lax.scan(add, x @ p["up"], p["bias"])[0] @ p["mid"]
    params = {"up": WIDE["up"][:, :6], "bias": jnp.ones((3, 6)), "mid": WIDE["mid"][:6]}
    net = network(stream, params, X)
    assert [(g.size, g.layers) for g in net.groups] == [(6, None)]
    louder = params | {"bias": params["bias"] * jnp.arange(6.0)[None]}
    for kind in ("l1", "l2"):
        chex.assert_trees_all_equal(importance(net, louder, kind), importance(net, params, kind))


@pytest.mark.parametrize(
    "mean_square",
    [
        lambda h: jnp.square(h).mean(-1),
        lambda h: jnp.einsum("nc,nc->n", h, h) / h.shape[-1],
        lambda h: jax.vmap(jnp.dot)(h, h) * (1 / h.shape[-1]),
    ],
    ids=["mean", "einsum", "dot"],
)
def test_a_slice_is_the_same_function_at_the_smaller_width(mean_square):
    def normed(params, x):
        h = x @ params["up"]
        return (h * jax.lax.rsqrt(mean_square(h) + 1e-6)[:, None]) @ params["mid"]

    params = {name: WIDE[name] for name in ("up", "mid")}
    small = prune(normed, params, X, macs_ratio=0.5)
    assert small.params["up"].shape[1] < 16
    np.testing.assert_allclose(
        small.apply(small.params, X), normed(small.params, X), rtol=1e-5, atol=1e-6
    )


def test_importance_may_be_a_function_of_the_weights_of_units():
    by_hand = lambda w: jnp.sqrt(jnp.square(w).sum(tuple(range(1, w.ndim))))
    for own, expected in zip(importance(NET, WIDE, by_hand), importance(NET, WIDE, "l2")):
        np.testing.assert_allclose(own, expected, rtol=1e-5)
    stacked = {"up": jnp.stack([WIDE["up"], 2 * WIDE["up"]]), "down": jnp.ones((2, 16, 5))}
    layer = lambda x, w: (x + jax.nn.relu(x @ w["up"]) @ w["down"], None)
    net = network(lambda p, x: jax.lax.scan(layer, x, p)[0], stacked, X)
    for own, expected in zip(importance(net, stacked, by_hand), importance(net, stacked, "l2")):
        np.testing.assert_allclose(own, expected, rtol=1e-5)
    small = prune(mlp, WIDE, X, macs_ratio=0.5, importance=by_hand)
    chex.assert_trees_all_equal(small.kept, prune(mlp, WIDE, X, macs_ratio=0.5).kept)


def test_the_activity_of_units_is_their_mean_absolute_value_relative_to_their_layer():
    hidden = jax.nn.relu(X @ WIDE["up"])
    expected = {"up:1": jnp.abs(hidden).mean(0)}
    expected["mid:1"] = jnp.abs(jax.nn.tanh(hidden @ WIDE["mid"])).mean(0)
    activity = jax.jit(lambda p, x: unit_activity(NET, p, x))(WIDE, X)
    for group, found in zip(NET.groups, activity, strict=True):
        values = expected[group.name]
        np.testing.assert_allclose(found, values / values.mean(), rtol=1e-5)
    by_row = jax.vmap(lambda row: unit_activity(NET, WIDE, row[None]))(X)
    assert [rows.shape for rows in by_row] == [(6, group.size) for group in NET.groups]


@pytest.mark.parametrize("kind", ["l2", "activation"])
def test_what_is_not_finite_cannot_be_ranked_and_is_named(kind):
    params = WIDE | {"mid": WIDE["mid"].at[3, 4].set(jnp.nan)}
    named = r"cannot be ranked: the parameter 'mid' holds numbers that are not finite"
    with pytest.raises(ValueError, match=named):
        prune(mlp, params, X, macs_ratio=0.5, importance=kind)
    with pytest.raises(ValueError, match=named):
        importance(NET, params, kind, inputs=(X,))
    with pytest.raises(ValueError, match=r"the gradient of the parameter 'mid' holds numbers"):
        importance(NET, WIDE, "taylor", gradient=params)
    scores = [np.ones(size) for size in NET.sizes]
    scores[1][0] = np.inf
    with pytest.raises(
        ValueError, match=f"The units of {NET.groups[1].name!r} cannot be ranked: their"
    ):
        prune(mlp, WIDE, X, macs_ratio=0.5, importance=tuple(scores))
