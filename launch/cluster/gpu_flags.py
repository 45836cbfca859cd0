"""What the JAX documentation recommends to set for GPUs, in one place.

Source: docs.jax.dev, "GPU performance tips" (reviewed there in March 2025): the flags of its
example, "NCCL flags" and "CPU allocation per task". A flag of XLA that jaxlib does not know ends
the process; 0.10 and 0.12 know these. Flags for pipelined training are left out: they are for
programs that XLA cuts into stages by itself.
"""

from __future__ import annotations

from typing import NamedTuple


class Setting(NamedTuple):
    """A flag of XLA, or a variable of the environment, its value and what it does.

    Attributes:
      name, value: as they are written.
      why: a few words; of a variable of several flags, a line for each.
    """

    name: str
    value: str
    why: str


XLA_FLAGS = (
    Setting(
        "--xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "collectives run while the GPU computes",
    ),
    Setting(
        "--xla_gpu_triton_gemm_any",
        "true",
        "Triton's matrix products wherever it has them, tuned at compile time",
    ),
)

# Between the GPUs of one host; over several hosts they have no effect that is known.
ONE_HOST = (
    Setting("NCCL_LL128_BUFFSIZE", "-2", "buffer of NCCL's low-latency protocol of 128 bytes"),
    Setting("NCCL_LL_BUFFSIZE", "-2", "buffer of NCCL's low-latency protocol"),
    Setting("NCCL_PROTO", "SIMPLE,LL,LL128", "the protocols that NCCL chooses from"),
)


def environment(gpus: int, nodes: int) -> list[Setting]:
    """The variables of each process of a job.

    Args:
      gpus: of a node; without any, nothing is set.
      nodes: of the job.
    """
    if not gpus:
        return []
    flags = " ".join(f"{flag.name}={flag.value}" for flag in XLA_FLAGS)
    why = "\n".join(f"{flag.name}: {flag.why}." for flag in XLA_FLAGS)
    return [Setting("XLA_FLAGS", flags, why), *(ONE_HOST if nodes == 1 and gpus > 1 else ())]


def cpus_of_process(cpus: int, processes: int) -> int:
    """The CPUs of a node, shared evenly by its processes: too few slow down GPUs' collectives."""
    return cpus // processes
