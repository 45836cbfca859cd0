"""Plans by a simulated clock: who arrives when, and who never does."""

import math

import numpy as np
import pytest

from jaxfm.federated.accounting.ledger import ClientCost
from jaxfm.federated.accounting.resources import fleet
from jaxfm.federated.asynchronous import (
    Availability,
    buffered,
    diurnal,
    read_availability,
    synchronous,
)
from jaxfm.federated.asynchronous.schedule import client_seconds

HOUR = 3600.0


def test_a_plan_by_hand():
    """Two at work, steps of one update: the client of 2 s comes twice while that of 5 s is away."""
    plan = buffered(np.array([2.0, 5.0]), concurrency=2, buffer_size=1, num_steps=4, seed=0)
    assert plan.seconds.tolist() == [2, 4, 5, 6]
    assert plan.client[:, 0].tolist() == [0, 0, 1, 0]
    assert plan.version[:, 0].tolist() == [0, 1, 0, 2]
    assert plan.behind[:, 0].tolist() == [0, 0, 2, 1]
    assert plan.started.tolist() == [2, 3, 4, 5]


def test_what_ends_at_one_instant_is_settled_before_anybody_starts():
    plan = buffered(np.ones(6), concurrency=4, buffer_size=2, num_steps=6, seed=1)
    assert plan.seconds.tolist() == [1, 1, 2, 2, 3, 3]
    assert plan.version.tolist() == [[0, 0], [0, 0], [2, 2], [2, 2], [4, 4], [4, 4]]


@pytest.mark.parametrize("seed", range(12))
def test_laws_of_buffered_plans(seed):
    """Of random plans: at most so many at work, nobody twice in a buffer, time and counts."""
    rng = np.random.default_rng(seed)
    clients = int(rng.integers(3, 30))
    places = int(rng.integers(1, clients + 1))
    at_once = int(rng.integers(1, clients + 5))
    seconds = rng.lognormal(2, 1, clients)
    when = diurnal(clients, hours=rng.uniform(0.5, 24), seed=seed) if seed % 2 else None
    plan = buffered(
        seconds, concurrency=at_once, buffer_size=places, num_steps=40, when=when,
        jitter=0.3 * (seed % 3), seed=seed,
    )  # fmt: skip
    steps = np.arange(40)[:, None]
    assert (plan.client >= 0).all() and (plan.version <= steps).all() and (plan.behind >= 0).all()
    assert all(len(set(row)) == places for row in plan.client.tolist())
    assert (np.diff(plan.seconds) >= 0).all()
    arrived = (np.arange(40) + 1) * places
    at_work = plan.started - plan.lost - arrived
    assert (at_work <= min(at_once, clients)).all() and (at_work >= 0).all()
    starts = list(zip(plan.client.ravel(), plan.version.ravel(), plan.again.ravel(), strict=True))
    assert len(set(starts)) == len(starts)  # none counts twice
    again = buffered(
        seconds, concurrency=at_once, buffer_size=places, num_steps=40, when=when,
        jitter=0.3 * (seed % 3), seed=seed,
    )  # fmt: skip
    np.testing.assert_array_equal(plan.client, again.client)


def test_clients_that_leave_before_they_are_done_are_lost():
    when = Availability(np.array([0, 1]), np.array([0.0, 0.0]), np.array([5.0, 1e9]), 2)
    plan = buffered(np.array([10.0, 4.0]), concurrency=2, buffer_size=1, num_steps=3, when=when)
    assert plan.client[:, 0].tolist() == [1, 1, 1] and plan.seconds.tolist() == [4, 8, 12]
    assert plan.lost.tolist() == [0, 1, 1]


def test_a_run_that_nobody_can_finish_is_refused():
    when = Availability(np.array([0]), np.array([0.0]), np.array([5.0]), 1)
    with pytest.raises(ValueError, match="nobody is at work and nobody can be reached again"):
        buffered(np.array([2.0]), concurrency=1, buffer_size=1, num_steps=9, when=when)


