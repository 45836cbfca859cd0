"""Real clients over Flower: the simulation's numbers, at what cost, and what they cannot get in.

    python benchmarks/flower.py [--quick]

A SuperLink and SuperNodes on loopback, each a process of its own, play a run of every algorithm
named, and `train` plays the same run in this process. Then one client answers with each kind of
bad reply in turn. The last line is one JSON object:

  flower_equals_simulation     whether all trained variables agree to 1e-6, and by how much not
  flower_overhead_s_per_round  seconds of a round over Flower less those of a simulated one; the
                               median of rounds after the first, which exports the clients' steps
  second_message_s             of a client's process that finds its step exported: seconds by the
                               clock and of the processor, from the start of Python to the reply
  bad_clients_refused          kinds of bad replies of which each was refused with a reason, while
                               the round went on without it, to the same numbers bit for bit

Without Flower (`pip install jaxfm[flower]`) only the last is measured.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from jaxfm import config as configs
from jaxfm.config import check, check_whole, option
from jaxfm.federated.client import client_data
from jaxfm.federated.remote.bad_replies import KINDS
from jaxfm.federated.remote.in_process import in_process
from jaxfm.federated.remote.run import population_of, remote_of
from jaxfm.federated.remote.server import play_round, start
from jaxfm.federated.remote.site import Client, prepare_site
from jaxfm.federated.remote.standalone import load_arrays, save_arrays
from jaxfm.federated.remote.trees import flat
from jaxfm.federated.run import set_up
from jaxfm.launch.federate import ready
from jaxfm.launch.flower.app import VARIABLES, read_flags
from jaxfm.launch.flower.join import JoinConfig, joined
from jaxfm.launch.flower.processes import free_port
from jaxfm.launch.flower.serve import ServeConfig, listening, make_app, submit
from jaxfm.parallel.mesh import make_mesh
from jaxfm.run_folder import load_results

BAD = 1  # the client that sends bad replies
# One message from start to reply, without a network: what a SuperNode starts, less its transport.
MESSAGE = """
import json, os, pathlib, sys
import flwr.clientapp, flwr.app
sys.path.insert(0, {app!r})
from jaxfm_app import client, standalone
order = json.loads(pathlib.Path({order!r}).read_text())
arrays = standalone.load_arrays(pathlib.Path({arrays!r}))
root = pathlib.Path({root!r})
standalone.use_cache(standalone._folder(order, root) / "xla")
standalone.answer(order, standalone.pack(arrays), root, None)
assert "jaxfm" not in sys.modules
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    quick: bool = option(False, "two clients, two rounds of FedAvg: about a minute on idle cores")
    clients: int = option(4, "SuperNodes")
    rounds: int = option(5, "rounds of each run")
    algorithms: tuple[str, ...] = option(("fed_avg", "scaffold"), "of the registry")
    flags: tuple[str, ...] = option(
        ("--data=digits", "--local=sgd", "--model=mlp"), "of jaxfm.launch.federate"
    )

    def __post_init__(self):
        check(self)
        check_whole(self, {"clients": 2, "rounds": 2})


def words_of(config: Config, algorithm: str, run_dir: pathlib.Path) -> list[str]:
    """The flags of a run."""
    return [
        *config.flags, f"--algorithm={algorithm}", f"--data.num_clients={config.clients}",
        f"--cohort_size={config.clients}", f"--rounds={config.rounds}", f"--run_dir={run_dir}",
        f"--eval_every={config.rounds}",
    ]  # fmt: skip


def simulated(words: list[str]) -> tuple[dict[str, np.ndarray], float]:
    """The trained variables of a simulation, and seconds a round after the first."""
    config = read_flags(words)
    data, _, prepared = ready(config)
    seconds = []
    setup = set_up(
        prepared, data, cohort_size=config.cohort_size, seed=config.seed,
        mesh=make_mesh(clients=1),
    )  # fmt: skip
    state = setup.state
    for _ in range(config.rounds):
        before = time.perf_counter()
        state, _ = setup.engine.run(state)
        jax.block_until_ready(state.server)
        seconds.append(time.perf_counter() - before)
    return flat("variables", state.server.variables), statistics.median(seconds[1:])


