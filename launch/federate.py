"""Trains a model over clients whose data stay where they are.

    python -m jaxfm.launch.federate
    python -m jaxfm.launch.federate --algorithm=hetero_fl --tiers=1.0,0.5,0.25
    python -m jaxfm.launch.federate --algorithm=spatl --spatl.keep=0.5 --data=digits --local=sgd
    python -m jaxfm.launch.federate --algorithm=my_algorithm.py --data=digits
    python -m jaxfm.launch.federate --model=resnet20 --data=cifar10 --data.folder=cifar10.npz \
        --local=sgd
    python -m jaxfm.launch.federate --model=path/to/bert --data.source=reviews.csv
    python -m jaxfm.launch.federate --init=runs/first/model --data=digits --local=sgd
    python -m jaxfm.launch.federate --phases=central:200,federated:30 --data.public=0.2 \
        --algorithm=diloco
    python -m jaxfm.launch.federate --compare=fed_avg,scaffold,hetero_fl --seeds=3 \
        --profile=pi,phone,laptop --local=sgd

The first federates a byte-level language model over the largest packages of the standard library;
the last runs three algorithms side by side on the same data, clients and cohorts. Each algorithm
has options of its own, which --help shows for the chosen one.

A run folder holds the config, metrics (JSONL and TensorBoard), checkpoints, report.html and the
trained model in model/: in Hugging Face format where it has one, else as `jaxfm.hub.load` reads it.
Another run starts from it by --init. The same command continues a stopped run. The validation split
is watched; the test split is looked at once, at the end.
"""

from __future__ import annotations

import functools
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax

from jaxfm import config as configs
from jaxfm import federated
from jaxfm.cost import num_bytes
from jaxfm.data.dealing import Data
from jaxfm.errors import reported
from jaxfm.federated import Local, Prepared, TrainedRun, fleet, prepare
from jaxfm.federated.foundation import Central, alternate, phases_of
from jaxfm.federated.local import UNLIMITED_STEPS
from jaxfm.federated.outcome import NothingLearned
from jaxfm.federated.placement import capped_epochs, describe_clients
from jaxfm.federated.registry import load_named_files
from jaxfm.federated.run import summary
from jaxfm.federated.tensor import clients_mesh
from jaxfm.launch.adapters import adapted
from jaxfm.launch.compare import compare, one_of
from jaxfm.launch.cores import use_cores
from jaxfm.launch.federate_config import federate_config
from jaxfm.launch.optimizers import make_optimizer
from jaxfm.launch.report import write_report
from jaxfm.launch.saving import export, save
from jaxfm.launch.setup import load_data, make_model, save_classes
from jaxfm.launch.wrapping import wrapped
from jaxfm.model import Model, count_parameters
from jaxfm.models.by_name import width_axes
from jaxfm.options import chosen_options
from jaxfm.run_folder import in_folder, open_run, save_results
from jaxfm.trackers import check_services

_load = functools.lru_cache(maxsize=1)(load_data)  # a comparison reads the same data in turn


def ready(config: Any, data: Data | None = None) -> tuple[Data, Model, Prepared]:
    """The data (of the config, unless others are given), the full model, and the prepared run."""
    data = _load(config.data, config.seed, config.model) if data is None else data
    model = adapted(config.adapter, make_model(config.model, data), data)
    prepared = prepare(
        config.algorithm,
        model,
        data,
        local_training(config),
        num_rounds=config.rounds,
        options=chosen_options(config, "algorithm"),
        wrap=wrapped(config, len(data.names), data),
        widths=config.tiers,
        axes=width_axes(model),
        machines=fleet(config.profile, len(data.names)) if config.profile else None,
        deadline_s=math.inf if config.asynchronous.buffer else config.deadline_s or None,
        max_steps=config.max_steps or UNLIMITED_STEPS,
        seed=config.seed,
    )
    return data, model, prepared


def local_training(config: Any) -> Local:
    """How clients train."""
    private = config.examples.gradients()
    return Local(
        make_optimizer(config.local), config.batch_size, config.epochs, private, config.microbatch
    )


