"""Machines: who gets which model, and what a round takes on them, by hand."""

import jax
import numpy as np
import optax
import pytest

from jaxfm.data.federation import federate
from jaxfm.federated.accounting.ledger import (
    ClientCost,
    Work,
    client_costs,
    client_work,
    round_costs,
)
from jaxfm.federated.accounting.resources import (
    DEVICES,
    Device,
    fleet,
    fleet_profiles,
    plan,
    simulated,
)
from jaxfm.federated.algorithms.hetero_fl import hetero_fl
from jaxfm.federated.cohort import draw
from jaxfm.federated.local import Local
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import compile_rounds
from jaxfm.models.families.cnn import mlp
from jaxfm.subnet import Subnet
from jaxfm.tasks import classification

SLOW = Device(10.0, 100.0, 4.0, 2.0, 3.0, 0.5)
FAST = Device(1000.0, 1e3, 40.0, 20.0, 0.1, 0.25)
TWO = Device(*np.array([SLOW, FAST], np.float64).T)
# Eight bytes down and four up, and a quarter of that; 20 operations a step, and 5.
LARGE = ClientCost(8, 4, 10, 90, 20)
SMALL = ClientCost(2, 1, 5, 45, 5)


def test_seconds_and_joules_by_hand():
    work = Work(np.array([8.0, 8.0]), np.array([40.0, 60.0]), np.array([4.0, 4.0]))
    spent = simulated(TWO, work)
    assert spent["seconds"] == pytest.approx(8 / 4 + 40 / 10 + 4 / 2)  # the slow one's
    assert spent["joules"] == pytest.approx(40 * 3 + 12 * 0.5 + 60 * 0.1 + 12 * 0.25)
    idle = simulated(TWO, Work(*np.zeros((3, 2))))
    assert idle == {"seconds": 0, "joules": 0}


def test_a_deadline_gives_each_machine_the_largest_model_it_finishes():
    steps = np.array([3, 3])
    # The slow one needs 4 + 3 * 2 s for the large model, 1 + 3 * 0.5 s for the small one.
    assert plan(TWO, [LARGE, SMALL], steps, 10.0).bucket.tolist() == [0, 0]
    assert plan(TWO, [LARGE, SMALL], steps, 9.9).bucket.tolist() == [1, 0]
    cut = plan(TWO, [LARGE, SMALL], steps, 2.1)
    assert cut.bucket.tolist() == [1, 0]
    assert cut.max_steps.tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"Client 0 needs 1\.5 s for one step"):
        plan(TWO, [LARGE, SMALL], steps, 1.4)


def test_without_a_deadline_half_of_the_clients_train_the_largest_model():
    steps = np.array([3, 3])
    chosen = plan(TWO, [LARGE, SMALL], steps)
    fast = 8 / 40 + 4 / 20 + 3 * 20 / 1000
    assert chosen.deadline_s == pytest.approx((10 + fast) / 2)
    assert chosen.bucket.tolist() == [1, 0]
    assert chosen.max_steps.tolist() == [3, 3]
    assert plan(TWO, [LARGE], steps).max_steps.tolist() == [3, 3]
    assert plan(TWO, [LARGE, SMALL], steps, np.inf).bucket.tolist() == [0, 0]
    # Whoever has no data is not asked, and the slowest's smallest model must fit.
    chosen = plan(TWO, [LARGE, SMALL], np.array([0, 3]))
    assert chosen.deadline_s == pytest.approx(1.0)  # its wire alone
    four = Device(*np.array([SLOW, FAST, FAST, FAST], np.float64).T)
    chosen = plan(four, [LARGE, SMALL], np.full(4, 3))
    assert chosen.deadline_s == pytest.approx(2.5) and chosen.bucket.tolist() == [1, 0, 0, 0]


def test_a_model_that_is_settled_stays_and_steps_give_way():
    settled = plan(TWO, [LARGE, SMALL], np.array([3, 3]), 7.0, bucket=np.array([0, 1]))
    assert settled.bucket.tolist() == [0, 1]
    assert settled.max_steps.tolist() == [1, 3]


def test_memory_comes_before_time():
    narrow = TWO._replace(memory_bytes=np.array([1e3, 50.0]))
    chosen = plan(narrow, [LARGE, SMALL], np.array([3, 3]), np.inf)
    assert chosen.bucket.tolist() == [0, 1]
    with pytest.raises(ValueError, match="Client 1 has 40 bytes of memory"):
        plan(TWO._replace(memory_bytes=np.array([1e3, 40.0])), [LARGE, SMALL], np.array([3, 3]))


def test_a_mix_is_dealt_out_in_turn_and_known_to_its_clients():
    machines = fleet(("pi", "pi", "server"), 5)
    assert machines.flops_per_s.tolist() == [5e9, 5e9, 1e14, 5e9, 5e9]
    known = fleet_profiles(machines, 7)
    for name, value in known._asdict().items():
        expected = 7 if name == "max_steps" else getattr(machines, name)
        np.testing.assert_allclose(np.asarray(value, np.float64), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"must name some of pi, phone"):
        fleet(("toaster",), 3)
    with pytest.raises(ValueError, match="must name some of"):
        fleet((), 3)


def test_larger_machines_are_faster_and_a_byte_costs_more_than_an_operation():
    speeds = [device.flops_per_s for device in DEVICES.values()]
    assert speeds == sorted(speeds)
    assert all(device.joules_per_byte > device.joules_per_flop for device in DEVICES.values())


def test_what_clients_did_adds_up_to_the_ledger():
    rng = np.random.default_rng(0)
    examples = {
        "x": rng.normal(size=(20, 6)).astype(np.float32),
        "label": rng.integers(0, 3, 20).astype(np.int32),
    }
    data = federate(examples, [*np.split(np.arange(20), [4, 7, 13, 20])])
    steps = -(-data.count // 2)
    model, tiers = mlp((6, 8, 3)), (Subnet({}), Subnet({"hidden1": np.arange(2)}))
    local = Local(optax.sgd(0.1), 2)
    algorithm = hetero_fl(model, classification(3, inputs="x"), local, tiers)
    machines = fleet(("pi", "phone"), 5)
    people = Population(data, fleet_profiles(machines), np.arange(5) % 2)
    variables, key = model.init(jax.random.key(0)), jax.random.key(3)
    costs = client_costs(algorithm, people, variables)
    engine = compile_rounds(algorithm, people, cohort_size=3, drop_rate=0.4)
    state = engine.init(variables, key)
    failed = 0
    for number in range(6):
        state, info = engine.run(state)
        work = client_work(costs, people.bucket, info)
        for name, total in round_costs(costs, info).items():
            assert getattr(work, name).sum() == pytest.approx(total)
        took = work.flops > 0
        drawn, reports = draw(key, number, 5, 3, 0.4)
        np.testing.assert_array_equal(took, np.isin(np.arange(5), drawn) & reports & (steps > 0))
        per_step = np.array([cost.flops_per_step for cost in costs])[people.bucket]
        np.testing.assert_allclose(work.flops[took], (steps * per_step)[took])
        assert (work.bytes_down > 0).sum() == 3
        assert not (work.bytes_up > 0)[4]  # has no data
        failed += 3 - took.sum()
    assert failed > 0
    two = jax.tree.map(lambda x: np.concatenate([x, x]), info)
    with pytest.raises(ValueError, match="one round of 2 buckets at a time"):
        client_work(costs, people.bucket, two)
