"""A projection against real processes: 1, 2 and 4 of them on this machine's cores.

    python benchmarks/projection.py [--quick]

First this machine gets an entry like those of `python -m jaxfm.launch.cluster project`: FLOP/s of a
product of matrices and bytes/s of a pass over memory, each the mean over two processes that do it
at once, each held to a core; bytes/s and latency of an all-reduce between them over loopback. Then
rounds of federated averaging (an MLP; as many clients on each process) are projected from their
compiled programs, and run in 1, 2 and 4 processes.

All is measured by two clocks. By the wall's, processes beyond the cores share them, and the model
gives each its share of a core. Processor time of a process is what remains to be compared where
others keep the machine busy: without waiting for the others, and without shares. The last line is
one JSON object; of each clock, by number of processes:

- predicted, measured: seconds of a round; medians over rounds, the mean over processes;
- ratio: predicted over measured: 1 is right, less is too hopeful. That of one process says how far
  the program is from a core's peaks;
- over_one_process: the same over that of one process: what the model of more processes adds to it;
- scaling: seconds of one process over those of n (weak scaling), predicted and measured.
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


def this_machine(calls: int) -> dict[str, dict[str, float]]:
    """By clock: the figures of one core, while another works as hard, and of the loopback."""
    found = run_job(2, {"what": "machine", "calls": calls})
    mean = lambda clock, name: statistics.fmean(x[clock][name] for x in found)
    return {clock: {name: mean(clock, name) for name in found[0][clock]} for clock in found[0]}


def work_of(config: Config) -> Workload:
    """The rounds, from their compiled programs."""
    problem = problem_of(config, 1)
    rows: dict[str, np.ndarray] = problem.rows(problem.batch_size)
    training = Training(mlp(problem.sizes), classification(10), optax.sgd(0.01), rows)
    return rounds_work(
        problem.algorithm(), training, clients=config.clients, steps=config.steps,
        amount=float(config.clients), unit="clients", name="rounds",
    )  # fmt: skip


def predicted(work: Workload, figures: dict[str, float], processes: int, cores: int | None) -> Time:
    """A round of so many processes on the cores of this machine; None: of their own."""
    core = Machine(
        "core", figures["flops"], figures["flops"], figures["memory"], 0.0, 2**30,
        figures["link"], figures["link"], "measured in this run",
    )  # fmt: skip
    machine = core if cores is None else shared(core, processes, cores)
    assumed = Assumptions("float32", figures["latency"])
    return time_of(work.pieces(processes), machine, processes, assumed)


def compared(said: dict[int, float], seen: dict[int, float]) -> dict[str, dict[int, float]]:
    """The figures of one clock."""
    digits = lambda values: {n: float(f"{x:.4g}") for n, x in values.items()}
    ratio = {n: said[n] / seen[n] for n in seen}
    return {
        "predicted": digits(said),
        "measured": digits(seen),
        "ratio": digits(ratio),
        "over_one_process": digits({n: x / ratio[1] for n, x in ratio.items()}),
        "scaling_predicted": digits({n: said[1] / x for n, x in said.items()}),
        "scaling_measured": digits({n: seen[1] / x for n, x in seen.items()}),
    }


def main(config: Config) -> None:
    """Measures the machine, projects, runs, and prints the line."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    if config.quick:
        config = dataclasses.replace(config, hidden=256, steps=4, clients=2, rounds=3)
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    work = work_of(config)
    machine = this_machine(4 if config.quick else 20)
    for clock, x in machine.items():
        print(f"a core, {clock}: {x['flops'] / 1e9:.1f} GFLOP/s, {x['memory'] / 1e9:.1f} GB/s; "
              f"loopback {x['link'] / 1e9:.2f} GB/s, {1e6 * x['latency']:.0f} µs")  # fmt: skip
    said: dict[str, dict[int, float]] = {clock: {} for clock in machine}
    seen: dict[str, dict[int, float]] = {clock: {} for clock in machine}
    for n in config.processes:
        problem: Any = problem_of(config, n)._asdict()
        found = run_job(n, {"what": "rounds", "problem": problem, "rounds": config.rounds})
        for clock in machine:
            middle = lambda process, c=clock: statistics.median(x[c] for x in process["seconds"])
            seen[clock][n] = statistics.fmean(map(middle, found))
            time = predicted(work, machine[clock], n, cores if clock == "wall" else None)
            said[clock][n] = time.total
            print(f"{n} processes, {clock}: predicted {time.total:.4f} s (exchange "
                  f"{time.collectives:.4f}), measured {seen[clock][n]:.4f} s, "
                  f"ratio {time.total / seen[clock][n]:.2f}", flush=True)  # fmt: skip
    line = {
        "name": "projection",
        "ratio": round(said["wall"][max(said["wall"])] / seen["wall"][max(seen["wall"])], 3),
        **{clock: compared(said[clock], seen[clock]) for clock in machine},
        "machine": {
            clock: {name: float(f"{x:.4g}") for name, x in figures.items()}
            for clock, figures in machine.items()
        },
        "cores": cores,
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    configs.run(main, Config)
