"""Algorithms by name, on machines, and side by side."""

import dataclasses
import functools
import json

import chex
import jax
import numpy as np
import pytest

from jaxfm.config import override
from jaxfm.cost import num_bytes
from jaxfm.federated.accounting.resources import DEVICES
from jaxfm.federated.local import Local
from jaxfm.federated.placement import wanted_steps
from jaxfm.federated.population import Population
from jaxfm.federated.registry import entries, last_layer
from jaxfm.federated.rounds import compile_rounds
from jaxfm.federated.run import TrainedRun, summary
from jaxfm.launch import compare, federate
from jaxfm.launch.compare_page import best_cards
from jaxfm.launch.federate_config import FederateConfig
from jaxfm.launch.optimizers import OptimizerConfig
from jaxfm.launch.setup import DataConfig, ModelConfig, load_data
from jaxfm.log import read_metrics
from jaxfm.models.families.cnn import CnnConfig, cnn, mlp
from jaxfm.search import save_policy
from jaxfm.search.strategies.gnn_rl import init_policy
from jaxfm.trees import split_tree

DIGITS = DataConfig(source="digits", partition="iid", num_clients=6, public=0.1)
CNN = cnn(CnnConfig(image_size=(8, 8), conv_channels=(2, 2), dense_dim=4, num_classes=3))
PUBLISHED = {"raffm_published", "fed_kemf_published", "rafl_published"}
TIERED = {"hetero_fl", "fed_rolex", "raffm", "fed_md", "fed_kemf", "rafl"} | PUBLISHED
every_algorithm = pytest.mark.parametrize(
    "algorithm", [name for name, entry in entries().items() if not entry.adapted]
)


def small_run(folder, *options: str, **changes) -> FederateConfig:
    names = {changes.get("algorithm"), *changes.get("compare", ())}
    changes = ({"tiers": (1.0, 0.5)} if names & TIERED else {}) | changes
    base = FederateConfig(
        run_dir=str(folder), rounds=2, cohort_size=6, batch_size=16, max_steps=0,
        eval_every=1, profile=("pi", "phone"), data=DIGITS, model=ModelConfig(family="mlp"),
        local=OptimizerConfig(name="sgd", learning_rate=0.3),
    )  # fmt: skip
    return override(dataclasses.replace(base, **changes), *options)


@functools.cache
def on_two_machines(algorithm: str):
    """(data, model, a run before its first round): slow and fast clients in turn."""
    return federate.ready(small_run("nowhere", algorithm=algorithm, profile=("pi", "server")))


def steps_of(config, data, placement) -> np.ndarray:
    """i32[C], local steps of each client in a round."""
    wanted = wanted_steps(data.train, Local(None, config.batch_size, config.epochs))
    return np.minimum(wanted, np.asarray(placement.profiles.max_steps))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    config = small_run(tmp_path_factory.mktemp("run"), compare=("fed_avg", "fed_md"))
    federate.main(config)
    return config


def results_of(config, part):
    path = federate.pathlib.Path(config.run_dir) / "results.json"
    return json.loads(path.read_text())[part]


def test_a_comparison_tells_of_every_algorithm(compared):
    algorithms = results_of(compared, "compare")["algorithms"]
    assert list(algorithms) == ["fed_avg", "fed_md"]
    for name, part in algorithms.items():
        figures = {"global", "personal", "worst_decile", "megabytes", "hours", "joules"}
        assert set(part["figures"]) == figures - ({"global"} if name == "fed_md" else set())
        assert all(len(values) == 1 for values in part["figures"].values())
        assert len(part["clients"]) == 6
        assert part["clients"] == sorted(part["clients"])
        for axis in ("rounds", "megabytes", "hours"):
            xs = part["curves"]["personal"][axis]
            assert len(xs) == 3 and xs[0] == 0 and (np.diff(xs) > 0).all()
    assert algorithms["fed_md"]["curves"]["validation"]["values"] == []
    assert len(algorithms["fed_avg"]["curves"]["validation"]["values"]) == 3
    sent = {name: part["figures"]["megabytes"][0] for name, part in algorithms.items()}
    assert sent["fed_md"] < sent["fed_avg"]
    page = (federate.pathlib.Path(compared.run_dir) / "report.html").read_text()
    for text in ("fed_md", "simulated hours", "MB up and down", "share of clients"):
        assert text in page


