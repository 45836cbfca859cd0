"""The cores of a CPU as devices."""

from __future__ import annotations

import importlib.metadata
import os

import jax

_PATIENCE_S = {
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": 300,
    "--xla_cpu_collective_call_terminate_timeout_seconds": 3600,
}


def use_cores(most: int) -> None:
    """Makes each core of a CPU a device, up to `most`; call it before JAX is first used.

    More devices than cores would wait for each other in every collective. Where other processes
    keep a core busy, one device may still come 40 s late, after which XLA would end the process: it
    is made to wait for an hour. If XLA_FLAGS already sets the number of devices, all is left alone;
    in a job of several processes, too, each of which is one device that computes on all its cores.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags or jax.distributed.is_initialized():
        return
    number = max(1, min(most, os.cpu_count() or 1))
    jax.config.update("jax_num_cpu_devices", number)
    # A flag that XLA does not know ends the process, so only versions that are known get these.
    if number > 1 and importlib.metadata.version("jaxlib").startswith("0.10."):
        more = [f"{name}={seconds}" for name, seconds in _PATIENCE_S.items() if name not in flags]
        os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *more])
