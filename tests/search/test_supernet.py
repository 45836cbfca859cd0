"""Laws of supernets: order changes nothing, members are slices, budgets hold, training learns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm import count_parameters
from jaxfm.search.evolve import evolve, fit_predictor, rank_correlation
from jaxfm.search.project import Budget
from jaxfm.search.supernet import recalibrate, sandwich, supernet
from jaxfm.tasks import classification
from jaxfm.testing import random_variables, tiny_decoder, tiny_resnet

RNG = np.random.default_rng(0)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = RNG.integers(0, 64, (2, 7)).astype(np.int32)
IMAGES = RNG.normal(size=(8, 8, 8, 3)).astype(np.float32)
RESNET, DECODER = tiny_resnet(), tiny_decoder()
FAMILIES = {
    "resnet": (RESNET, ("stage1_0", "stage1_1", "stage2_0"), 2, IMAGES),
    "decoder": (DECODER, ("embed", "mlp", "kv_heads", "layer"), {"mlp": 8, "embed": 4}, TOKENS),
}
DRAWN = {name: random_variables(model) for name, (model, *_) in FAMILIES.items()}
NETS = {
    name: supernet(model, DRAWN[name], axes, multiple=multiple)
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


@each
def test_order_changes_no_output_and_is_one_of_importance(name):
    inputs, net = FAMILIES[name][3], NETS[name]
    before, after = (APPLY[name](v, inputs)[0] for v in (DRAWN[name], net.variables))
    np.testing.assert_allclose(after, before, **CLOSE)
    leaves = zip(jax.tree.leaves(net.variables), jax.tree.leaves(DRAWN[name]), strict=True)
    assert not all(np.array_equal(a, b) for a, b in leaves)


@each
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


@each
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
    measured = recalibrate(RESNET, net.variables, jnp.asarray(IMAGES)[None])
    train, _ = RESNET.apply(net.variables, IMAGES, train=True)
    evaluated, _ = APPLY["resnet"](measured, IMAGES)
    mean = measured.stats["stem"]["norm"]["mean"]
    from_zero = jax.tree.map(jnp.zeros_like, net.variables.stats)
    _, moved = RESNET.apply(net.variables._replace(stats=from_zero), IMAGES, train=True)
    np.testing.assert_allclose(mean, moved["stem"]["norm"]["mean"] / 0.1, rtol=1e-4, atol=1e-5)
    # The running variance divides by n - 1: a hundredth of the output at 8 pixels a channel.
    np.testing.assert_allclose(evaluated, train, rtol=0.1, atol=0.1)


def test_evolution_finds_a_good_member_by_a_predictor_that_ranks():
    net = NETS["resnet"]
    weight = np.linspace(1, 0, len(net.groups)).astype(np.float32)
    truth = lambda counts: (counts / net.largest) @ weight
    counts = np.asarray(net.sample(jax.random.key(1), 120))
    predictor = fit_predictor(net, counts, truth(counts), jax.random.key(2), steps=300)
    assert predictor.rank_correlation > 0.9
    whole = float(net.parameters(jnp.asarray(net.largest, jnp.float32)))
    budget = Budget("parameters", net.parameters, 0.6 * whole)
    found = evolve(net, predictor.predict, [budget], jax.random.key(3), population=8, generations=8)
    assert net.parameters(jnp.asarray(found, jnp.float32)) <= budget.limit * (1 + 1e-6)
    assert truth(found) >= truth(net.members([budget])[0])


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
        (("stage1_0",), {"multiple": 0}, "multiple of 'stage1_0' is 0"),
    ],
)
def test_supernets_that_cannot_be_are_refused(axes, options, message):
    with pytest.raises(ValueError, match=message):
        supernet(RESNET, DRAWN["resnet"], axes, **options)
    with pytest.raises(ValueError, match="this supernet has 3 groups"):
        NETS["resnet"].extract(DRAWN["resnet"], np.ones(2, int))
    chex.assert_equal(NETS["resnet"].groups[0].least, 2)
