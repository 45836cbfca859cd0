"""Services that get a run's metrics: stand-ins for them and, where installed, themselves."""

import json
import math
import sys
import types

import pytest

from jaxfm.log import RunLog, read_metrics
from jaxfm.trackers import check_services


class Wandb(types.ModuleType):
    """Stands for the package: it notes what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, **how):
        run = types.SimpleNamespace(how=how, axes=[], lines=[], over=False)
        run.define_metric = lambda name, step_metric=None: run.axes.append((name, step_metric))
        run.log = run.lines.append
        run.finish = lambda: setattr(run, "over", True)
        self.runs.append(run)
        return run


class Client:
    """Stands for MlflowClient, whose store is one for all."""

    experiments, runs = {}, {}  # as a data base is shared

    def __init__(self, tracking_uri):
        self.uri = tracking_uri

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name, artifact_location=None):
        self.experiments[name] = types.SimpleNamespace(experiment_id="1", place=artifact_location)
        return "1"

    def create_run(self, experiment, run_name):
        own = f"run{len(self.runs)}"
        self.runs[own] = {"name": run_name, "params": {}, "lines": [], "over": False}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=own))

    def log_param(self, own, name, value):
        self.runs[own]["params"][name] = value

    def log_batch(self, own, metrics):
        self.runs[own]["lines"] += [(name, value, step) for name, value, _, step in metrics]

    def set_terminated(self, own):
        self.runs[own]["over"] = True


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module := Wandb())
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


@pytest.fixture
def mlflow(monkeypatch):
    for name, parts in (
        ("mlflow", {}),
        ("mlflow.entities", {"Metric": lambda *parts: parts}),
        ("mlflow.tracking", {"MlflowClient": Client}),
    ):
        module = types.ModuleType(name)
        module.__dict__.update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Client, "experiments", {})
    monkeypatch.setattr(Client, "runs", {})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Client


def play(folder, name):
    """A run that is stopped after three steps, and goes on after the second."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"rounds": 5, "data": {"source": "digits"}}))
    for first, last, resume in ((0, 3, None), (2, 5, 1)):
        with RunLog(folder, resume_step=resume, tensorboard=False, log_to=(name,)) as log:
            for step in range(first, last):
                log.write(step, {"train/loss": 1 / (1 + step), "worst": math.inf})


def test_a_run_has_one_name_with_weights_and_biases_and_goes_on_under_it(tmp_path, wandb):
    play(tmp_path / "demo", "wandb")
    first, second = wandb.runs
    assert first.how["id"] == second.how["id"]
    assert (first.how["resume"], second.how["resume"]) == (None, "allow")
    assert first.how["project"] == "jaxfm" and first.how["name"] == "demo"
    assert first.how["config"]["data"] == {"source": "digits"}
    assert ("*", "step") in first.axes and first.over and second.over
    steps = [line["step"] for run in wandb.runs for line in run.lines]
    assert steps == [0, 1, 2, 2, 3, 4]
    assert first.lines[1] == {"step": 1, "train/loss": 0.5, "worst": math.inf}
    play(tmp_path / "other", "wandb")
    assert wandb.runs[2].how["id"] != first.how["id"]


def test_a_run_has_one_name_with_mlflow_and_goes_on_under_it(tmp_path, mlflow):
    play(tmp_path / "demo", "mlflow")
    (run,) = mlflow.runs.values()
    assert run["params"] == {"rounds": "5", "data.source": "digits"} and run["over"]
    losses = [(step, value) for name, value, step in run["lines"] if name == "train/loss"]
    assert losses == [(step, 1 / (1 + step)) for step in (0, 1, 2, 2, 3, 4)]
    play(tmp_path / "other", "mlflow")
    assert len(mlflow.runs) == 2 and len(mlflow.experiments) == 1


def test_a_service_that_fails_is_left_out_and_the_run_goes_on(tmp_path, wandb, capsys):
    def fail(line):
        raise OSError("the network is down\nmore")

    with RunLog(tmp_path, tensorboard=False, log_to=("wandb",)) as log:
        wandb.runs[0].log = fail
        for step in range(3):
            log.write(step, {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 3
    said = capsys.readouterr().err
    assert said == "wandb takes no more metrics (the network is down); the run goes on.\n"


def test_what_is_missing_is_told_in_one_sentence(tmp_path, monkeypatch, wandb):
    with pytest.raises(ValueError, match=r"log_to='comet' is unknown; choose of wandb, mlflow"):
        check_services(["comet"])
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxfm\[mlflow\]'"):
        check_services(["mlflow"])
    monkeypatch.setattr(wandb, "init", lambda **how: 1 / 0)
    with pytest.raises(ValueError, match=r"log_to=wandb: the run could not be started there"):
        RunLog(tmp_path, tensorboard=False, log_to=("wandb",))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_services_themselves_take_a_run_without_a_network(tmp_path, monkeypatch, name):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "demo"
    play(folder, name)
    if name == "wandb":
        assert len([*folder.glob("wandb/offline-run-*/*.wandb")]) == 2
        return
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    number = client.get_experiment_by_name("jaxfm").experiment_id
    (run,) = client.search_runs([number])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {(m.step, m.value) for m in history} == {(s, 1 / (1 + s)) for s in range(5)}
