"""Clients' machines: profiles, and which part of a model each can carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxfm.federated.algorithm import Profile

UNLIMITED_STEPS = 2**30


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
    memory = np.asarray(profiles.memory_bytes, np.float64)
    fits = memory[:, None] >= np.asarray(memory_needs, np.float64)[None, :]
    lost = np.flatnonzero(~fits.any(axis=1))
    if lost.size:
        raise ValueError(
            f"Client {lost[0]} has {memory[lost[0]]:.3g} bytes of memory; the smallest model needs "
            f"{min(memory_needs):.3g}. Give a smaller tier or leave the client out."
        )
    return fits.argmax(axis=1).astype(np.int32)