def test_waiting_rounds_take_the_first_ones():
    plan = synchronous(np.arange(1.0, 9.0), cohort_size=3, num_steps=50, more=2, seed=0)
    assert (plan.behind == 0).all() and plan.started.tolist() == list(range(6, 306, 6))
    lengths = np.diff(plan.seconds, prepend=0)
    slowest = plan.client.max(1) + 1.0  # of those that counted
    np.testing.assert_allclose(lengths, slowest)
    assert (
        slowest.mean()
        < synchronous(np.arange(1.0, 9.0), cohort_size=3, num_steps=50).seconds[-1] / 50
    )
    assert all(len(set(row)) == 3 for row in plan.client.tolist())


def test_a_deadline_ends_a_round_with_those_that_are_back():
    seconds = np.array([1.0, 2.0, 50.0])
    plan = synchronous(seconds, cohort_size=3, num_steps=2, deadline_s=10)
    assert plan.seconds.tolist() == [10, 20]
    assert sorted(plan.client[0].tolist()) == [-1, 0, 1]
    alone = synchronous(seconds[2:], cohort_size=1, num_steps=1, deadline_s=10)
    assert alone.seconds.tolist() == [50]  # a round without anybody would be none


def test_days_come_again():
    when = diurnal(200, hours=6, seed=3)
    for now in (0.0, 13.7 * HOUR, 24 * HOUR * 9 + 5 * HOUR):
        until = when.until(now)
        here = until > now
        expected = (now - when.begin) % (24 * HOUR) < 6 * HOUR
        np.testing.assert_array_equal(here, expected)
        assert (until[here] - now <= 6 * HOUR).all()
    assert when.next_begin(0.0) == when.begin.min()


def test_windows_from_a_file(tmp_path):
    file = tmp_path / "windows.csv"
    file.write_text("client,begin,end\n0,0,10\n1,5,20\n")
    when = read_availability(file, 2)
    assert when.until(6.0).tolist() == [10, 20] and when.until(15.0).tolist() == [-math.inf, 20]
    for text, message in (
        ("client,begin\n0,1\n", "lacks the column 'end'"),
        ("client,begin,end\n0,1,x\n", "Line 2 of .* is not three numbers"),
        ("client,begin,end\n0,1,2\n7,1,2\n", "Line 3 of .*: a window of client 7"),
        ("client,begin,end\n0,2,1\n", "Line 2 of .*: a window of client 0 from 2 to 1 s"),
        ("client,begin,end\n", "has no window"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_availability(file, 2)


def test_seconds_follow_from_machines():
    machines = fleet(("pi", "laptop"), 2)
    cost = ClientCost(
        parameters=1, bytes_down=1e6, bytes_up=2e6, flops_per_step=1e9, flops_per_round=5e8,
        memory_bytes=1,
    )  # fmt: skip
    found = client_seconds(machines, cost, np.array([3, 4]))
    expected = [1e6 / 5e6 + 3.5e9 / 5e9 + 2e6 / 2.5e6, 1e6 / 1e7 + 4.5e9 / 1e11 + 2e6 / 2.5e6]
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": np.array([1.0, 0.0])}, "must be finite and above 0; got 0.0"),
        ({"seconds": np.ones((2, 2))}, r"must be \[C\], a number for each client"),
        ({"concurrency": 0}, "concurrency=0 must be at least 1"),
        ({"buffer_size": 3}, "buffer_size=3 updates of different clients never come from 2"),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"jitter": -1.0}, "jitter=-1.0 must be 0 or more"),
    ],
)
def test_wrong_numbers_are_named(change, message):
    given = {"seconds": np.ones(2), "concurrency": 1, "buffer_size": 1, "num_steps": 1} | change
    with pytest.raises(ValueError, match=message):
        buffered(given.pop("seconds"), **given)
