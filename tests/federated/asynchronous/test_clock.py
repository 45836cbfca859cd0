"""Whole runs by a clock: they go on where they were stopped, and tell simulated time."""

import chex
import jax
import numpy as np
import optax
import pytest

from jaxfm.data.arrays import digits
from jaxfm.data.dealing import deal_out
from jaxfm.federated import Local, fed_avg, fleet, place, train, wanted_steps
from jaxfm.federated.asynchronous import Clock
from jaxfm.launch.clock import AsynchronousConfig
from jaxfm.models.families.cnn import mlp
from jaxfm.tasks import classification


@pytest.fixture(scope="module")
def setting():
    """(algorithm, data, variables, placement) of six clients on two kinds of machine."""
    small = {name: s._replace(examples={k: x[:60] for k, x in s.examples.items()})
             for name, s in digits().items()}  # fmt: skip
    data = deal_out(small, classification(10), num_clients=6, how="iid")
    model, local = mlp((64, 4, 10)), Local(optax.sgd(0.1), batch_size=8)
    algorithm = fed_avg(model, classification(10), local)
    variables = model.init(jax.random.key(0))
    placement = place(
        algorithm, data.train, variables, machines=fleet(("pi", "laptop"), 6),
        steps=wanted_steps(data.train, local), deadline_s=float("inf"),
    )  # fmt: skip
    return algorithm, data, variables, placement


def test_a_stopped_run_ends_with_the_same_bits(setting, tmp_path):
    algorithm, data, variables, placement = setting
    settings = {
        "cohort_size": 4, "variables": variables, "placement": placement, "eval_every": 2,
        "clock": Clock(buffer_size=2, max_staleness=3, jitter=0.1),
    }  # fmt: skip
    whole = train(algorithm, data, num_rounds=6, **settings)
    train(algorithm, data, num_rounds=2, run_dir=tmp_path, **settings)
    went_on = train(algorithm, data, num_rounds=6, run_dir=tmp_path, **settings)
    chex.assert_trees_all_equal(went_on.state.server, whole.state.server)
    plan = settings["clock"].plan(placement, np.asarray(placement.profiles.max_steps), 4, 6, 0)
    assert plan.behind.max() > 0
    np.testing.assert_allclose(whole.totals["seconds"], plan.seconds[-1], rtol=1e-5)
    assert whole.totals["reported"] == 12


def test_what_does_not_go_with_a_clock_is_refused(setting):
    algorithm, data, variables, placement = setting
    clock = Clock(buffer_size=2)
    given = {"num_rounds": 2, "cohort_size": 4, "variables": variables, "clock": clock}
    with pytest.raises(ValueError, match="A clock needs clients' machines"):
        train(algorithm, data, **given)
    with pytest.raises(ValueError, match="leave out drop_rate and byte_budget"):
        train(algorithm, data, placement=placement, drop_rate=0.1, **given)
    with pytest.raises(ValueError, match="buffer_size=7 updates of different clients"):
        train(algorithm, data, placement=placement, **given | {"clock": Clock(buffer_size=7)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 2.0, "buffer": 1}, "asynchronous.rate=2.0: give a number above 0"),
        ({"hours": 0.0, "buffer": 1}, "asynchronous.hours=0.0: give hours of a day"),
        (
            {"hours": 8.0, "windows": "w.csv", "buffer": 1},
            "or asynchronous.hours, not both",
        ),
        ({"jitter": -1.0, "buffer": 1}, "asynchronous.jitter=-1.0: give 0 or more"),
        ({"models": True}, "change nothing without --asynchronous=N"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AsynchronousConfig(**options)
    assert AsynchronousConfig().clock(4, 0) is None