def test_all_algorithms_see_the_same_clients(compared):
    def clients(name: str) -> list[tuple]:
        config = compare.one_of(compared, name, 0)
        return [
            (client["name"], client["examples"], client["machine"])
            for client in results_of(config, "federate")["clients"]
        ]

    assert clients("fed_avg") == clients("fed_md")


def test_what_has_ended_is_not_run_again(compared):
    def never(config):
        raise AssertionError(config.run_dir)

    before = results_of(compared, "compare")
    compare.compare(compared, never)
    assert results_of(compared, "compare") == before
    with pytest.raises(AssertionError, match="fed_avg-1"):
        compare.compare(dataclasses.replace(compared, seeds=2), never)


def test_a_round_takes_as_long_as_its_slowest_client(compared):
    """Every client is in every cohort: all rounds are alike, and the slow board sets the pace."""
    config = compare.one_of(compared, "fed_avg", 0)
    data, _, (_, _, placement) = federate.ready(config)
    (cost,) = placement.costs
    seconds, joules = [], 0.0
    for client, steps in enumerate(steps_of(config, data, placement).tolist()):
        device = DEVICES[config.profile[client % 2]]
        flops = steps * cost.flops_per_step
        seconds.append(
            cost.bytes_down / device.down_bytes_per_s
            + flops / device.flops_per_s
            + cost.bytes_up / device.up_bytes_per_s
        )
        joules += flops * device.joules_per_flop
        joules += (cost.bytes_down + cost.bytes_up) * device.joules_per_byte
    totals = results_of(config, "federate")["totals"]
    assert totals["seconds"] == pytest.approx(2 * max(seconds))
    assert totals["joules"] == pytest.approx(2 * joules)
    last = read_metrics(config.run_dir)[-1]
    assert last["total/seconds"] == totals["seconds"]


@every_algorithm
def test_every_algorithm_has_its_name(algorithm):
    data, _, (made, _, placement) = on_two_machines(algorithm)
    assert len(made.buckets) == (2 if algorithm in TIERED else 1)
    assert (steps_of(small_run("nowhere"), data, placement) > 0).all()


