"""Clients' machines: what they can do, which part of a model each can carry, what a round costs.

    seconds_i = down_i / down rate + flops_i / speed + up_i / up rate;   of a round: max_i
    joules_i  = flops_i e_flop + (down_i + up_i) e_byte;                 of a round: sum_i

Both follow from the bytes and operations of the ledger; nothing is measured, so the same run can be
looked at on other machines. A server waits for the slowest; its own work is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.accounting.ledger import ClientCost, Work
from jaxfm.federated.algorithm import Profile
from jaxfm.federated.local import UNLIMITED_STEPS
from jaxfm.model import Array


class Device(NamedTuple):
    """A class of machine; or many machines, each field an array f64[C].

    Attributes:
      flops_per_s: sustained in training, which is far below a data sheet's peak.
      memory_bytes: that training may use.
      down_bytes_per_s, up_bytes_per_s: of its link.
      joules_per_flop: while it computes: the draw of the whole machine over its speed.
      joules_per_byte: on its link, in either direction.
    """

    flops_per_s: Any
    memory_bytes: Any
    down_bytes_per_s: Any
    up_bytes_per_s: Any
    joules_per_flop: Any
    joules_per_byte: Any


# Round figures of a class of machine, not of a product: factors between classes are what counts.
DEVICES = {
    # A single board on Wi-Fi, 5 W.
    "pi": Device(5e9, 2e9, 5e6, 2.5e6, 1e-9, 4e-7),
    # A phone on a mobile network, 4 W; a radio's bytes are dear.
    "phone": Device(2e10, 1e9, 5e6, 1e6, 2e-10, 2e-6),
    # A laptop without an accelerator, 20 W.
    "laptop": Device(1e11, 8e9, 1e7, 2.5e6, 2e-10, 4e-7),
    # One consumer graphics card, 300 W, on a home or office line.
    "workstation": Device(1e13, 1.6e10, 5e7, 1e7, 3e-11, 1e-7),
    # One data-centre accelerator, 1 kW with its share of the machine.
    "server": Device(1e14, 6e10, 1e9, 1e9, 1e-11, 1e-8),
}


def profiles(
    num_clients: int,
    *,
    max_steps: int | np.ndarray = UNLIMITED_STEPS,
    flops_per_s: float | np.ndarray = np.inf,
    memory_bytes: float | np.ndarray = np.inf,
    up_bytes_per_s: float | np.ndarray = np.inf,
    down_bytes_per_s: float | np.ndarray = np.inf,
) -> Profile:
    """Profiles of all clients; each field one number for all, or an array [C].

    Raises:
      ValueError: a field of another length, or with a value that is not positive.
    """
    given = {
        "max_steps": max_steps,
        "flops_per_s": flops_per_s,
        "memory_bytes": memory_bytes,
        "up_bytes_per_s": up_bytes_per_s,
        "down_bytes_per_s": down_bytes_per_s,
    }
    fields: dict[str, Any] = {}
    for name, value in given.items():
        value = np.asarray(value)
        if value.ndim and value.shape != (num_clients,):
            raise ValueError(
                f"{name} has shape {value.shape}; give one number or one for each of the "
                f"{num_clients} clients."
            )
        if not (value > 0).all():
            raise ValueError(f"{name} must be positive, got {value.min()}.")
        dtype = jnp.int32 if name == "max_steps" else jnp.float32
        fields[name] = np.broadcast_to(value, (num_clients,)).astype(dtype)
    return Profile(**fields)


def assign(profiles: Profile, memory_needs: Sequence[float]) -> np.ndarray:
    """i32[C]: the first bucket whose memory need fits each client; give the largest model first.

    Args:
      memory_needs: bytes by bucket, as `ledger.client_costs` counts them.
    Raises:
      ValueError: a client that no bucket fits.
    """
    needs = np.asarray(memory_needs, np.float64)[None, :]
    return _fitting(profiles.memory_bytes, needs).argmax(axis=1).astype(np.int32)


def _fitting(memory_bytes: Array, needs: np.ndarray) -> np.ndarray:
    """bool[C, buckets], which models fit in the memory [C]; needs [C or 1, buckets]."""
    memory = np.asarray(memory_bytes, np.float64)
    fits = memory[:, None] >= needs
    lost = np.flatnonzero(~fits.any(axis=1))
    if lost.size:
        least = np.broadcast_to(needs, fits.shape)[lost[0]].min()
        raise ValueError(
            f"Client {lost[0]} has {memory[lost[0]]:.3g} bytes of memory; the smallest model needs "
            f"{least:.3g}. Give a smaller tier or leave the client out."
        )
    return fits


def fleet(mix: Sequence[str], num_clients: int) -> Device:
    """The machines of all clients, fields f64[C]: the named ones dealt out in turn.

    Args:
      mix: names in `DEVICES`; ("pi", "pi", "phone") makes two thirds of the first.
    Raises:
      ValueError: no name, or one that is unknown.
    """
    unknown = [name for name in mix if name not in DEVICES]
    if unknown or not mix:
        raise ValueError(f"The mix {tuple(mix)} must name some of {', '.join(DEVICES)}.")
    of = [DEVICES[mix[i % len(mix)]] for i in range(num_clients)]
    return Device(*np.array(of, np.float64).T)


def fleet_profiles(machines: Device, max_steps: int | np.ndarray = UNLIMITED_STEPS) -> Profile:
    """What clients get to know of their own machines."""
    return profiles(
        len(machines.flops_per_s),
        max_steps=max_steps,
        flops_per_s=machines.flops_per_s,
        memory_bytes=machines.memory_bytes,
        up_bytes_per_s=machines.up_bytes_per_s,
        down_bytes_per_s=machines.down_bytes_per_s,
    )


class Plan(NamedTuple):
    """What each client is to do in a round.

    Attributes:
      bucket: i32[C].
      max_steps: i32[C], local steps there is time for.
      deadline_s: in which all of it is done.
    """

    bucket: np.ndarray
    max_steps: np.ndarray
    deadline_s: float


def plan(
    machines: Device,
    costs: Sequence[ClientCost],
    steps: np.ndarray,
    deadline_s: float | None = None,
    bucket: np.ndarray | None = None,
) -> Plan:
    """The largest model that each client can hold and train in time, and else fewer steps.

    Args:
      costs: by bucket, the largest model first.
      steps: i32[C], that a client would like to take; 0 without data.
      deadline_s: of a round; None: what half of the clients need, at most, for the largest model
        that they can hold, or, where that is longer, what the slowest needs for its fastest one,
        so that nobody's steps are cut; inf: memory alone decides.
      bucket: i32[C], where it is settled already which model each client trains.
    Raises:
      ValueError: a client whose memory or whose time suffices for no model.
    """
    steps = np.asarray(steps, np.int64)
    column = lambda name: np.array([getattr(cost, name) for cost in costs], np.float64)
    needs = column("memory_bytes")[None, :]
    if bucket is not None:
        needs = np.where(np.asarray(bucket)[:, None] == np.arange(len(costs)), needs, np.inf)
    fits = _fitting(machines.memory_bytes, needs)
    rate = jax.tree.map(lambda x: np.asarray(x, np.float64)[:, None], machines)
    wire = column("bytes_down") / rate.down_bytes_per_s + column("bytes_up") / rate.up_bytes_per_s
    step_s = column("flops_per_step") / rate.flops_per_s
    fixed = wire + column("flops_per_round") / rate.flops_per_s
    seconds = np.where(fits, fixed + steps[:, None] * step_s, np.inf)
    if deadline_s is None:
        largest = np.take_along_axis(seconds, fits.argmax(1)[:, None], 1)[:, 0]
        half = np.median(largest[steps > 0]) if (steps > 0).any() else 0.0
        deadline_s = float(max(seconds.min(1).max(), half))
    in_time = fits & (seconds <= deadline_s)
    bucket = np.where(in_time.any(1), in_time.argmax(1), seconds.argmin(1))
    own = lambda table: np.take_along_axis(table, bucket[:, None], 1)[:, 0]
    room = np.floor((deadline_s - own(fixed)) / np.maximum(own(step_s), 1e-30) * (1 + 1e-9))
    lost = np.flatnonzero((room < 1) & (steps > 0))
    if lost.size:
        first = lost[0]
        raise ValueError(
            f"Client {first} needs {own(fixed)[first] + own(step_s)[first]:.3g} s for one step of "
            f"the smallest model; deadline_s={deadline_s:.3g}. Allow more time, give a smaller "
            "tier, or leave the client out."
        )
    room = np.clip(room, 1, np.maximum(steps, 1)).astype(np.int32)
    return Plan(bucket.astype(np.int32), room, deadline_s)


def simulated(machines: Device, work: Work) -> dict[str, float]:
    """The "seconds" until the slowest is done and "joules" of all, for one round.

    Args:
      machines: fields f64[C].
      work: of the same clients, see `ledger.client_work`.
    """
    seconds = (
        work.bytes_down / machines.down_bytes_per_s
        + work.flops / machines.flops_per_s
        + work.bytes_up / machines.up_bytes_per_s
    )
    wire = (work.bytes_down + work.bytes_up) * machines.joules_per_byte
    return {
        "seconds": float(seconds.max()),
        "joules": float((work.flops * machines.joules_per_flop + wire).sum()),
    }
