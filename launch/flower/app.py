"""The two halves of a Flower app that runs a config of `jaxfm.launch.federate`."""

from __future__ import annotations

import importlib
import pathlib
import shlex
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, cast

from absl import flags

from jaxfm import config as configs
from jaxfm.federated.remote import standalone
from jaxfm.trackers import check_services

PACKAGE = "jaxfm_app"
VARIABLES = "variables.safetensors"  # of the trained model, in the run's folder
_COPIED = {  # what a client's process needs, so that it need not import the library
    **dict.fromkeys(("remote.standalone", "remote.masked"), "."),
    **{f"secure.{name}": "secure" for name in ("client", "keys", "messages", "shamir", "texts")},
}
FORM = "form.json"  # what rows look like, where clients have their own
_CARRIED = "carried_"  # before the name of a file that travels with the app
_PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "jaxfm-app"
version = "1.0.0"
description = "A federated run of jaxfm."
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "jaxfm"

[tool.flwr.app.components]
serverapp = "jaxfm_app.server:app"
clientapp = "jaxfm_app.client:app"

[tool.flwr.app.config]
flags = {flags}
round_s = {round_s}
hello_s = {hello_s}
nodes = {nodes}
own_rows = {own_rows}
"""
_SERVER = '''"""The server of the run."""

from jaxfm.launch.flower.app import server_app

app = server_app()
'''
_CLIENT = '''"""A client of the run; only its first message needs the library."""

from jaxfm_app.standalone import client_app


def prepare(folder, order, context):
    """Exports the client's step."""
    from jaxfm.launch.flower.app import prepare_client

    prepare_client(folder, order, context)


