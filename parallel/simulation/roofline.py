"""The time of programs on many devices, by a roofline.

    device      = sum over programs of times * max(FLOPs / peak, bytes / bandwidth) / efficiency
    all-reduce  = 2 (n - 1) / n * bytes / link + 2 ceil(log2 n) * latency
    all-gather  = (n - 1) / n * bytes / link + ceil(log2 n) * latency
    total       = device + max(0, collectives - overlap * device)

The link is the slowest on the way: that between nodes where n devices are more than one has. On one
device there is nothing to exchange. With an efficiency of 1 the total is a bound from below.
Sources: Williams et al. 2009 (roofline); Patarasuk and Yuan 2009 (the ring's bytes are least); the
steps of latency are those of a tree, as NCCL has two of them (Sanders et al. 2009).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxfm.parallel.simulation.machines import ITEM_BYTES, Dtype, Machine
from jaxfm.parallel.simulation.programs import Collective, Program


class Assumptions(NamedTuple):
    """What no data sheet says.

    Attributes:
      dtype: of the products, and of what is kept and sent.
      latency_s: of one message between two devices.
      overlap: share of a device's own time under which exchanges are hidden, 0 to 1.
      efficiency: share of the peaks that programs reach, above 0, at most 1.
    """

    dtype: Dtype = "bfloat16"
    latency_s: float = 5e-6
    overlap: float = 0.0
    efficiency: float = 1.0


class Piece(NamedTuple):
    """A program, and how often it runs.

    Attributes:
      program: compiled in float32.
      times: may be 0.
    """

    program: Program
    times: float = 1.0


class Time(NamedTuple):
    """Seconds of pieces of work on one of n devices that work alike.

    Attributes:
      compute: if memory were infinitely fast.
      memory: if arithmetic were.
      device: of both, each program at its own limit.
      collectives: that the exchanges last.
      total: with that part of them which nothing hides.
    """

    compute: float
    memory: float
    device: float
    collectives: float
    total: float


def time_of(pieces: Sequence[Piece], machine: Machine, devices: int, assumed: Assumptions) -> Time:
    """The time of pieces of work, one after another.

    Args:
      pieces: what each device does.
      machine: its kind.
      devices: n that exchange with each other.
      assumed: see `Assumptions`.
    Raises:
      ValueError: fewer than one device, or an assumption out of range.
    """
    check_assumptions(assumed)
    narrow = ITEM_BYTES[assumed.dtype] / ITEM_BYTES["float32"]
    peak, bandwidth = machine.flops(assumed.dtype), machine.memory
    compute = memory = device = exchanged = 0.0
    for program, times in pieces:
        flops_s = times * program.flops / peak / assumed.efficiency
        bytes_s = times * program.nbytes * narrow / bandwidth / assumed.efficiency
        compute, memory, device = (
            compute + flops_s,
            memory + bytes_s,
            device + max(flops_s, bytes_s),
        )
        exchanged += times * sum(
            exchange_s(c._replace(nbytes=c.nbytes * narrow), machine, devices, assumed.latency_s)
            for c in program.collectives
        )
    exposed = max(0.0, exchanged - assumed.overlap * device)
    return Time(compute, memory, device, exchanged, device + exposed)


def exchange_s(collective: Collective, machine: Machine, devices: int, latency_s: float) -> float:
    """Seconds of one exchange among n devices; see the module's equations.

    A reduce-scatter is as an all-gather; an all-to-all sends (n - 1) / n of its bytes in n - 1
    messages; a permutation sends all in one.

    Raises:
      ValueError: fewer than one device.
    """
    if devices < 1:
        raise ValueError(f"devices={devices}: give at least 1.")
    if devices == 1:
        return 0.0
    link = machine.near_link if devices <= machine.near else machine.far_link
    deep, share = math.ceil(math.log2(devices)), (devices - 1) / devices
    sends, messages = {
        "all-reduce": (2 * share, 2 * deep),
        "all-gather": (share, deep),
        "reduce-scatter": (share, deep),
        "all-to-all": (share, devices - 1),
        "collective-permute": (1.0, 1),
    }[collective.kind]
    return sends * collective.nbytes / link + messages * latency_s


def check_assumptions(assumed: Assumptions) -> None:
    """Raises ValueError where an assumption is out of range, in one sentence."""
    if assumed.dtype not in ITEM_BYTES:
        raise ValueError(f"dtype={assumed.dtype!r}: give one of {', '.join(ITEM_BYTES)}.")
    if not 0 <= assumed.latency_s < math.inf:
        raise ValueError(f"latency_s={assumed.latency_s}: give seconds of at least 0.")
    if not 0 <= assumed.overlap <= 1:
        raise ValueError(f"overlap={assumed.overlap}: give a share between 0 and 1.")
    if not 0 < assumed.efficiency <= 1:
        raise ValueError(f"efficiency={assumed.efficiency}: give a share above 0, at most 1.")
