"""Laws of supernets: order changes nothing, members are slices, budgets hold, training learns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm import count_parameters
from jaxfm.cost import count_flops
from jaxfm.search.elastic.evolve import evolve, fit_predictor, rank_correlation
from jaxfm.search.elastic.member_cost import member_macs
from jaxfm.search.elastic.supernet import supernet
from jaxfm.search.elastic.training import sandwich
from jaxfm.search.recalibration import recalibrate
from jaxfm.search.strategies.project import Budget
from jaxfm.tasks import classification
from jaxfm.testing import (
    random_variables,
    tiny_cnn,
    tiny_decoder,
    tiny_mobilenet,
    tiny_resnet,
)

RNG = np.random.default_rng(0)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = RNG.integers(0, 64, (2, 7)).astype(np.int32)
IMAGES = RNG.normal(size=(8, 8, 8, 3)).astype(np.float32)
RESNET, DECODER, MOBILENET = tiny_resnet(), tiny_decoder(), tiny_mobilenet()
FAMILIES = {
    "resnet": (RESNET, ("stage1_0", "stage1_1", "stage2_0"), 2, IMAGES),
    "decoder": (DECODER, ("embed", "mlp", "kv_heads", "layer"), {"mlp": 8, "embed": 4}, TOKENS),
    "mobilenet": (MOBILENET, ("stage2_0", "last"), 2, IMAGES),
}
KERNELS = {"mobilenet": (3, 1)}  # depthwise ones, of which one has stride 2
DRAWN = {name: random_variables(model) for name, (model, *_) in FAMILIES.items()}
NETS = {
    name: supernet(
        model, DRAWN[name], axes, channel_multiple=multiple, kernels=KERNELS.get(name, ())
    )
    for name, (model, axes, multiple, _) in FAMILIES.items()
}
APPLY = {name: jax.jit(model.apply) for name, (model, *_) in FAMILIES.items()}
MASKED = {
    name: jax.jit(
        lambda v, counts, x, name=name: FAMILIES[name][0].apply(NETS[name].mask(v, counts), x)[0]
    )
    for name in FAMILIES
}
each = pytest.mark.parametrize("name", FAMILIES)
slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
# Depthwise layers are cut as those of the ResNet are: the slow side has them, too.
few = pytest.mark.parametrize("name", [slow(n) if n == "mobilenet" else n for n in FAMILIES])


def test_channels_of_group_norms_keep_their_places():
    model = tiny_resnet(norm="group")
    with pytest.raises(ValueError, match="group norm divides channels by place"):
        supernet(model, model.init(jax.random.key(0)), ("stage1_0",))


@each
def test_order_changes_no_output_and_is_one_of_importance(name):
    inputs, net = FAMILIES[name][3], NETS[name]
    before, after = (APPLY[name](v, inputs)[0] for v in (DRAWN[name], net.variables))
    np.testing.assert_allclose(after, before, **CLOSE)
    leaves = zip(jax.tree.leaves(net.variables), jax.tree.leaves(DRAWN[name]), strict=True)
    assert not all(np.array_equal(a, b) for a, b in leaves)


@few
def test_masked_members_compute_what_extracted_ones_do(name):
    inputs, net = FAMILIES[name][3], NETS[name]
    for counts in (*np.asarray(net.sample(jax.random.key(0), 1)), net.smallest):
        small = net.extract(net.variables, counts)
        masked = MASKED[name](net.variables, counts, inputs)
        np.testing.assert_allclose(APPLY[name](small, inputs)[0], masked, **CLOSE)
        assert float(net.parameters(jnp.asarray(counts, jnp.float32))) == count_parameters(
            small.params
        )
    assert MASKED[name]._cache_size() == 1


@few
def test_every_member_meets_its_budget_and_none_is_empty(name):
    net = NETS[name]
    whole, least = (
        float(net.parameters(jnp.asarray(c, jnp.float32))) for c in (net.largest, net.smallest)
    )
    limits = [least, 0.5 * (whole + least), whole]
    members = net.members([Budget("parameters", net.parameters, limit) for limit in limits])
    for counts, limit in zip(members, limits, strict=True):
        assert net.parameters(jnp.asarray(counts, jnp.float32)) <= limit * (1 + 1e-6)
        assert (counts >= net.smallest).all()
    # Not the counts: those of layers that are left out cost nothing, whatever they are.
    assert net.parameters(jnp.asarray(members[0], jnp.float32)) == least
    np.testing.assert_array_equal(members[2], net.largest)
    with pytest.raises(ValueError, match="cannot be met"):
        net.members([Budget("parameters", net.parameters, 0.9 * least)])


def test_sandwich_training_brings_small_members_to_the_largest():
    net, optimizer = NETS["resnet"], optax.adam(1e-2)
    step = sandwich(net, RESNET, classification(5), optimizer, num_random=1)
    batch = {"image": IMAGES, "label": np.arange(8, dtype=np.int32) % 5}
    variables, state = net.variables, optimizer.init(net.variables.params)
    task = classification(5)

    @jax.jit
    def error(variables, counts):
        logits, _ = RESNET.apply(net.mask(variables, counts), IMAGES, train=True)
        return jnp.divide(*task.loss(logits, batch["label"], jnp.ones(8)))

    before = [error(variables, counts) for counts in (net.largest, net.smallest)]
    for key in jax.random.split(jax.random.key(0), 60):
        variables, state, losses = step(variables, state, batch, key)
    assert step._cache_size() == 1
    after = [error(variables, counts) for counts in (net.largest, net.smallest)]
    assert losses.shape == (3,)
    assert after[0] < 0.3 * before[0]
    assert after[1] < 0.3 * before[1]


def test_statistics_measured_anew_are_those_of_the_batches():
    net = NETS["resnet"]
    run = lambda v, x: RESNET.apply(v, x, train=True)[1]
    measured = recalibrate(run, net.variables, jnp.asarray(IMAGES)[None])
    train, _ = RESNET.apply(net.variables, IMAGES, train=True)
    evaluated, _ = APPLY["resnet"](measured, IMAGES)
    mean = measured.stats["stem"]["norm"]["mean"]
    from_zero = jax.tree.map(jnp.zeros_like, net.variables.stats)
    _, moved = RESNET.apply(net.variables._replace(stats=from_zero), IMAGES, train=True)
    np.testing.assert_allclose(mean, moved["stem"]["norm"]["mean"] / 0.1, rtol=1e-4, atol=1e-5)
    # The running variance divides by n - 1: a hundredth of the output at 8 pixels a channel.
    np.testing.assert_allclose(evaluated, train, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", [slow("mobilenet"), "decoder"])
def test_multiply_adds_of_members_are_those_counted_of_extracted_ones(name):
    model, axes, multiple, inputs = FAMILIES[name]
    # Heads and MLPs of layers may differ; how many layers run is not known to the function.
    axes = [axis for axis in axes if axis != "layer"]
    options = {"channel_multiple": multiple, "kernels": KERNELS.get(name, ())}
    net = supernet(model, DRAWN[name], axes, **options)
    macs = member_macs(net, model, inputs)
    for counts in (net.largest, net.smallest, *np.asarray(net.sample(jax.random.key(0), 3))):
        small = net.extract(net.variables, counts)
        counted = count_flops(model.apply, small, inputs) / 2 / len(inputs)
        assert macs(counts) == counted
        assert float(jax.jit(macs)(counts)) == counted


def test_multiply_adds_of_another_depth_are_refused():
    with pytest.raises(ValueError, match=r"axis='layer'.* cannot be read from the function"):
        member_macs(NETS["decoder"], DECODER, TOKENS)


def test_the_smallest_member_has_the_smallest_kernels_and_all_sizes_are_drawn():
    cnn = tiny_cnn()
    variables = random_variables(cnn)
    for kernels, sizes in [
        ((5, 3), (3, 5)),
        ((1, 5), (1, 5)),
        ({"kernel_conv2": (5, 3, 1)}, (1, 3, 5)),
    ]:
        for smallest in (0.25, 0.7):  # a share of channels: kernels are what they are given
            net = supernet(cnn, variables, (), kernels=kernels, smallest=smallest)
            assert all(group.kernels == sizes for group in net.groups)
            assert net.smallest.tolist() == [sizes[0]] * len(net.groups)
            small = net.extract(net.variables, net.smallest)
            kernel = small.params["conv2"]["kernel"]
            assert kernel.shape[:2] == (sizes[0], sizes[0])
            first, last = (5 - sizes[0]) // 2, (5 + sizes[0]) // 2
            whole = net.variables.params["conv2"]["kernel"]
            np.testing.assert_array_equal(kernel, whole[first:last, first:last])
            drawn = np.asarray(net.sample(jax.random.key(0), 64))
            for row in drawn.T:
                assert set(row.tolist()) == set(sizes)
            least = float(net.parameters(jnp.asarray(net.smallest, jnp.float32)))
            budget = Budget("parameters", net.parameters, least)
            np.testing.assert_array_equal(net.members([budget])[0], net.smallest)


def test_sandwich_training_teaches_small_kernels():
    cnn, task, optimizer = tiny_cnn(), classification(5), optax.adam(3e-3)
    net = supernet(cnn, random_variables(cnn), (), kernels=(5, 1))
    step = sandwich(net, cnn, task, optimizer, num_random=0)
    images = IMAGES[..., :1]
    batch = {"image": images, "label": np.arange(8, dtype=np.int32) % 5}
    variables, state, losses = net.variables, optimizer.init(net.variables.params), []
    for key in jax.random.split(jax.random.key(0), 120):
        variables, state, loss = step(variables, state, batch, key)
        losses.append(loss)

    def says(variables, counts):
        return jax.nn.log_softmax(cnn.apply(net.extract(variables, counts), images)[0])

    whole, small = (says(net.variables, c) for c in (net.largest, net.smallest))
    expected = (jnp.exp(whole) * (whole - small)).sum(-1).mean()
    np.testing.assert_allclose(losses[0][1], expected, rtol=1e-4)
    # It is told no labels, and comes to know those that the largest learns.
    right = lambda logs: logs[np.arange(8), batch["label"]].mean()
    assert right(says(variables, net.smallest)) > right(small) + 0.2


def test_evolution_finds_a_good_member_by_a_predictor_that_ranks():
    net = NETS["mobilenet"]  # most of its groups are kernels
    weight = np.linspace(1, 0, len(net.groups)).astype(np.float32)
    truth = lambda counts: (counts / net.largest) @ weight
    counts = np.asarray(net.sample(jax.random.key(1), 120))
    predictor = fit_predictor(net, counts, truth(counts), jax.random.key(2), steps=300)
    assert predictor.rank_correlation > 0.9
    budgets = [
        Budget(name, cost, 0.6 * float(cost(jnp.asarray(net.largest, jnp.float32))))
        for name, cost in (
            ("parameters", net.parameters),
            ("macs", member_macs(net, MOBILENET, IMAGES)),
        )
    ]
    found = evolve(net, predictor.predict, budgets, jax.random.key(3), population=8, generations=8)
    for budget in budgets:
        assert budget.cost(jnp.asarray(found, jnp.float32)) <= budget.limit * (1 + 1e-6)
    for group, count in zip(net.groups, found.tolist(), strict=True):
        assert not group.kernels or count in group.kernels
    wishes = jax.random.normal(jax.random.key(4), (32, len(net.groups)))
    drawn = np.asarray(jax.vmap(net.fit(budgets))(wishes))
    assert truth(found) > truth(drawn).mean()


def test_rank_correlation_is_that_of_spearman():
    x = jnp.asarray([3.0, 1.0, 2.0, 9.0])
    np.testing.assert_allclose(rank_correlation(x, jnp.exp(x)), 1, rtol=1e-6)
    np.testing.assert_allclose(rank_correlation(x, -x), -1, rtol=1e-6)
    np.testing.assert_allclose(
        rank_correlation(x, jnp.asarray([3.0, 2.0, 1.0, 9.0])), 0.8, rtol=1e-6
    )


@pytest.mark.parametrize(
    "axes, options, message",
    [
        (("stage9_0",), {}, r"axes=\('stage9_0',\) must be some of the model's axes"),
        (("stage1_0",), {"smallest": 1.0}, "smallest=1.0 must be in"),
        (("stage1_0",), {"channel_multiple": 0}, "channel_multiple of 'stage1_0' is 0"),
        ((), {}, "Nothing is elastic"),
        ((), {"kernels": (3, 2)}, "2 of 3 taps have no centre"),
        ((), {"kernels": (5, 4)}, r"kernels=\(5, 4\) leave no choice"),
        ((), {"kernels": {"kernel_stem": (1,)}}, "that size among them"),
        ((), {"kernels": {"kernel_9": (3, 1)}}, "kernels of 'kernel_9' are"),
    ],
)
def test_supernets_that_cannot_be_are_refused(axes, options, message):
    with pytest.raises(ValueError, match=message):
        supernet(RESNET, DRAWN["resnet"], axes, **options)
    with pytest.raises(ValueError, match="this supernet has 3 groups"):
        NETS["resnet"].extract(DRAWN["resnet"], np.ones(2, int))
    with pytest.raises(ValueError, match=r"2 of 'kernel_.*give \(1, 3\)"):
        NETS["mobilenet"].extract(DRAWN["mobilenet"], np.full(len(NETS["mobilenet"].groups), 2))
    chex.assert_equal(NETS["resnet"].groups[0].least, 2)
