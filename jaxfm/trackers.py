"""Metrics of a run for a service that keeps curves of many runs: Weights & Biases, MLflow.

    with RunLog("runs/demo", log_to=("wandb",)) as log: ...

Where they go is the service's own setting: WANDB_MODE=offline keeps them in the run's folder, as
does MLflow without MLFLOW_TRACKING_URI. A run that goes on after a stop goes on there, too: its
name with each service lies in the folder (trackers.json). A service that fails while a run goes on
is left out from there on, with one sentence.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

SERVICES = ("wandb", "mlflow")
PROJECT = "jaxfm"
_FILE = "trackers.json"
_MLFLOW_BATCH = 1000  # metrics of a request


class Tracker(NamedTuple):
    """One run with one service.

    Attributes:
      write: `(step, metrics) -> None`, of floats.
      close: `() -> None`.
    """

    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def check_services(names: Sequence[str]) -> None:
    """Refuses services that are unknown or whose package is not installed, before a run begins.

    Raises:
      ValueError, ModuleNotFoundError: one sentence.
    """
    for name in names:
        if name not in SERVICES:
            raise ValueError(f"log_to={name!r} is unknown; choose of {', '.join(SERVICES)}.")
        _package(name)


def open_tracker(name: str, folder: pathlib.Path, *, goes_on: bool) -> Tracker:
    """A tracker of the run in a folder, whose config.json, where there is one, it is given.

    Args:
      name: of SERVICES.
      folder: of the run.
      goes_on: whether the run goes on from an earlier process, and its curve with it.
    Raises:
      ValueError, ModuleNotFoundError: as of `check_services`; the service does not take the run.
    """
    check_services([name])
    known = _known(folder) if goes_on else {}
    start = _start_wandb if name == "wandb" else _start_mlflow
    try:
        tracker, own = start(folder, _settings(folder), known.get(name, ""))
    except Exception as error:  # of a library below, of whatever type
        raise ValueError(
            f"log_to={name}: the run could not be started there ({type(error).__name__}: "
            f"{_line(error)}); mend its settings, or leave out --log_to={name}."
        ) from error
    (folder / _FILE).write_text(json.dumps(_known(folder) | {name: own}))
    return _patient(name, tracker)


def _patient(name: str, tracker: Tracker) -> Tracker:
    """A tracker whose first failure is said and ends it, and not the run."""
    works = [True]

    def guarded(call: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            if not works[0]:
                return
            try:
                call(*args)
            except Exception as error:  # of a library below, of whatever type
                works[0] = False
                sentence = f"{name} takes no more metrics ({_line(error)}); the run goes on."
                print(sentence, file=sys.stderr, flush=True)

        return run

    return Tracker(guarded(tracker.write), guarded(tracker.close))


def _start_wandb(
    folder: pathlib.Path, settings: Mapping[str, Any], known: str
) -> tuple[Tracker, str]:
    wandb = _package("wandb")
    own = known or uuid.uuid4().hex[:12]
    project = {} if os.environ.get("WANDB_PROJECT") else {"project": PROJECT}
    run = wandb.init(
        **project, dir=str(folder), id=own, name=folder.name, config=dict(settings),
        resume="allow" if known else None, reinit="create_new",
    )  # fmt: skip
    # A step of its own: the service's only grows, and a run that goes on may repeat some.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return Tracker(lambda step, line: run.log({"step": step, **line}), run.finish), own


def _start_mlflow(
    folder: pathlib.Path, settings: Mapping[str, Any], known: str
) -> tuple[Tracker, str]:
    _package("mlflow")
    entities = importlib.import_module("mlflow.entities")
    tracking = importlib.import_module("mlflow.tracking")
    uri, place = os.environ.get("MLFLOW_TRACKING_URI", ""), None
    if not uri:  # a data base in the run's folder, and artifacts beside it
        uri = f"sqlite:///{(folder / 'mlflow.db').absolute()}"
        place = (folder / "mlruns").absolute().as_uri()
    client = tracking.MlflowClient(tracking_uri=uri)
    own = known
    if not own:
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = client.get_experiment_by_name(project)
        number = (
            client.create_experiment(project, artifact_location=place)
            if found is None
            else found.experiment_id
        )
        own = client.create_run(number, run_name=folder.name).info.run_id
        for name, value in _flat(settings).items():
            client.log_param(own, name, value)

    def write(step: int, line: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [entities.Metric(name, value, now, step) for name, value in line.items()]
        for first in range(0, len(metrics), _MLFLOW_BATCH):
            client.log_batch(own, metrics=metrics[first : first + _MLFLOW_BATCH])

    return Tracker(write, lambda: client.set_terminated(own)), own


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"log_to={name} needs a package that is not installed ({error}): "
            f"pip install 'jaxfm[{name}]'."
        ) from None


def _known(folder: pathlib.Path) -> dict[str, str]:
    path = folder / _FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Settings by their full names, as flags are called."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[before + name] = str(value)
    return found


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