app = client_app(prepare)
'''


def write_app(
    folder: pathlib.Path,
    words: list[str],
    limits: Mapping[str, float],
    own_rows: Sequence[int] = (),
) -> None:
    """Writes a Flower app whose flags of `jaxfm.launch.federate` are `words`.

    Args:
      folder: of the app; files of an earlier one are replaced.
      words: the flags.
      limits: as of `flower.Limits`, by name.
      own_rows: as of `jaxfm.launch.flower.own_data`; (): the run's data are dealt out.
    """
    from jaxfm.launch.flower.own_data import server_data

    config = read_flags(words)
    _check(config)
    form = server_data(config, own_rows)[0] if own_rows else None
    package = folder / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    words = [_carried(word, package) for word in words]
    rows = _quoted(",".join(map(str, own_rows)))
    text = _PYPROJECT.format(flags=_quoted(shlex.join(words)), own_rows=rows, **limits)
    (folder / "pyproject.toml").write_text(text)
    (package / FORM).unlink(missing_ok=True)
    if form is not None:
        (package / FORM).write_text(form.to_json())
    (package / "__init__.py").write_text('"""A federated run."""\n')
    (package / "server.py").write_text(_SERVER)
    (package / "client.py").write_text(_CLIENT)
    for name, place in _COPIED.items():
        source = importlib.import_module(f"jaxfm.federated.{name}").__file__ or ""
        text = pathlib.Path(source).read_text()
        text = text.replace("jaxfm.federated.remote", PACKAGE)
        text = text.replace("jaxfm.federated.secure", f"{PACKAGE}.secure")
        path = package / place / f"{name.rpartition('.')[2]}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (package / "secure" / "__init__.py").write_text('"""Secure sums."""\n')


def _carried(word: str, package: pathlib.Path) -> str:
    """A flag whose file of an algorithm travels with the app."""
    name, _, value = word.partition("=")
    if name.lstrip("-") != "algorithm" or not value.endswith(".py"):
        return word
    file = pathlib.Path(value)
    shutil.copyfile(file, package / f"{_CARRIED}{file.name}")
    return f"{name}={_CARRIED}{file.name}"


def _package() -> pathlib.Path:
    """The folder of the app's package, in a process of the app."""
    return pathlib.Path(importlib.import_module(PACKAGE).__file__ or "").parent


def flags_of(run_config: Mapping[str, Any]) -> Any:
    """The config that an app's "flags" describe, in a process of the app."""
    package = _package()
    words = shlex.split(str(run_config["flags"]))
    return read_flags([word.replace(f"={_CARRIED}", f"={package / _CARRIED}") for word in words])


def _quoted(text: str) -> str:
    """A string of TOML."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def read_flags(words: list[str]) -> Any:
    """The config of `jaxfm.launch.federate` that flags describe; raises ValueError."""
    from jaxfm.federated.registry import load_named_files
    from jaxfm.launch.federate_config import federate_config

    argv = load_named_files(["federate", *words])
    cls, own = federate_config(), flags.FlagValues()
    configs.define_flags(cls, own)
    return configs.read_command(cls, argv, own)


def _check(config: Any) -> None:
    """Refuses options that only a simulation has, and services that are not installed here."""
    check_services(config.log_to)
    for name in ("compare", "phases", "drop_rate", "byte_budget", "clients_at_once", "tensor"):
        value = getattr(config, name)
        if value != type(config).__dataclass_fields__[name].default:
            raise ValueError(
                f"{name}={value} is for simulations and changes nothing for real clients; leave "
                f"out --{name}."
            )


def server_app() -> Any:
    """A Flower ServerApp that plays the run that its config's "flags" describe."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        play_on(grid, context.run_config)

    return app


def play_on(grid: Any, run_config: Mapping[str, Any]) -> None:
    """Plays the run over a grid; its folder gets metrics, refusals, results and the model."""
    from jaxfm.federated.remote.flower import Limits, Nodes, grid_exchange, wait_for
    from jaxfm.federated.remote.run import serve
    from jaxfm.federated.remote.trees import flat
    from jaxfm.launch.federate import ready
    from jaxfm.launch.flower.own_data import server_data
    from jaxfm.launch.saving import export, save
    from jaxfm.run_folder import in_folder, open_run, save_results

    config = flags_of(run_config)
    config = in_folder(config, "flower", config.algorithm, config.data.source)
    run_dir = open_run(config, config.run_dir)
    rows = _own_rows(run_config)
    data, _, prepared = ready(config, server_data(config, rows)[1] if rows else None)
    limits = Limits(*(type(x)(run_config[name]) for name, x in Limits()._asdict().items()))
    nodes = Nodes(grid, len(data.names))
    wait_for(nodes, limits)
    result = serve(
        prepared, data, grid_exchange(grid, nodes, limits), num_rounds=config.rounds,
        cohort_size=config.cohort_size, seed=config.seed, eval_every=config.eval_every,
        eval_examples=config.eval_examples, test_examples=config.test_examples, run_dir=run_dir,
        log_to=config.log_to,
    )  # fmt: skip
    if result.ended:
        print(result.ended)
    for name, value in result.test.items():
        print(f"test {name}: {value:.4f}")
    refused = [{"round": number, **one._asdict()} for number, one in result.refused]
    results = {"test": result.test, "totals": result.totals, "round_s": result.round_s}
    results |= _cost_in_privacy(config, prepared, data, result.state.run)
    save_results(run_dir, "flower", results | {"refused": refused})
    variables = flat("variables", result.state.run.server.variables)
    standalone.save_arrays(run_dir / VARIABLES, variables)
    save(prepared, cast(Any, result), data, config.model.folder, run_dir)
    if config.export:
        export(config, prepared, cast(Any, result), data, run_dir)


def _cost_in_privacy(config: Any, prepared: Any, data: Any, state: Any) -> dict[str, Any]:
    """What the rounds have cost the privacy of clients and of examples, printed and by name."""
    from jaxfm.launch.federate import local_training

    privacy = prepared.algorithm.privacy
    found: dict[str, Any] = {}
    if privacy is not None:
        found["privacy"] = privacy.report(int(state.server.released))
        print(f"epsilon of clients: {privacy.spent(int(state.server.released)):.4g}")
    local = local_training(config)
    if spent := config.examples.report(prepared, data, local, state, config.cohort_size):
        found["examples"] = spent
        print(f"epsilon of examples, at most: {spent['largest']:.4g}")
    return found


def _own_rows(run_config: Mapping[str, Any]) -> tuple[int, ...]:
    """Rows of clients with data of their own; () where the run's data are dealt out."""
    return tuple(int(word) for word in str(run_config.get("own_rows", "")).split(",") if word)


def prepare_client(folder: pathlib.Path, order: Mapping[str, Any], context: Any) -> None:
    """Exports a client's step into its folder, from the run's flags and the client's own rows."""
    from jaxfm.federated.remote.site import prepare_site
    from jaxfm.launch.flower.own_data import client_of_node, form_of

    config, rows = flags_of(context.run_config), _own_rows(context.run_config)
    file = context.node_config.get("data")
    if rows:
        form = form_of((_package() / FORM).read_text())
        client = client_of_node(form, config, rows, file, order["client"])
    else:
        client = dealt_client(config, file, order["client"])
    prepare_site(folder, client, order["bucket"])


def dealt_client(config: Any, file: Any, number: int) -> Any:
    """A client whose rows are those that the run deals out to it; raises Refusal."""
    from jaxfm.federated.client import client_data
    from jaxfm.federated.remote.run import population_of
    from jaxfm.federated.remote.site import Client
    from jaxfm.launch.federate import ready

    if file:
        raise standalone.Refusal(
            "It has data of its own, and the run, served without --own_rows, others."
        )
    data, _, prepared = ready(config)
    own = client_data(population_of(prepared, data), number)
    secret = config.examples.gradients() is not None
    return Client(prepared.algorithm, prepared.variables, *own, data.public, secret)
