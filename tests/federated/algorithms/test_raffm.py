"""RaFFM: order that changes nothing, slices that are averaged where they are, distillation inside.

The networks are those of the contract, and tiny transformers.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import (
    LOCAL,
    MODEL,
    TASK,
    TIERS,
    examples,
    federation,
    population,
    run_new,
    slow_and_fast,
    start,
    two_rounds,
)

from jaxfm.cost import num_bytes
from jaxfm.data.federation import federate
from jaxfm.distillation import kl_divergence
from jaxfm.federated.accounting.ledger import client_costs
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithms.raffm import prioritise, raffm, raffm_published, slice_objective
from jaxfm.federated.local import Local, objective
from jaxfm.federated.parts.unit_salience import free_axes, mean_norm, salience
from jaxfm.federated.population import Population
from jaxfm.model import count_parameters
from jaxfm.subnet import Subnet, axis_sizes, embed, extract, mask, width
from jaxfm.tasks import classification
from jaxfm.testing import random_variables, tiny_decoder, tiny_encoder, tiny_resnet, tiny_vit

TOKENS = np.arange(24).reshape(2, 12)
IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
TRANSFORMERS = {
    "decoder": (tiny_decoder(), TOKENS),  # two query heads to a key head, and rotary
    "encoder": (tiny_encoder(), {"tokens": TOKENS}),
    "vit": (tiny_vit(), IMAGES),
}
INPUT = examples(24)["x"]


def tiers_of(number: int, tiers=TIERS) -> Population:
    """Six clients, dealt to so many tiers."""
    people = population("fed_avg", federation())
    return people._replace(bucket=np.arange(6) % number)


# Order.


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_order_changes_no_output(name):
    model, inputs = TRANSFORMERS[name]
    variables = random_variables(model)
    axes = free_axes(model)
    assert {"embed", "kv_heads", "q_per_kv", "mlp", "v_dim"} <= set(axes)
    order = jax.jit(lambda v: (prioritise(model, v), prioritise(model, v, axes)))
    apply = jax.jit(lambda v: model.apply(v, inputs)[0])
    for ordered in order(variables):
        chex.assert_trees_all_close(apply(ordered), apply(variables), atol=2e-5, rtol=1e-5)
    for axis in axes:
        before, after = (
            np.asarray(salience(v.params, model.axes.params, axis)) for v in (variables, ordered)
        )
        assert (np.diff(after, axis=-1) <= 1e-5 * after.max()).all()
        if axis in ("embed", "mlp", "v_dim"):
            assert (np.diff(before, axis=-1) > 0).any()


def test_what_has_no_free_order_is_left_alone():
    assert not {"rotary_dim", "vocab", "layer"} & set(free_axes(tiny_decoder()))
    assert not {"class", "channel", "position"} & set(free_axes(tiny_vit()))
    assert free_axes(MODEL) == ("hidden1",)
    assert free_axes(tiny_resnet()) and free_axes(tiny_resnet(norm="group")) == ()


def test_heads_move_whole_and_units_stay_in_their_head():
    """Weights are 100 times the head, plus the unit; heads have orders of their own."""
    model = tiny_vit()
    variables = random_variables(model)
    heads = np.array([2, 4, 1, 3])
    units = np.array([[5, 20, 10, 15], [20, 10, 5, 15], [5, 10, 15, 20], [15, 5, 20, 10]])
    tags = (100 * heads[:, None] + units).astype(np.float32)
    attention = dict(variables.params["layers"]["attention"])
    names = model.axes.params["layers"]["attention"]
    for part in ("q", "k", "v", "o"):
        axes, leaf = names[part]["kernel"], attention[part]["kernel"]
        at = [i for i, n in enumerate(axes) if n in ("kv_heads", "qk_dim", "v_dim")]
        own = np.expand_dims(tags, [i for i in range(leaf.ndim) if i not in at])
        attention[part] = attention[part] | {"kernel": jnp.broadcast_to(own, leaf.shape)}
    layers = variables.params["layers"] | {"attention": attention}
    tagged = variables._replace(params=variables.params | {"layers": layers})
    expected = 100 * np.array([[4], [3], [2], [1]]) + np.array([20, 15, 10, 5])
    ordered = prioritise(model, tagged, ("kv_heads", "qk_dim", "v_dim"))
    for part in ("q", "k", "v", "o"):
        axes = names[part]["kernel"]
        leaf = np.asarray(ordered.params["layers"]["attention"][part]["kernel"])
        others = [i for i, n in enumerate(axes) if n not in ("kv_heads", "qk_dim", "v_dim")]
        np.testing.assert_array_equal(leaf.min(tuple(others)), expected)
        np.testing.assert_array_equal(leaf.max(tuple(others)), expected)


def test_a_unit_that_a_map_ignores_comes_last():
    """The published mean of norms puts it first."""
    params = jax.tree.map(jnp.ones_like, start().params)
    loud = params["dense1"]["kernel"].at[:, 3].set(10.0)
    deaf = params["dense2"]["kernel"].at[3].set(0.0)
    params = {
        "dense1": params["dense1"] | {"kernel": loud},
        "dense2": params["dense2"] | {"kernel": deaf},
    }
    rate = lambda f: np.asarray(f(params, MODEL.axes.params, "hidden1"))
    assert rate(salience).argmin() == 3 == rate(mean_norm).argmax()
    np.testing.assert_allclose(rate(mean_norm)[[0, 3]], [(6 + 3) / 2, (60 + 0) / 2])


# Averaging.


def test_one_full_tier_is_fed_avg():
    people = slow_and_fast("fed_avg")
    reference, _ = two_rounds("fed_avg")
    plain, _ = run_new(raffm(MODEL, TASK, LOCAL, [Subnet({})]), people, 2, cohort_size=3)
    chex.assert_trees_all_close(
        plain.server.variables, reference.server.variables, rtol=1e-7, atol=1e-7
    )


def test_order_in_between_changes_nothing_but_the_order():
    """Ranked by a bias that starts at zero: there is no order but what rounds make."""
    bias = lambda params, axes, name: params["dense1"]["bias"]
    algorithm = raffm(
        MODEL, TASK, LOCAL, [Subnet({})], axes=["hidden1"], importance=bias, reorder_every=1
    )
    state, _ = run_new(algorithm, slow_and_fast("fed_avg"), 2, cohort_size=3)
    variables, plain = state.server.variables, two_rounds("fed_avg")[0].server.variables
    in_order = lambda v: bool((np.diff(v.params["dense1"]["bias"]) <= 0).all())
    assert in_order(variables) and not in_order(plain) and int(state.server.round) == 2
    again = prioritise(MODEL, plain, importance=bias)
    chex.assert_trees_all_close(variables, again, rtol=1e-5, atol=1e-6)


def test_a_coordinate_that_nobody_covers_does_not_move():
    state, _ = run_new(raffm(MODEL, TASK, LOCAL, TIERS[1:], distill=1.0), tiers_of(2), 2)
    before, after = prioritise(MODEL, start()), state.server.variables
    inside = lambda v: mask(v, MODEL.axes, TIERS[1])
    outside = lambda v: jax.tree.map(jnp.subtract, v, inside(v))
    chex.assert_trees_all_equal(outside(after), outside(before))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), inside(after), inside(before))
    assert all(jax.tree.leaves(changed))


def test_the_published_mean_shrinks_what_not_all_hold():
    """Clients that do not learn: all six hold units 0 to 3, half of them the others."""
    idle = Local(optax.sgd(0.0), 4)
    held = np.repeat(np.array([1.0, 0.5], np.float32), 4)
    state, _ = run_new(raffm_published(MODEL, TASK, idle, TIERS[:2]), tiers_of(2))
    before, after = start().params, state.server.variables.params
    shrunk = [before["dense1"]["kernel"] * held[None], before["dense2"]["kernel"] * held[:, None]]
    for name, kernel in zip(("dense1", "dense2"), shrunk, strict=True):
        chex.assert_trees_all_close(after[name]["kernel"], kernel, rtol=1e-6)


def test_bytes_of_a_tier_are_those_of_its_slice():
    algorithm = raffm(MODEL, TASK, LOCAL, TIERS, distill=1.0)
    costs = client_costs(algorithm, tiers_of(3), start())
    assert [cost.bytes_down for cost in costs] == [4 * (10 * h + 3) for h in (8, 4, 2)]
    assert [cost.bytes_up - cost.bytes_down for cost in costs] == [4] * 3  # how many examples


def test_slices_of_heads_and_stream_cost_what_they_are():
    """By shapes alone: the whole round of a transformer, the student inside a slice too."""
    model = tiny_vit()
    like = jax.eval_shape(model.init, jax.random.key(0))
    axes = ("kv_heads", "qk_dim", "v_dim", "mlp", "embed")
    tiers = [width(axis_sizes(like, model.axes), dict.fromkeys(axes, r)) for r in (1.0, 0.75, 0.5)]
    data = federate({"image": IMAGES, "label": np.arange(6, dtype=np.int32) % 5}, [np.arange(6)])
    people = Population(data, profiles(1), np.zeros(1, int))
    task, local = classification(5), Local(optax.sgd(0.1), 3)
    plain, taught = (
        client_costs(raffm(model, task, local, tiers, distill=distill), people, like)
        for distill in (0.0, 1.0)
    )
    for tier, cost, more in zip(tiers, plain, taught, strict=True):
        params = jax.eval_shape(lambda v, tier=tier: extract(v, model.axes, tier), like).params
        assert (cost.bytes_down, cost.parameters) == (num_bytes(params), count_parameters(params))
        assert more.bytes_down == cost.bytes_down and more.bytes_up == cost.bytes_up
    work = np.array([[c.flops_per_step for c in costs] for costs in (plain, taught)])
    assert (np.diff(work) < 0).all() and work[0, 2] < 0.35 * work[0, 0]
    # The student is the smallest tier: what it takes comes on top, and nothing in its own tier.
    np.testing.assert_allclose(work[1] - work[0], np.array([1, 1, 0]) * work[0, 2], rtol=0.1)


# Distillation in place.


def gradients(loss):
    batch = {name: x[:6] for name, x in examples(24).items()}
    variables = start()
    compute = jax.jit(jax.grad(loss, has_aux=True))
    return compute(variables.params, variables, batch, jnp.ones(6), jax.random.key(0))[0]


def test_distillation_moves_the_weights_inside_only():
    plain, nothing, whole = (
        gradients(loss)
        for loss in (
            objective(MODEL, TASK),
            slice_objective(MODEL, TASK, TIERS[2], 0.0),
            slice_objective(MODEL, TASK, TIERS[2], 1.0),
        )
    )
    chex.assert_trees_all_close(nothing, plain, rtol=1e-6, atol=1e-7)

    def divergence(inside):
        teacher, student = MODEL.apply(start(), INPUT[:6])[0], MODEL.apply(inside, INPUT[:6])[0]
        total, count = kl_divergence(teacher, student, jnp.ones(6))
        return total / count

    inside = extract(start(), MODEL.axes, TIERS[2])
    own = jax.grad(lambda params: divergence(inside._replace(params=params)))(inside.params)
    expected = embed(own, MODEL.axes.params, TIERS[2], plain)
    term = jax.tree.map(jnp.subtract, whole, plain)
    chex.assert_trees_all_close(term, expected, rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(own["dense1"]["kernel"]).min()) > 0


def test_a_slice_that_nobody_trained_alone_speaks_for_the_whole():
    """All clients hold everything. Cut without retraining, the half of a run with distillation says
    what the whole says."""
    gaps = []
    for distill in (0.0, 1.0):
        algorithm = raffm(
            MODEL, TASK, LOCAL, TIERS[:1], axes=["hidden1"], distill=distill, student=TIERS[1]
        )
        state, _ = run_new(algorithm, tiers_of(1), num_rounds=30)
        whole = state.server.variables
        half = extract(whole, MODEL.axes, TIERS[1])
        logits = [MODEL.apply(v, INPUT)[0] for v in (whole, half)]
        gaps.append(float(kl_divergence(*logits, jnp.ones(24))[0]))
    assert gaps[1] < 0.5 * gaps[0]  # 0.34 and 1.54 nats


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiers": []}, "raffm needs at least one tier"),
        ({"tiers": [Subnet({"hidden1": np.array([0, 2])})]}, r"\[0, 2\] is no leading slice"),
        ({"student": Subnet({"hidden1": np.array([1])})}, r"\[1\] is no leading slice"),
        ({"axes": ["class"]}, r"axes=\['class'\] cannot all be reordered; .* \['hidden1'\]"),
        ({"reorder_every": -1}, "must not be negative .* got -1, 0.0, 1.0"),
        ({"distill": -1.0}, "must not be negative"),
        ({"distill": float("nan")}, "must not be negative"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"distill": 1.0, "tiers": TIERS[2:]}, "some tier must hold more than the student"),
        (
            {"distill": 1.0, "student": TIERS[1]},
            "Tier 2 holds 2 of 'hidden1', the student 4: .* one that fits in all",
        ),
    ],
)
def test_bad_settings_raise(change, message):
    settings = {"tiers": TIERS} | change
    tiers = settings.pop("tiers")
    with pytest.raises(ValueError, match=message):
        raffm(MODEL, TASK, LOCAL, tiers, **settings)
