"""A projection against real processes: 1, 2 and 4 of them on this machine's cores.

    python benchmarks/projection.py [--quick]

First this machine gets an entry like those of `python -m jaxfm.launch.cluster project`: FLOP/s of a
product of matrices and bytes/s of a pass over memory, each the mean over two processes that do it
at once, each held to a core; bytes/s and latency of an all-reduce between them over loopback. Then
rounds of federated averaging (an MLP; as many clients on each process) are projected from their
compiled programs, and run in 1, 2 and 4 processes. Processes beyond the cores share them, and the
model gives each its share of a core. The last line is one JSON object, by number of processes:

- predicted_s, measured_s: of a round; the measured one is the median;
- predicted_over_measured: 1 is right, less is too hopeful. The roofline's own figure for one
  process says how far its program is from the peaks;
- over_one_process: the same, divided by that of one process: what the model of more processes adds
  to it;
- weak_scaling: seconds of one process over those of n, predicted and measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from typing import Any

import jax
import numpy as np
import optax
from scale_parts.jobs import run_job
from scale_parts.problem import Problem

from jaxfm import config as configs
from jaxfm.config import check, check_whole, option
from jaxfm.launch.cluster.workloads import Training, Workload, rounds_work
from jaxfm.models import mlp
from jaxfm.parallel.simulation.machines import Machine, shared
from jaxfm.parallel.simulation.roofline import Assumptions, Time, time_of
from jaxfm.tasks import classification


@dataclasses.dataclass(frozen=True)
class Config:
    """What is projected and measured."""

    quick: bool = option(False, "a small network, few rounds: under a minute")
    processes: tuple[int, ...] = option((1, 2, 4), "of the jobs; 1 comes first")
    hidden: int = option(1024, "units of each of the two hidden layers")
    batch_size: int = option(64, "rows of a client's step")
    steps: int = option(10, "of a client in a round")
    clients: int = option(4, "on each process")
    rounds: int = option(9, "measured, after two")

    def __post_init__(self):
        check(self)
        least = ("hidden", "batch_size", "steps", "clients", "rounds")
        check_whole(self, dict.fromkeys(least, 1))
        if self.processes[:1] != (1,) or min(self.processes) < 1:
            raise ValueError(f"processes={self.processes}: give numbers of at least 1, 1 first.")


def problem_of(config: Config, processes: int) -> Problem:
    """The rounds of so many processes."""
    sizes = (784, config.hidden, config.hidden, 10)
    return Problem(sizes, config.batch_size, config.steps, config.clients * processes)


def this_machine(calls: int) -> tuple[Machine, float]:
    """The entry of one core, while another works as hard; and the latency of a message."""
    found = run_job(2, {"what": "machine", "calls": calls, "exchange": True})
    mean = {name: statistics.fmean(x[name] for x in found) for name in found[0]}
    machine = Machine(
        "core", mean["flops"], mean["flops"], mean["memory"], 0.0, 2**30, mean["link"],
        mean["link"], "measured in this run",
    )  # fmt: skip
    return machine, mean["latency"]


def work_of(config: Config) -> Workload:
    """The rounds, from their compiled programs."""
    problem = problem_of(config, 1)
    rows: dict[str, np.ndarray] = problem.rows(problem.batch_size)
    training = Training(mlp(problem.sizes), classification(10), optax.sgd(0.01), rows)
    return rounds_work(
        problem.algorithm(), training, clients=config.clients, steps=config.steps,
        amount=float(config.clients), unit="clients", name="rounds",
    )  # fmt: skip


def predicted(work: Workload, machine: Machine, latency_s: float, processes: int) -> Time:
    """A round of so many processes on the cores of this machine."""
    cores = len(os.sched_getaffinity(0))
    assumed = Assumptions("float32", latency_s)
    return time_of(
        work.pieces(processes), shared(machine, processes, cores), processes, assumed
    )


def main(config: Config) -> None:
    """Measures the machine, projects, runs, and prints the line."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    if config.quick:
        config = dataclasses.replace(config, hidden=256, steps=4, clients=2, rounds=3)
    load = os.getloadavg()[0]
    work = work_of(config)
    machine, latency_s = this_machine(4 if config.quick else 20)
    print(f"a core: {machine.float32 / 1e9:.1f} GFLOP/s, {machine.memory / 1e9:.1f} GB/s; "
          f"loopback {machine.near_link / 1e9:.2f} GB/s, {1e6 * latency_s:.0f} µs")  # fmt: skip
    said: dict[int, Time] = {}
    seen: dict[int, float] = {}
    for n in config.processes:
        problem: Any = problem_of(config, n)._asdict()
        found = run_job(n, {"what": "rounds", "problem": problem, "rounds": config.rounds})
        seen[n] = statistics.median(found[0]["seconds"])
        said[n] = predicted(work, machine, latency_s, n)
        print(f"{n} processes: predicted {said[n].total:.4f} s (exchange "
              f"{said[n].collectives:.4f}), measured {seen[n]:.4f} s, "
              f"ratio {said[n].total / seen[n]:.2f}")  # fmt: skip
    ratio = {n: said[n].total / seen[n] for n in seen}
    digits = lambda values: {n: round(x, 4) for n, x in values.items()}
    line = {
        "name": "projection",
        "ratio": round(ratio[max(seen)], 3),
        "predicted_over_measured": digits(ratio),
        "over_one_process": digits({n: x / ratio[1] for n, x in ratio.items()}),
        "weak_scaling": {
            "predicted": digits({n: said[1].total / said[n].total for n in said}),
            "measured": digits({n: seen[1] / seen[n] for n in seen}),
        },
        "predicted_s": digits({n: time.total for n, time in said.items()}),
        "measured_s": digits(seen),
        "gflops": round(machine.float32 / 1e9, 2),
        "memory_gb_per_s": round(machine.memory / 1e9, 2),
        "loopback_gb_per_s": round(machine.near_link / 1e9, 3),
        "latency_us": round(1e6 * latency_s, 1),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    configs.run(main, Config)