def train(config: Any, data: Data, model: Model, prepared: Prepared) -> TrainedRun:
    """All rounds; the run's figures are saved for its report."""
    print(describe_clients(prepared.placement, data))
    print(
        f"{count_parameters(prepared.variables.params):,} parameters on {len(jax.devices())} "
        "devices"
    )
    local = local_training(config)
    if sentence := capped_epochs(prepared.placement, data.train, local):
        print(sentence)
    settings: dict[str, Any] = {
        "cohort_size": config.cohort_size,
        "seed": config.seed,
        "drop_rate": config.drop_rate,
        "byte_budget": config.byte_budget or None,
        "eval_every": config.eval_every,
        "eval_examples": config.eval_examples,
        "test_examples": config.test_examples,
        "run_dir": config.run_dir,
        "log_to": config.log_to,
        "mesh": clients_mesh(config.tensor),
        "clients_at_once": config.clients_at_once or None,
    }
    targets: dict[str, float] = {}
    if config.phases:
        rows = config.central_batch or config.cohort_size * config.batch_size
        central = Central(make_optimizer(config.local), rows)
        schedule = phases_of(config.phases)
        result, targets = alternate(prepared, data, schedule, central=central, **settings)
        print(f"Losses were taken over {_said(targets)}.")
    else:
        settings["clock"] = config.asynchronous.clock(len(data.names), config.seed)
        result = federated.train(prepared, data, num_rounds=config.rounds, **settings)
    root = model if model.adapter is None else model.adapter.root  # what it would be without
    full = jax.eval_shape(root.init, jax.random.key(0))
    part = summary(result, data, num_bytes((full.params, full.stats)), config.profile)
    save_classes(pathlib.Path(config.run_dir), data)
    part["examples"] = config.examples.report(
        prepared, data, local, result.state, config.cohort_size
    )
    part["full_model"]["parameters"] = count_parameters(full.params)
    part |= {"phases": list(config.phases), "targets": targets}
    save_results(pathlib.Path(config.run_dir), "federate", facts(config, prepared) | part)
    return result


def _said(targets: Mapping[str, float]) -> str:
    """ "1,024 targets in central phases and 512 in federated ones"."""
    central, private = targets["central"], targets["federated"]
    return f"{central:,.0f} targets in central phases and {private:,.0f} in federated ones"


def facts(config: Any, prepared: Prepared) -> dict[str, Any]:
    """What a page says of a run before its figures."""
    algorithm = prepared.algorithm
    return {
        "rounds": config.rounds,
        "cohort_size": config.cohort_size,
        "algorithm": config.algorithm,
        "data": config.data.source,
        "partition": config.data.partition,
        "is_personal": algorithm.is_personal is not None or algorithm.model is None,
    }


def run(config: Any) -> pathlib.Path:
    """One algorithm with one seed; returns the path of its report.

    Raises:
      NothingLearned: as `jaxfm.federated.train`; the report says so, too.
    """
    run_dir = open_run(config, config.run_dir)
    data, model, prepared = ready(config)
    try:
        result = train(config, data, model, prepared)
    except NothingLearned as error:
        save_results(run_dir, "stopped", {"algorithm": config.algorithm, "why": str(error)})
        print(f"report: {write_report(run_dir)}")
        raise
    for name, value in result.test.items():
        print(f"test {name}: {value:.4f}")
    save(prepared, result, data, config.model.folder, run_dir)
    if config.export:
        export(config, prepared, result, data, run_dir)
    return write_report(run_dir)


def main(config: Any) -> None:
    """The whole run, or all of a comparison, with a report at the end."""
    check_services(config.log_to)
    use_cores(config.cohort_size)
    what = "compare" if config.compare else config.algorithm
    config = in_folder(config, "federate", what, config.data.source)
    for name in config.compare:
        ready(one_of(config, name, config.seed))  # raises before the first of them has run
    print(f"report: {compare(config, run) if config.compare else run(config)}")


if __name__ == "__main__":
    with reported("--traceback" in sys.argv):
        sys.argv = load_named_files(sys.argv)
    configs.run(main, federate_config(), joins=True)