def test_an_agent_starts_from_the_policy_of_a_search(tmp_path):
    policy = init_policy(jax.random.key(4))
    save_policy(tmp_path / "policy.safetensors", policy)
    held = dataclasses.replace(DIGITS, local_validation=0.2)
    config = small_run(
        tmp_path / "run", "algorithm=spatl", "spatl.select=agent",
        f"spatl.policy={tmp_path / 'policy.safetensors'}", data=held, rounds=1,
    )  # fmt: skip
    data, _, (algorithm, variables, placement) = federate.ready(config)
    (cost,) = placement.costs
    assert cost.flops_per_round > 0 and data.local_validation is not None
    people = Population(data.train, placement.profiles, placement.bucket, data.local_validation)
    engine = compile_rounds(algorithm, people, cohort_size=config.cohort_size)
    state = engine.init(variables, jax.random.key(0))
    own = state.memories[0].selector.strategy.policy
    own = {name: np.asarray(x)[2] for name, x in own.items()}  # the third client's
    chex.assert_trees_all_equal(own | {"log_std": 0}, policy | {"log_std": 0})
    (tmp_path / "policy.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="--strategy=gnn_rl writes one"):
        federate.ready(config)


def test_what_travels_narrow_is_fewer_bytes(tmp_path):
    narrow = lambda **how: federate.ready(small_run(tmp_path, **how))[2].placement.costs[0]
    full = narrow()
    assert narrow(upload="4bit").bytes_up < full.bytes_up / 7
    assert narrow(upload="top_k", top_k=0.05).bytes_up < full.bytes_up / 10
    down = narrow(download="8bit")
    assert down.bytes_down < full.bytes_down / 3.8 and down.bytes_up == full.bytes_up


@every_algorithm
def test_the_full_model_is_the_same_for_every_algorithm(algorithm):
    data, model, (made, _, placement) = on_two_machines(algorithm)
    trained = TrainedRun(
        state=None, placement=placement, history=[],
        totals={"selected": 3.0, "reported": 2.0, "non_finite": 0.0, "absent": 1.0},
        test={}, buckets=[{"accuracy": float("nan")}] * len(made.buckets), clients={},
        failures=np.zeros(6, int),
    )  # fmt: skip
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    full = summary(trained, data, num_bytes((shapes.params, shapes.stats)))["full_model"]
    size = 4 * (64 * 200 + 200 + 200 * 10 + 10)
    assert full == {"bytes_down": 3 * size, "bytes_up": 2 * size}


@pytest.mark.parametrize("algorithm", ["hetero_fl", "scaffold"])
def test_tiers_are_measured_on_the_global_test_set_whatever_clients_keep(tmp_path, algorithm):
    config = small_run(tmp_path, algorithm=algorithm, upload="top_k", rounds=1)
    federate.main(config)
    results = results_of(config, "federate")
    assert results["tiers"][0]["accuracy"] == results["test"]["global/accuracy"]
    last = read_metrics(config.run_dir)[-1]
    assert ("validation/bucket1/accuracy" in last) == (algorithm == "hetero_fl")


@every_algorithm
def test_models_of_their_own_are_not_shared(algorithm):
    mine = {"fed_per", "lg_fed_avg", "spatl", "adp", "fed_md", "fed_kemf", "rafl"}
    mine |= {"fed_kemf_published", "rafl_published"}
    buckets = on_two_machines(algorithm)[2].algorithm.buckets
    assert {bucket.personal is not None for bucket in buckets} == {algorithm in mine}


@pytest.mark.parametrize("model", [mlp((4,) * 11 + (3,)), CNN], ids=["mlp", "cnn"])
def test_the_last_layer_is_the_one_that_makes_the_classes(model):
    variables = jax.eval_shape(model.init, jax.random.key(0))
    shared, last = split_tree(variables.params, last_layer(model))
    (layer,) = last.values()
    assert layer["kernel"].shape[-1] == 3 and len(shared) == len(variables.params) - 1


def test_slow_machines_get_the_smaller_model():
    assert on_two_machines("hetero_fl")[2].placement.bucket.tolist() == [1, 0, 1, 0, 1, 0]


def test_where_all_train_one_model_slow_machines_do_less_of_it(tmp_path):
    config = small_run(tmp_path, profile=("pi", "server"))
    data, _, (_, _, placement) = federate.ready(config)
    (cost,), slow = placement.costs, DEVICES["pi"]
    wire = cost.bytes_down / slow.down_bytes_per_s + cost.bytes_up / slow.up_bytes_per_s
    deadline = wire + 2.5 * cost.flops_per_step / slow.flops_per_s
    rushed = federate.ready(dataclasses.replace(config, deadline_s=deadline))[2].placement
    steps = steps_of(config, data, rushed).tolist()
    assert steps == [2, steps_of(config, data, placement)[1]] * 3
    assert np.asarray(rushed.profiles.max_steps).tolist() == steps


def test_curves_are_means_over_seeds():
    def one(shift: float):
        lines = [
            {"step": n, "personal/accuracy": n + shift, "total/bytes_up": 1e6 * n * shift,
             "total/bytes_down": 0.0, "total/seconds": 3600.0 * n}
            for n in (0, 1, 2)
        ]  # fmt: skip
        results = {
            "test": {"personal/accuracy": shift, "worst_decile/accuracy": 0.0},
            "totals": {"bytes_up": 2e6, "bytes_down": 1e6, "seconds": 1800.0, "joules": 7.0},
            "clients": [{"test": {"accuracy": shift}}, {"test": {"accuracy": None}}],
        }
        return results, [*lines, {"step": 3}]

    part = compare.summary([one(1.0), one(3.0)])
    assert part["figures"]["personal"] == [1.0, 3.0]
    assert part["figures"]["megabytes"] == [3.0, 3.0]
    assert part["figures"]["hours"] == [0.5, 0.5]
    assert part["clients"] == [1.0, 3.0]
    assert part["curves"]["personal"] == {
        "rounds": [0, 1, 2], "megabytes": [0, 2, 4], "hours": [0, 1, 2], "values": [2, 3, 4],
    }  # fmt: skip
    assert compare.plus_minus([1.0, 3.0]) == "2 ± 1.4"
    assert compare.plus_minus([1.0]) == "1"
    assert compare.plus_minus([724.9, 724.9 + 1.2e-13, 724.9]) == "724.9 ± 0"


def test_cards_name_who_comes_first():
    figures = lambda score, sent: {"figures": {"personal": [score], "megabytes": [sent]}}
    part = {"algorithms": {"large": figures(0.9, 5.0), "small": figures(0.8, 1.0)}}
    first = lambda lower: [(card.value, card.note) for card in best_cards(part, lower)]
    assert first(False) == [("large", "0.9; higher is better"), ("small", "1; lower is better")]
    assert first(True) == [("small", "0.8; lower is better"), ("small", "1; lower is better")]


def test_public_and_held_rows_belong_to_nobody_else():
    plain = load_data(dataclasses.replace(DIGITS, public=0.0), seed=0)
    data = load_data(dataclasses.replace(DIGITS, public=0.2, local_validation=0.2), seed=0)
    assert plain.public is None and plain.local_validation is None
    assert set(data.public) == {"image"}
    parts = (data.train, data.local_validation, data.local_test)
    rows = [f.rows_of(c) for f in parts for c in range(6)]
    rows = np.concatenate(rows)
    assert len(set(rows.tolist())) == len(rows) == len(data.train.examples["label"])
    whole = len(plain.train.examples["label"])
    assert len(data.public["image"]) == round(0.2 * whole) == whole - len(rows)
    kept = {image.tobytes() for image in data.train.examples["image"]}
    public = {image.tobytes() for image in data.public["image"]}
    assert len(kept & public) <= 2  # the set has two pairs of equal images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare": ("fed_avg", "fed_sgd")}, "fed_sgd"),
        ({"profile": ("toaster",)}, "must name some of pi"),
        ({"profile": (), "deadline_s": 1.0}, "requires --profile"),
        ({"seeds": 0}, "seeds=0: give at least 1"),
        ({"upload": "3bit"}, "3bit"),
        ({"top_k": 0.0}, "top_k=0.0: give a share"),
        ({"top_k": 0.2}, "top_k=0.2 changes nothing: give --upload=top_k"),
        ({"seeds": 2}, "seeds=2 changes nothing without --compare"),
        ({"seed": -1}, "seed=-1: give at least 0"),
    ],
)
def test_comparisons_refuse_what_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small_run(tmp_path, **changes)


