"""What a run says of updates that were lost, and when it stops: nothing learned is an error."""

import math

import jax
import numpy as np
import optax
import pytest

from jaxfm import tasks
from jaxfm.data.arrays import digits
from jaxfm.data.dealing import deal_out
from jaxfm.federated import Local, NothingLearned, prepare, train
from jaxfm.federated.outcome import counted, left_out, numbers
from jaxfm.federated.run import summary
from jaxfm.models import mlp

MODEL, TASK = mlp((64, 4, 10)), tasks.classification(10)
DATA = deal_out(digits(), TASK, num_clients=4, how="iid")


def run(rate: float = 0.1, data=DATA, **changes):
    ready = prepare("fed_avg", MODEL, data, Local(optax.sgd(rate), 16), num_rounds=2, max_steps=2)
    settings = {"num_rounds": 2, "cohort_size": 4, "eval_every": 1, "eval_examples": 16} | changes
    return train(ready, data, **settings)


def sick(clients):
    """The data with the rows of some clients infinite."""
    train = DATA.train
    image = train.examples["image"].copy()
    for client in clients:
        image[train.index[client, : train.count[client]]] = np.inf
    return DATA._replace(train=train._replace(examples=train.examples | {"image": image}))


def test_a_run_stops_where_no_update_is_finite(tmp_path, capfd):
    with pytest.raises(NothingLearned, match=r"after round 1: .* all 4 updates .* of 4 clients"):
        run(rate=1e30, run_dir=tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "train/loss" not in text and "nan" not in text.lower()
    assert "Round 1: the updates of 4 clients (client " in capfd.readouterr().err


def test_a_run_that_nobody_reports_to_is_no_run():
    with pytest.raises(NothingLearned, match=r"none of the 8 clients drawn reported \(8 dropped"):
        run(drop_rate=0.999999)


def test_a_global_model_that_is_not_finite_stops_the_run():
    variables = jax.jit(MODEL.init)(jax.random.key(0))
    broken = variables._replace(params=jax.tree.map(lambda x: x * np.inf, variables.params))
    with pytest.raises(NothingLearned, match="were not finite"):
        run(variables=broken)


def test_lost_updates_are_counted_and_their_clients_named(capfd):
    data = sick([1])
    result = run(data=data)
    assert result.failures.tolist() == [0, 2, 0, 0]
    totals = result.totals
    assert [totals[n] for n in ("selected", "reported", "non_finite", "absent")] == [8, 6, 2, 0]
    out, err = capfd.readouterr()
    assert "Round 2: the update of 1 client (client 1) was not finite and left out." in err
    assert "2 sent updates that were not finite and were left out, of 1 client (client 1)." in out
    assert "Round 1 of 2: 3 clients reported, train/loss " in err  # no terminal: a line a round
    full = summary(result, data, full_bytes=100)["full_model"]
    assert full == {"bytes_down": 800, "bytes_up": 800}  # what is left out was sent, too


def test_words():
    totals = {"selected": 8.0, "absent": 0.0, "non_finite": 0.0}
    assert left_out(totals, np.zeros(4, int), "abcd") == ""
    assert counted([2], "abcd") == "1 client (c)"
    assert counted(range(9), "abcdefghi").endswith("h, ...)")
    assert numbers({"a": math.inf, "b": math.nan, "c": 1}) == {"a": None, "b": None, "c": 1.0}
