"""Projects training, rounds and decoding onto 1 to 4,096 accelerators, by a roofline.

    python -m jaxfm.launch.cluster project
    python -m jaxfm.launch.cluster project --machines=h100,v5p --embed_dim=2048 --num_layers=24
    python -m jaxfm.launch.cluster project --clients=8 --steps=20 --overlap=0.5 --efficiency=0.4

A decoder's programs are compiled here, and XLA says how many operations, bytes and exchanges they
have; a table of machines says how fast those would be. Nothing of the model is computed. The report
shows tokens a second by devices, what bounds each, and every assumption. Times are bounds from
below: programs reach a part of the peaks (--efficiency).
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np
import optax

from jaxfm import config as configs
from jaxfm.config import check, check_whole, option
from jaxfm.federated import Local, diloco, fed_avg
from jaxfm.launch.cluster.project_page import page
from jaxfm.launch.cluster.workloads import (
    Training,
    Workload,
    data_parallel,
    rounds_work,
    stage_decoding,
    tensor_decoding,
)
from jaxfm.models import DecoderConfig, decoder
from jaxfm.parallel.simulation.machines import MACHINES, Dtype, Machine, machine_named
from jaxfm.parallel.simulation.roofline import Assumptions, Time, check_assumptions, time_of
from jaxfm.report import write
from jaxfm.tasks import causal_lm

_SHAPE = ("embed_dim", "num_layers", "num_heads", "mlp_dim", "vocab_size")


@dataclasses.dataclass(frozen=True)
class ProjectConfig:
    """A model, its work, and the clusters that it is projected onto."""

    machines: tuple[str, ...] = option(tuple(MACHINES), "kinds of accelerators")
    most: int = option(4096, "devices, at most; all powers of two up to it are shown")
    dtype: Dtype = option("bfloat16", "of products, of arrays in memory and of exchanges")
    latency_us: float = option(5.0, "microseconds of a message between two devices")
    overlap: float = option(0.0, "share of a device's own time that hides exchanges")
    efficiency: float = option(1.0, "share of the peaks that programs reach; 1: a bound")
    embed_dim: int = option(512, "width of the decoder")
    num_layers: int = option(8, "of the decoder")
    num_heads: int = option(8, "of the decoder")
    mlp_dim: int = option(1536, "width of its MLPs")
    vocab_size: int = option(16384, "tokens that it knows")
    length: int = option(512, "tokens of a row")
    batch_size: int = option(16, "rows of a step on each device, and of a client's step")
    clients: int = option(4, "clients of a device in a round of fed_avg")
    steps: int = option(10, "steps of such a client in a round")
    inner: int = option(50, "steps of DiLoCo between two exchanges")
    decode_batch: int = option(8, "texts that are decoded at once by a copy of the model")
    cells: int = option(2048, "tokens of each of these texts that the cache holds")
    split: int = option(4, "devices that share a copy of the model in decoding")
    report: str = option("runs/project/report.html", "file of the report")

    def __post_init__(self):
        check(self)
        counts = (*_SHAPE, "most", "length", "batch_size", "clients", "steps", "inner",
                  "decode_batch", "cells", "split")  # fmt: skip
        check_whole(self, dict.fromkeys(counts, 1))
        if not self.machines:
            raise ValueError(f"machines is empty: give some of {', '.join(MACHINES)}.")
        for name in self.machines:
            machine_named(name)
        if self.most > 2**20:
            raise ValueError(f"most={self.most}: give at most {2**20} devices.")
        if not 0 <= self.latency_us < float("inf"):
            raise ValueError(f"latency_us={self.latency_us}: give a time of at least 0.")
        check_assumptions(self.assumed)
        if self.split & (self.split - 1) or self.num_heads % self.split:
            raise ValueError(
                f"split={self.split}: give a power of two that divides num_heads={self.num_heads}."
            )
        if self.num_layers % self.split:
            raise ValueError(f"split={self.split} does not divide num_layers={self.num_layers}.")
        if pathlib.Path(self.report).is_dir():
            raise ValueError(f"report={self.report} is a folder; give the name of a file.")
        self.decoder_config()

    @property
    def assumed(self) -> Assumptions:
        """What no data sheet says."""
        return Assumptions(self.dtype, self.latency_us * 1e-6, self.overlap, self.efficiency)

    @property
    def counts(self) -> list[int]:
        """The numbers of devices: 1, 2, 4, ... up to `most`."""
        return [2**k for k in range(self.most.bit_length())]

    def decoder_config(self) -> DecoderConfig:
        """The model; raises ValueError where its sizes do not fit each other."""
        longest = max(self.length, self.cells)
        return DecoderConfig(max_len=longest, **{name: getattr(self, name) for name in _SHAPE})


class Point(NamedTuple):
    """Work on so many devices of a kind.

    Attributes:
      workload, unit: of it.
      machine: its name.
      devices: n.
      time: of a round, a step or a tick.
      rate: units a second of all devices.
      efficiency: of scaling: the rate over n times that of one device; where one copy takes
        several, over that of the fewest devices.
      bound: what takes most: "compute", "memory" or "exchange".
    """

    workload: str
    unit: str
    machine: str
    devices: int
    time: Time
    rate: float
    efficiency: float
    bound: str


def project(
    workload: Workload, machine: Machine, counts: list[int], assumed: Assumptions
) -> list[Point]:
    """The points of one workload on one kind of machine.

    Args:
      workload: what is done.
      machine: by what.
      counts: numbers of devices; those that hold no copy of the model are left out.
      assumed: what no data sheet says.
    """
    points: list[Point] = []
    for devices in counts:
        group = devices if workload.group is None else workload.group
        if devices % group:
            continue
        time = time_of(workload.pieces(devices), machine, group, assumed)
        rate = workload.amount * devices / time.total
        first = points[0] if points else None
        scaling = rate / devices / (first.rate / first.devices) if first else 1.0
        terms = {"compute": time.compute, "memory": time.memory, "exchange": time.collectives}
        bound = max(terms, key=lambda name: terms[name])
        points.append(Point(workload.name, workload.unit, machine.name, devices, time, rate,
                            scaling, bound))  # fmt: skip
    return points


def workloads(config: ProjectConfig) -> list[Workload]:
    """All work of a config, compiled."""
    model, task = decoder(config.decoder_config()), causal_lm()
    rows = {"tokens": np.zeros((config.batch_size, config.length + 1), np.int32)}
    tokens = float(config.batch_size * config.length)
    inner = Local(optax.adamw(1e-3), config.batch_size)
    training = Training(model, task, inner.optimizer, rows)
    say = lambda what: print(f"compiling {what}", flush=True)
    say("a step of training")
    found = [data_parallel(training, tokens, "tokens")]
    say("a round of DiLoCo")
    outer = rounds_work(
        diloco(model, task, inner), training, clients=1, steps=config.inner,
        amount=tokens * config.inner, unit="tokens", name="DiLoCo",
    )  # fmt: skip
    say("a round of fed_avg")
    local = Local(optax.sgd(0.1), config.batch_size)
    rounds = rounds_work(
        fed_avg(model, task, local), training._replace(optimizer=local.optimizer),
        clients=config.clients, steps=config.steps, amount=float(config.clients),
        unit="clients", name="rounds",
    )  # fmt: skip
    found += [outer, rounds]
    say("decoding")
    texts = (model, config.decode_batch, config.cells)
    found.append(tensor_decoding(*texts, 1))
    if config.split > 1:
        found.append(tensor_decoding(*texts, config.split))
        found.append(stage_decoding(*texts, config.split, config.embed_dim))
    return found


def main(config: ProjectConfig) -> None:
    """Compiles, prints a table, and writes the report."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    works = workloads(config)
    points = [
        point
        for work in works
        for name in config.machines
        for point in project(work, machine_named(name), config.counts, config.assumed)
    ]
    for point in points:
        if point.devices == config.counts[-1]:
            print(
                f"{point.workload:20s} {point.machine:5s} x{point.devices:<5d} "
                f"{point.rate:12.4g} {point.unit}/s, {point.efficiency:4.0%} of linear, "
                f"bound by {point.bound}"
            )
    path = pathlib.Path(config.report)
    write(page(config, works, points), path)
    print(f"report: {path}")


def start(words: list[str]) -> None:
    """Runs `python -m jaxfm.launch.cluster project` with these words after it."""
    sys.modules["__main__"].__doc__ = __doc__
    sys.argv = [sys.argv[0], *words]
    configs.run(main, ProjectConfig)