@pytest.mark.parametrize("algorithm", ["spatl", "fed_avg,spatl"])
def test_an_agent_needs_validation_rows(tmp_path, algorithm):
    chosen = "compare" if "," in algorithm else "algorithm"
    with pytest.raises(ValueError, match=r"--data\.local_validation"):
        small_run(tmp_path, f"{chosen}={algorithm}", "spatl.select=agent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("compare=fed_avg,fed_md", "data.public=0.0"), "--data.public"),
        (("compare=fed_avg,fed_df", "data.public=0.0"), "--data.public"),
        (("compare=fed_avg,fed_md", "upload=top_k"), "uploads predictions"),
        (("compare=fed_avg,spatl", "spatl.policy=policy.safetensors"), "requires select=agent"),
        (("compare=fed_avg,fed_prox", "fed_prox.mu=-1.0"), "mu=-1.0 must be"),
    ],
)
def test_a_comparison_refuses_what_one_of_its_algorithms_cannot_do_before_any_runs(
    tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        federate.main(small_run(tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


def test_predictions_may_be_rounded(tmp_path):
    """Their small entries matter as much as the others, so they are never left out for later."""
    config = small_run(tmp_path, algorithm="fed_md")
    costs = lambda **how: federate.ready(dataclasses.replace(config, **how))[2].placement.costs
    assert costs(upload="8bit")[0].bytes_up < costs()[0].bytes_up / 3


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (OptimizerConfig, {"momentum": 0.9}, r"momentum=0\.9 changes nothing with adam"),
        (DataConfig, {"shards_per_client": 3}, "shards_per_client=3 changes nothing: give"),
        (DataConfig, {"beta": 0.1, "partition": "iid"}, r"data\.beta=0\.1 changes nothing with"),
        (DataConfig, {"writers": "folder"}, "is read for data.source=mnist only"),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_test": 0.9999}, r"Holding out 0\.9999 of each client's rows leaves nothing"),
        ({"num_clients": 100_000_000}, "100000000 clients"),
    ],
)
def test_data_that_cannot_be_dealt_out_so_are_refused_before_work(options, message):
    with pytest.raises(ValueError, match=message):
        load_data(dataclasses.replace(DIGITS, public=0.0, **options), 0)


def test_curves_leave_out_what_is_not_finite():
    seeds = [[{"step": 0, "a": np.inf}, {"step": 1, "a": 2.0}], [{"step": 0, "a": 1.0}] * 2]
    curve = compare._mean_curves(seeds, "a")
    assert curve["rounds"] == [0.5] and curve["values"] == [1.5]


def test_shares_of_the_data_are_shares():
    with pytest.raises(ValueError, match=r"data\.public=1\.0: give a share"):
        DataConfig(source="digits", public=1.0)
