"""The registry: a new algorithm is one file, and its options are its own."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from laws import (
    LR,
    advance,
    alike,
    assert_same,
    examples,
    loss_gradient,
    population,
    setting,
    start,
)

import jaxfm.federated
from jaxfm.federated import Algorithm, compile_rounds, registry
from jaxfm.federated.registry import entries, find, load_named_files, make, register

NEW = '''
"""Federated averaging of a share of each movement."""
from jaxfm.federated import Algorithm, Local, fed_avg, moved, mean, register
from jaxfm.model import Model
from jaxfm.tasks import Task


@register
def fed_new(model: Model, task: Task, local: Local, *, share: float = 0.5) -> Algorithm:
    """Federated averaging with smaller steps.

    Args:
      share: of each movement that the server makes.
    """
    base = fed_avg(model, task, local)

    def server(state, totals, public, key):
        return state._replace(variables=moved(state.variables, mean(totals), share)), {}

    return base._replace(server=server)
'''


FAIR = '''
"""q-FedAvg: clients of larger loss count for more. Source: Li et al. 2020, algorithm 2."""
import jax
import jax.numpy as jnp
from jaxfm.federated import Algorithm, Exact, Local, Mean, difference, fed_avg, local_fit
from jaxfm.federated import objective, register, scaled
from jaxfm.model import Model
from jaxfm.tasks import Task


@register(breaks={"one_step": "A step is divided by a bound of the objective's curvature."})
def q_fed_avg(model: Model, task: Task, local: Local, *, q: float = 1.0, rate: float = 0.1
              ) -> Algorithm:
    """Federated averaging that is fairer.

    Args:
      q: how much more a large loss counts; 0: not at all.
      rate: learning rate of local training.
    """
    base, fit = fed_avg(model, task, local), local_fit(objective(model, task), local)

    def client(download, memory, data, profile, key):
        trained, info = fit(download, data, profile.max_steps, key)
        move = difference(trained, download)
        loss = info.loss_total / jnp.maximum(info.loss_count, 1)
        length = sum(jnp.vdot(x, x) for x in jax.tree.leaves(move.params)) / rate**2
        bound = q * loss ** (q - 1) * length + loss**q / rate
        upload = Mean(scaled(loss**q / rate, move), Exact(jnp.sign(info.examples) * bound))
        return upload, memory, info

    return base._replace(buckets=(base.buckets[0]._replace(client=client),))
'''


@pytest.fixture
def new_file(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setattr(registry, "_ENTRIES", dict(entries()))
    path = tmp_path / "fed_new.py"
    path.write_text(NEW)
    return path


def test_every_file_of_the_folder_registers_its_algorithm():
    folder = pathlib.Path(registry.__file__).parent / "algorithms"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files <= set(entries())
    for name, entry in entries().items():
        assert getattr(jaxfm.federated, name) is entry.factory
        assert entry.like is None or entry.like in entries()
        assert all(option.help for option in entry.options), name


def test_a_file_brings_an_algorithm_with_its_options(new_file):
    entry = find(str(new_file))
    assert [(option.name, option.default) for option in entry.options] == [("share", 0.5)]
    assert isinstance(make(entry, setting(), {"share": 0.1}), Algorithm)
    argv = load_named_files(["federate", f"--compare=fed_avg,{new_file}", "--seed=1"])
    assert argv == ["federate", "--compare=fed_avg,fed_new", "--seed=1"]


def test_an_algorithm_says_which_law_its_paper_breaks(tmp_path, monkeypatch):
    """The recipe of CONTRIBUTING, on one whose step is no gradient step by design."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(entries()))
    (tmp_path / "q_fed_avg.py").write_text(FAIR)
    entry = find(str(tmp_path / "q_fed_avg.py"))
    assert set(entry.breaks) == {"one_step"} <= set(registry.LAWS)
    counts = np.array([4, 0, 0, 0, 0, 0]), np.full(6, 4)
    people = [population("fed_avg", alike()._replace(count=n), max_steps=1) for n in counts]
    run = compile_rounds(make(entry, setting()), people[0], cohort_size=6)
    (one, _), (many, _) = (advance(run, each, 1) for each in people)
    assert_same(one, many)
    before = jax.tree.map(np.asarray, start().params)
    gradient = loss_gradient(before, {name: leaf[:4] for name, leaf in examples(24).items()})
    step = lambda name: (
        (one.server.variables.params[name]["kernel"] - before[name]["kernel"])
        / -gradient[name]["kernel"]
    )
    rates = np.concatenate([step(name)[gradient[name]["kernel"] != 0] for name in before])
    assert rates.std() < 1e-3 * rates.mean() < 0.9 * LR * 1e-3  # along the gradient, but shorter


