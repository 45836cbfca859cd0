"""What a run says of updates that were lost, and when it stops: nothing learned is an error."""

import json
import math

import jax
import numpy as np
import optax
import pytest

from jaxfm import tasks
from jaxfm.data.arrays import digits
from jaxfm.data.dealing import deal_out
from jaxfm.errors import explain
from jaxfm.federated import Local, NothingLearned, measuring, prepare, train
from jaxfm.federated.accounting.metrics import global_metrics
from jaxfm.federated.outcome import check_reports, counted, left_out, no_account, numbers, say_line
from jaxfm.federated.placement import capped_epochs
from jaxfm.federated.run import summary
from jaxfm.federated.slices import are_nested
from jaxfm.launch.pages.federated import client_figures, clients
from jaxfm.models import mlp
from jaxfm.subnet import Subnet, extract

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
        image[train.rows_of(client)] = np.inf
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


def test_a_line_has_the_figures_of_the_global_model_and_no_others(capfd):
    line = {"clients/reported": 3.0, "validation/loss": 0.5, "validation/bucket1/loss": 0.7}
    say_line(4, 9, line | {"total/bytes_up": 1.0, "personal/loss": 0.25})
    said = "Round 4 of 9: 3 clients reported, validation/loss 0.5, personal/loss 0.25.\n"
    assert capfd.readouterr().err == said


def test_where_nobody_trains_the_full_model_the_largest_that_is_trained_is_scored():
    ready = prepare(
        "hetero_fl", MODEL, DATA, Local(optax.sgd(0.1), 16), num_rounds=1, widths=(1.0, 0.5, 0.25)
    )
    weak = ready.placement._replace(bucket=np.array([1, 1, 2, 2], np.int32))
    result = train(
        ready, DATA, placement=weak, num_rounds=1, cohort_size=4, eval_examples=16, eval_every=1
    )
    assert result.scored == 1
    variables, axes = result.state.server.variables, MODEL.axes
    half = extract(variables, axes, Subnet({"hidden1": np.arange(2)}))
    own = tasks.evaluate(MODEL.apply, half, TASK, DATA.test, 32)
    assert result.test["global/loss"] == pytest.approx(own["loss"], rel=1e-6)
    assert "validation/loss" in result.history[-1]
    assert [n for n in result.history[-1] if "bucket" in n and n.endswith("loss")] == [
        "validation/bucket2/loss"
    ]
    part = json.loads(json.dumps(summary(result, DATA, full_bytes=100), allow_nan=False))
    part["full_model"]["parameters"] = 310
    page = "".join(clients(part))
    assert "Nobody trains the full model" in page and "the largest model that clients train" in page
    assert ">52%<" in page and "160 of 310 parameters" in page


def test_the_test_set_is_said_and_read_once(capfd, monkeypatch):
    read = []
    monkeypatch.setattr(
        measuring,
        "global_metrics",
        lambda *args, **how: read.append(args) or global_metrics(*args, **how),
    )
    result = run(eval_every=3, num_rounds=1, eval_examples=8)
    rows = len(DATA.test["label"])
    of_test = [args for args in read if len(args[3]["label"]) == rows]
    assert len(of_test) == 1 and result.test["global/loss"] == result.buckets[0]["loss"]
    assert f"Measuring on {rows} test rows and on those of 4 clients." in capfd.readouterr().err


def test_slices_are_nested_or_not():
    first, half, last = (Subnet({"a": np.array(x)}) for x in ([0, 1, 2], [0, 1], [2]))
    assert are_nested([Subnet({}), first, half]) and are_nested([half])
    assert not are_nested([half, last]) and not are_nested([half, Subnet({})])


def test_cards_say_which_way_is_better_and_lead_with_what_the_algorithm_is_for():
    part = {
        "test": {"global/accuracy": 0.1, "personal/accuracy": 0.9, "worst_decile/accuracy": 0.5},
        "totals": {"bytes_up": 0.0, "absent": 3.0, "non_finite": 1.0, "selected": 8.0},
        "full_model": {"bytes_up": 0.0}, "is_personal": True,
    }  # fmt: skip
    first, worst, sent, lost = client_figures(part)
    assert first.value == 0.9 and "higher is better" in first.note and "0.5" in str(worst.value)
    assert sent.note == "nobody uploaded; lower is better" and lost.value == 4
    assert client_figures(part | {"is_personal": False})[0].value == 0.1


def test_epochs_that_end_early_are_mentioned():
    local = Local(optax.sgd(0.1), 16, 3)
    placed = lambda steps: (
        prepare("fed_avg", MODEL, DATA, local, num_rounds=1, max_steps=steps).placement
    )
    assert capped_epochs(placed(1000), DATA.train, local) == ""
    wanted = 3 * -(-int(DATA.train.count.max()) // 16)
    capped = placed(8)
    sentence = capped_epochs(capped, DATA.train, local)
    assert sentence.startswith("Local epochs end early for 4 of 4 clients, after 8 steps a round")
    assert f"epochs=3 would make up to {wanted}:" in sentence
    most = np.where(DATA.train.count == DATA.train.count.max(), wanted - 1, 10 * wanted)
    most[DATA.train.count.argmin()] = 3 * -(-int(DATA.train.count.min()) // 16)  # just enough
    one = capped._replace(profiles=capped.profiles._replace(max_steps=most))
    assert f"for 1 of 4 clients, after {wanted - 1} steps" in capped_epochs(one, DATA.train, local)


def test_words():
    totals = {"selected": 8.0, "absent": 0.0, "non_finite": 0.0}
    assert left_out(totals, np.zeros(4, int), "abcd") == ""
    assert counted([2], "abcd") == "1 client (c)"
    assert counted(range(9), "abcdefghi").endswith("h, ...)")
    assert numbers({"a": math.inf, "b": math.nan, "c": 1}) == {"a": None, "b": None, "c": 1.0}


def test_a_script_says_that_nothing_was_learned_in_these_words():
    with pytest.raises(NothingLearned) as caught:
        check_reports(no_account(3))
    sentence, status = explain(caught.value)
    assert sentence.startswith("Nothing was learned: none of the 0 clients") and status == 1
