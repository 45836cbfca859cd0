"""What a round costs when the population grows and the cohort does not.

    python benchmarks/scale.py

SCAFFOLD on clients whose data are made of their numbers and whose variates lie on disk
(`jaxfm.federated.streamed`): the same cohort size at 10^3 to 10^6 clients, each size in a process
of its own. The rounds have the same shapes, so that a second or a megabyte more is the population's
alone. The last line is one JSON object:

- round_flatness_1e3_to_1e6: seconds of a round (median), the largest over the smallest;
- memory_flatness: the same of the largest resident memory of a process;
- seconds, mib: by number of clients;
- disk_mib: what the file of memories takes, by number of clients, of its "length_mib".

Then federated averaging of an MLP, whose clients live on devices of their own:

- two_process_speedup: seconds of a round in one process held to one core (`taskset`), over those of
  the same round in two processes that meet over loopback, each held to a core of its own; 2 is all
  that there is. "two_process" has the seconds;
- checkpoint_overhead: the share of the rounds' time by which a run is longer that may save its
  state every --save_every rounds (Orbax, in the background, on the same single core), over pairs of
  runs in turn. "saves" has seconds of a round, of what a save adds and of how long the run waits
  for the call, the size of a checkpoint, and how many rounds and saves a run had.

Both are by the wall's clock; figures with "processor" are by the processor time of each process,
which is what others on the same cores change least.
"""

from __future__ import annotations

import dataclasses
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
import jax.numpy as jnp
import optax
from scale_parts.clocks import CLOCKS
from scale_parts.jobs import run_job
from scale_parts.problem import Problem

from jaxfm import config as configs
from jaxfm.config import check, check_whole, option
from jaxfm.federated import Local, scaffold
from jaxfm.federated.client_store import ClientStore
from jaxfm.federated.streamed import StreamedRounds, derived
from jaxfm.models import mlp
from jaxfm.tasks import classification

FEATURES, CLASSES, LONGEST, WARM = 32, 10, 20, 2


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    quick: bool = option(False, "two sizes, few rounds, small cohorts: figures without meaning")
    sizes: tuple[int, ...] = option((1_000, 10_000, 100_000, 1_000_000), "clients")
    cohort_size: int = option(1_000, "clients drawn a round")
    rounds: int = option(20, "rounds measured")
    hidden: int = option(1024, "units of the hidden layers of the MLP that is averaged")
    clients: int = option(8, "that it is averaged over, of 10 steps each")
    save_every: int = option(5, "rounds between saves, as a run's eval_every has it")
    pairs: int = option(5, "of runs with and without saves")
    run_s: float = option(60.0, "seconds of each of these runs, about")
    one: bool = option(False, "measure the first size in this process (for the script itself)")

    def __post_init__(self):
        check(self)
        least = ("cohort_size", "rounds", "hidden", "clients", "save_every", "pairs")
        check_whole(self, dict.fromkeys(least, 1))


def client(key):
    """A client's data: a linear rule, which leans to some classes."""
    here, there, size = jax.random.split(key, 3)
    x = jax.random.normal(here, (LONGEST, FEATURES)) + jax.random.normal(there, (FEATURES,)) / 2
    label = jnp.argmax(x[:, :CLASSES], axis=1).astype(jnp.int32)
    return {"x": x, "label": label}, jax.random.randint(size, (), 5, LONGEST + 1)


def measure(num_clients: int, config: Config) -> dict[str, float]:
    """Seconds of a round, and the memory that this process took."""
    model, task = mlp((FEATURES, 64, CLASSES)), classification(CLASSES, inputs="x")
    algorithm = scaffold(
        model, task, Local(optax.sgd(0.1), 10, 1), total_examples=12.5 * num_clients
    )
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "memories")
        with StreamedRounds(
            algorithm, derived(client, jax.random.key(0)), num_clients=num_clients,
            cohort_size=config.cohort_size, store=ClientStore(path, num_clients),
        ) as rounds:  # fmt: skip
            state = rounds.init(model.init(jax.random.key(1)), jax.random.key(2))
            seconds = []
            for _ in range(WARM + config.rounds):
                began = time.perf_counter()
                state, _ = rounds.run(state)
                jax.block_until_ready(state)
                seconds.append(time.perf_counter() - began)
        found = path.stat()
    return {
        "seconds": statistics.median(seconds[WARM:]),
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "disk_mib": found.st_blocks / 2048,
        "length_mib": found.st_size / 2**20,
    }


def two_processes(config: Config) -> dict[str, Any]:
    """The same rounds in one process and in two, a core each."""
    problem = Problem((784, config.hidden, config.hidden, 10), 64, 10, config.clients)
    request = {"what": "rounds", "problem": problem._asdict(), "rounds": config.rounds}
    taken = {n: run_job(n, request) for n in (1, 2)}
    middle = lambda n, clock: statistics.fmean(
        statistics.median(x[clock] for x in process["seconds"]) for process in taken[n]
    )
    seconds = {clock: {n: middle(n, clock) for n in taken} for clock in CLOCKS}
    print(f"a round in one process and in two: {rounded(seconds)}", flush=True)
    return {
        "two_process_speedup": rounded(seconds["wall"][1] / seconds["wall"][2]),
        "two_process_speedup_processor": rounded(seconds["processor"][1] / seconds["processor"][2]),
        "two_process": rounded(seconds),
    }


def checkpoints(config: Config) -> dict[str, Any]:
    """What saving in the background costs on one core."""
    problem = Problem((784, config.hidden, config.hidden, 10), 64, 10, config.clients)
    (found,) = run_job(1, {
        "what": "saves", "problem": problem._asdict(), "lasting": config.run_s,
        "every": config.save_every, "pairs": config.pairs,
    })  # fmt: skip
    print(f"saves: {rounded(found)}", flush=True)
    overhead = found.pop("overhead")
    return {
        "checkpoint_overhead": rounded(overhead["wall"]),
        "checkpoint_overhead_processor": rounded(overhead["processor"]),
        "saves": rounded(found),
    }


def rounded(figures: Any) -> Any:
    """Numbers with four digits, in dicts as they are."""
    if isinstance(figures, dict):
        return {name: rounded(x) for name, x in figures.items()}
    return float(f"{figures:.4g}")


def main(config: Config) -> None:
    """Measures each size in a process of its own, and prints the line."""
    if config.one:
        print(json.dumps(measure(config.sizes[0], config)))
        return
    if config.quick:
        config = dataclasses.replace(config, sizes=(1_000, 1_000_000), cohort_size=50, rounds=4,
                                     hidden=256, clients=4, pairs=2, run_s=15.0)  # fmt: skip
    load = os.getloadavg()[0]
    found = {}
    for size in config.sizes:
        flags = [f"--sizes={size}", f"--cohort_size={config.cohort_size}", "--one",
                 f"--rounds={config.rounds}"]  # fmt: skip
        words = [sys.executable, __file__, *flags]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found[size] = json.loads(done.stdout.splitlines()[-1])
        print(f"{size:>9,} clients: " + ", ".join(f"{x:.3f} {n}" for n, x in found[size].items()))
    columns = {name: {n: round(x[name], 4) for n, x in found.items()} for name in found[size]}
    spread = lambda name: round(max(columns[name].values()) / min(columns[name].values()), 3)
    line = {
        "name": "scale",
        "round_flatness_1e3_to_1e6": spread("seconds"),
        "memory_flatness": spread("mib"),
        "cohort_size": config.cohort_size,
        **columns,
        **two_processes(config),
        **checkpoints(config),
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    configs.run(main, Config)