def test_it_is_trained_from_the_command_line(tmp_path):
    """In one file, without another edit: with its own option, which --help explains."""
    path = tmp_path / "fed_new.py"
    path.write_text(NEW)
    command = [sys.executable, "-m", "jaxfm.launch.federate", f"--algorithm={path}"]
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--fed_new.share=0.5  (float)" in told and "movement that the server makes" in told
    ran = subprocess.run(
        [
            *command, "--fed_new.share=0.2", f"--run_dir={tmp_path / 'run'}", "--data=digits",
            "--data.num_clients=4", "--cohort_size=2", "--rounds=1", "--max_steps=1", "--local=sgd",
            "--model=mlp",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "test global/accuracy" in ran.stdout
    assert '"share": 0.2' in (tmp_path / "run" / "config.json").read_text()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find("fed_avgg"), "There is no algorithm 'fed_avgg'; choose one of adp, diloco"),
        (lambda: find("nowhere.py"), "There is no file nowhere.py"),
        (lambda: make(find("fed_prox"), setting(), {"nu": 1.0}), r"no option 'nu'; it has \['mu'"),
        (lambda: register(lambda model: None, breaks={"gravity": ""}), "no law 'gravity'"),
        (lambda: register(lambda model: None, taste=None), "has no parameter 'taste'"),
        (
            lambda: make(register(needy) and entries()["needy"], setting()),
            "needy needs 'luck', which a run does not offer; say where it comes from",
        ),
    ],
)
def test_what_is_refused(call, message, monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(entries()))
    with pytest.raises(ValueError, match=message):
        call()


# Variants have the options of what they vary: theirs are slow tests.
NUMBERS = [
    pytest.param(name, option.name, marks=[pytest.mark.slow] if entry.like else [])
    for name, entry in entries().items()
    for option in entry.options
    if option.annotation is float
]


@pytest.mark.parametrize("value", [float("nan"), -0.1])
@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_no_rate_weight_or_share_is_negative_or_nan(name, option, value):
    with pytest.raises(ValueError, match=rf"{option.removeprefix('distill_')}.*{value}"):
        make(find(name), setting(), {option: value})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("spatl", {"keep": 0.0}, r"keep=0\.0 must be a share above 0 and up to 1"),
        ("adp", {"keep": 0.0}, r"keep=0\.0 must be a share above 0 and up to 1"),
        ("fed_adam", {"learning_rate": 0.0}, r"learning_rate=0\.0 must be a number above 0"),
        ("fed_avg_m", {"momentum": 1.0}, r"momentum=1\.0 must be a number from 0 and below 1"),
        ("spatl", {"policy": "policy.safetensors"}, "requires select=agent"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(find(name), setting(), options)


def needy(model, luck):
    """Needs what no run has."""


def test_a_file_that_registers_nothing_is_refused(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("x = 1")
    with pytest.raises(ValueError, match=r"registers no algorithm; put @register"):
        find(str(path))


def test_a_setting_offers_tiers_as_architectures():
    models = setting().models
    shapes = [model.init(None).params["dense1"]["bias"].shape[0] for model in models]
    assert shapes == [8, 4, 2] and np.shape(setting().public_inputs) == (5, 6)
