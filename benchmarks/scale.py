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
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import optax

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
    one: bool = option(False, "measure the first size in this process (for the script itself)")

    def __post_init__(self):
        check(self)
        check_whole(self, {"cohort_size": 1, "rounds": 1})


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


def main(config: Config) -> None:
    """Measures each size in a process of its own, and prints the line."""
    if config.one:
        print(json.dumps(measure(config.sizes[0], config)))
        return
    if config.quick:
        config = dataclasses.replace(config, sizes=(1_000, 1_000_000), cohort_size=50, rounds=4)
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
    }
    print(json.dumps(line))


if __name__ == "__main__":
    configs.run(main, Config)
