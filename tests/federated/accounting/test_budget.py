"""A budget of bytes is never exceeded, and is known before a round runs."""

import jax
import numpy as np
import optax
import pytest
from laws import engine, federation, make, population, start

from jaxfm import tasks
from jaxfm.data.arrays import digits
from jaxfm.data.dealing import deal_out
from jaxfm.federated import Local, client_costs, prepare, train
from jaxfm.federated.accounting.budget import ByteBudget
from jaxfm.federated.accounting.ledger import first_downloads, round_costs
from jaxfm.models import mlp


def test_what_a_round_takes_is_known_before():
    """Who drops out, who is empty and who is drawn for the first time, to the byte."""
    people = population("fed_avg", federation((6, 1, 0, 3, 5, 2)))
    (cost,) = client_costs(make("fed_avg"), people, start())
    costs = (cost._replace(bytes_once=1000),)
    count = np.asarray(people.federation.count)
    budget = ByteBudget(10**9, costs, people.bucket, count, cohort_size=3, drop_rate=0.5)
    state = engine("fed_avg", cohort_size=3).init(start(), jax.random.key(3))
    served, amounts = np.zeros(6, bool), set()
    for _ in range(4):
        expected = budget.next_round(state.key, state.round, served)
        state, info = engine("fed_avg", cohort_size=3).run(state, people, 0.5)
        info = jax.device_get(info)
        first, served = first_downloads(info, people.bucket, served, 1)
        spent = round_costs(costs, info, first)
        assert spent["bytes_down"] + spent["bytes_up"] == expected
        amounts.add(expected)
    assert len(amounts) > 2


MODEL, TASK = mlp((64, 4, 10)), tasks.classification(10)
DATA = deal_out(digits(), TASK, num_clients=4, how="iid")
ROUND = 4 * 2 * 4 * (64 * 4 + 4 + 4 * 10 + 10) + 4 * 4  # and four weights


def run(budget=None, num_rounds=5, name="fed_avg", **changes):
    ready = prepare(
        name, MODEL, DATA, Local(optax.sgd(0.1), 16), num_rounds=num_rounds, max_steps=1
    )
    settings = {"cohort_size": 4, "eval_every": 2, "eval_examples": 16} | changes
    return train(ready, DATA, num_rounds=num_rounds, byte_budget=budget, **settings)


def taken(result) -> float:
    return result.totals["bytes_up"] + result.totals["bytes_down"]


def test_a_run_ends_before_the_round_that_would_exceed_it(tmp_path, capsys):
    whole = run(run_dir=tmp_path / "whole")
    assert taken(whole) == 5 * ROUND and whole.ended == ""
    short = run(4 * ROUND - 1, run_dir=tmp_path / "short")
    sentence = f"Stopped after round 3: of byte_budget={4 * ROUND - 1} {ROUND - 1:,} bytes are left"
    assert taken(short) == 3 * ROUND and short.ended.startswith(sentence)
    assert sentence in capsys.readouterr().out
    assert "validation/accuracy" in short.history[-1]  # though round 3 was not to be looked at
    again = run(4 * ROUND - 1, run_dir=tmp_path / "short")
    assert again.history == [] and again.ended == short.ended and again.test == short.test
    more = run(5 * ROUND, run_dir=tmp_path / "short")
    assert taken(more) == 5 * ROUND and more.ended == "" and more.test == whole.test
    assert run(5 * ROUND, run_dir=tmp_path / "short").ended == ""


def test_a_client_that_may_catch_up_is_counted_with_what_it_may_take():
    name = "streaming_diloco"
    limit = 5 * ROUND
    result = run(limit, 40, name, cohort_size=2)
    assert result.ended and taken(result) <= limit
    (cost,) = result.placement.costs
    assert cost.most_caught_up == 1
    assert limit - taken(result) < 2 * (2 * cost.bytes_down + cost.bytes_up)


def test_a_budget_below_a_round_is_refused():
    with pytest.raises(ValueError, match=r"not enough for a single round\. Stopped after round 0"):
        run(ROUND - 1)