def over_flower(config: Config, folder: pathlib.Path) -> dict[str, Any]:
    """Runs over real processes beside simulations of them."""
    port, largest, rounds, rows = free_port(), 0.0, [], {}
    serve = ServeConfig(folder=str(folder / "server"), port=port, clients=config.clients)
    join = JoinConfig(tuple(range(config.clients)), f"127.0.0.1:{port}", str(folder / "clients"))
    with listening(serve) as home, joined(join):
        for algorithm in config.algorithms:
            words = words_of(config, algorithm, folder / algorithm)
            if submit(home, make_app(serve, words)):
                raise RuntimeError(f"The run of {algorithm} failed; see {folder}.")
            expected, plain_s = simulated(words)
            found = load_arrays(folder / algorithm / VARIABLES)
            gap = max(float(np.abs(found[n] - x).max()) for n, x in expected.items())
            round_s = load_results(folder / algorithm)["flower"]["round_s"]
            rows[algorithm] = {
                "largest_difference": gap,
                "first_round_s": round(round_s[0], 2),
                "round_s": round(statistics.median(round_s[1:]), 2),
                "simulated_round_s": round(plain_s, 4),
            }
            largest = max(largest, gap)
            rounds.append(statistics.median(round_s[1:]) - plain_s)
            print(f"{algorithm}: {rows[algorithm]}", flush=True)
    return {
        "flower_equals_simulation": largest <= 1e-6,
        "largest_difference": largest,
        "flower_overhead_s_per_round": round(statistics.median(rounds), 2),
        "runs": rows,
    } | second_message(config, folder)


def second_message(config: Config, folder: pathlib.Path) -> dict[str, float]:
    """Seconds of a client's process that finds its step exported and compiled."""
    words = words_of(config, config.algorithms[0], folder / "message")
    app = make_app(ServeConfig(folder=str(folder / "message_app")), words)
    root, order, arrays = (folder / name for name in ("sites", "order.json", "order.arrays"))
    data, _, prepared = ready(read_flags(words))
    remote = remote_of(prepared, data, config.clients)
    kept = []

    def exchange(orders):
        kept.append(orders[0])
        return in_process(root, preparing(prepared, data))({0: orders[0]})

    state = start(remote, prepared.variables, jax.random.key(1))
    for _ in range(2):
        state, _, refused = play_round(remote, state, exchange, {})
        assert not refused, refused
    order.write_text(json.dumps(kept[-1].config))
    save_arrays(arrays, kept[-1].arrays)
    names = {"app": app, "order": order, "arrays": arrays, "root": root}
    code = MESSAGE.format(**{name: str(path) for name, path in names.items()})
    seconds = []
    for _ in range(3):  # the first one compiles
        before, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        seconds.append((time.perf_counter() - before, cpu))
    wall, cpu = min(seconds[1:])
    return {"second_message_s": round(wall, 2), "second_message_cpu_s": round(cpu, 2)}


def preparing(prepared: Any, data: Any) -> Any:
    """What makes a client's folder."""

    def prepare(folder: pathlib.Path, order: dict) -> None:
        own = client_data(population_of(prepared, data), order["client"])
        client = Client(prepared.algorithm, prepared.variables, *own, data.public)
        prepare_site(folder, client, order["bucket"])

    return prepare


def refused(config: Config, folder: pathlib.Path) -> dict[str, Any]:
    """How many kinds of bad replies are refused, without a trace in the model."""
    data, _, prepared = ready(read_flags(words_of(config, "fed_avg", folder / "refused")))
    remote = remote_of(prepared, data, config.clients)
    exchange = in_process(folder / "refused_sites", preparing(prepared, data))
    replies: list[dict] = []

    def recorded(orders):
        replies.append({})
        for reply in exchange(orders):
            replies[-1][reply.client] = reply
            yield reply

    state = start(remote, prepared.variables, jax.random.key(1))
    state, _, _ = play_round(remote, state, recorded, {})
    play_round(remote, state, recorded, {})

    def played(change):
        def again(orders):
            for client, reply in replies[1].items():
                known = {**reply.config, "nonce": orders[client].config["nonce"]}
                fresh = reply._replace(config=known)
                yield from change(fresh) if client == BAD else [fresh]

        return play_round(remote, state, again, {})

    without = flat("s", played(lambda reply: [])[0].run.server)
    count, reasons = 0, {}
    for kind, change in KINDS.items():
        after, _, told = played(lambda reply, change=change: [change(reply, replies[0][BAD])])
        same = all(np.array_equal(x, without[n]) for n, x in flat("s", after.run.server).items())
        is_refused = [one.client for one in told] == [BAD] and bool(told[0].reason) and same
        count += is_refused
        reasons[kind] = told[0].reason if told else ""
        if not is_refused:
            print(f"not refused: {kind}")
    print("; ".join(f"{kind}: {reason[:60]}" for kind, reason in list(reasons.items())[:5]))
    return {"bad_clients_refused": count, "bad_clients_kinds": len(KINDS)}


def main(config: Config) -> None:
    if config.quick:
        config = dataclasses.replace(config, clients=2, rounds=2, algorithms=("fed_avg",))
    has_flower = importlib.util.find_spec("flwr") is not None
    with tempfile.TemporaryDirectory() as folder:
        found = refused(config, pathlib.Path(folder))
        if has_flower:
            found |= over_flower(config, pathlib.Path(folder))
        else:
            print("flwr is not installed: nothing was measured over Flower.")
    print(json.dumps({"name": "flower", "clients": config.clients} | found))


if __name__ == "__main__":
    configs.run(main, Config)
