"""The options of a job, and those of each kind of cluster."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from jaxfm.config import check, check_whole, option, section
from jaxfm.launch.cluster.scripts import check_command

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # what all three take, with room for more
_PLAIN = re.compile(r"[\w.,:/@+=%-]*")
_TPU = re.compile(r"(v2|v3|v4|v5p|v5litepod|v6e)-[1-9]\d*")
RUNTIMES = {  # Google's images for JAX, by the version of the TPU
    "v2": "tpu-ubuntu2204-base", "v3": "tpu-ubuntu2204-base", "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e",
}  # fmt: skip


def check_plain(name: str, value: Any) -> None:
    """Raises ValueError for a text that a shell or Slurm would read as more than a word."""
    if not _PLAIN.fullmatch(value):
        raise ValueError(f"{name}={value!r}: give letters, digits and any of . , : / @ + = % _ -.")


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    """Of a Slurm cluster."""

    partition: str = option("", "partition; the default is the cluster's")
    account: str = option("", "account that is charged")
    minutes: int = option(240, "time limit of one start")
    processes: Literal["gpu", "node"] = option("gpu", "one process for each GPU, or for each node")
    setup: tuple[str, ...] = option(
        (), "a line of shell before the run, as 'source venv/bin/activate'", repeat=True
    )

    def __post_init__(self):
        check(self)
        check_whole(self, {"minutes": 1}, "slurm.")
        for name in ("partition", "account"):
            check_plain(f"slurm.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class JobSetOptions:
    """Of a Kubernetes cluster with JobSet."""

    image: str = option("", "container image that has Python, this library and its data")
    claim: str = option("", "persistent volume claim, writable by all pods, that holds the runs")
    mount: str = option("/runs", "where it is mounted, and where the script works")
    namespace: str = option("", "namespace; the default is kubectl's")
    queue: str = option("", "local queue of Kueue")
    port: int = option(1234, "where process 0 is met")

    def __post_init__(self):
        check(self)
        check_whole(self, {"port": 1}, "jobset.")
        for name in ("image", "claim", "mount", "namespace", "queue"):
            check_plain(f"jobset.{name}", getattr(self, name))
        if self.port > 65535:
            raise ValueError(f"jobset.port={self.port}: give at most 65535.")
        if not self.mount.startswith("/"):
            raise ValueError(f"jobset.mount={self.mount!r}: give an absolute path.")


@dataclasses.dataclass(frozen=True)
class TpuOptions:
    """Of Google's Cloud TPUs."""

    type: str = option("v5litepod-16", "accelerator type: version and size")
    zone: str = option("", "zone; the default is gcloud's")
    project: str = option("", "project; the default is gcloud's")
    runtime: str = option("", "image of the virtual machines; the default is JAX's for the type")
    spot: bool = option(False, "take machines that may be taken away again")
    setup: tuple[str, ...] = option(
        (), "a line of shell on each machine before the run, as a mount of the runs", repeat=True
    )

    def __post_init__(self):
        check(self)
        if not _TPU.fullmatch(self.type):
            known = ", ".join(RUNTIMES)
            raise ValueError(f"tpu.type={self.type!r}: give one of {known}, a dash and a size.")
        for name in ("zone", "project", "runtime"):
            check_plain(f"tpu.{name}", getattr(self, name))

    @property
    def image(self) -> str:
        """The image of the virtual machines."""
        return self.runtime or RUNTIMES[self.type.partition("-")[0]]


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """A job of several processes; words after -- are the script and its flags."""

    kind: Literal["slurm", "jobset", "tpu"] = option("slurm", "of the cluster")
    command: tuple[str, ...] = option(
        (), "a word of the script's command; words after -- are short for it", repeat=True
    )
    name: str = option("jaxfm", "of the job")
    nodes: int = option(2, "machines; of TPUs, slices")
    gpus: int = option(0, "GPUs of each machine; 0: it computes on CPUs")
    cpus: int = option(0, "CPUs of each machine; 0: what the cluster gives")
    memory_gb: int = option(0, "memory of each machine; 0: what the cluster gives")
    grace_s: int = option(120, "seconds between SIGTERM, which makes a run save, and the end")
    restarts: int = option(
        10, "restarts, at most; on Kubernetes those that SIGTERM asks for are free"
    )
    python: str = option("python", "the interpreter")
    slurm: SlurmOptions = section(SlurmOptions(), "kind", "slurm")
    jobset: JobSetOptions = section(JobSetOptions(), "kind", "jobset")
    tpu: TpuOptions = section(TpuOptions(), "kind", "tpu")

    def __post_init__(self):
        check(self)
        check_whole(
            self,
            {"nodes": 1, "gpus": 0, "cpus": 0, "memory_gb": 0, "grace_s": 10, "restarts": 0},
        )
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name={self.name!r}: give up to 40 small letters, digits and dashes, a letter "
                "first."
            )
        check_plain("python", self.python)
        if self.kind == "slurm" and self.cpus and self.cpus < self.processes_per_node:
            raise ValueError(
                f"cpus={self.cpus} with {self.processes_per_node} processes a node: give each one."
            )
        if self.kind == "jobset" and not (self.jobset.image and self.jobset.claim):
            raise ValueError("kind=jobset requires --jobset.image and --jobset.claim.")
        if self.kind == "tpu":
            unread = [name for name in ("gpus", "cpus", "memory_gb") if getattr(self, name)]
            if unread:
                raise ValueError(
                    f"{unread[0]} changes nothing: --tpu.type says what a machine has."
                )
        if self.command:
            check_command(self.command)

    @property
    def processes_per_node(self) -> int:
        """Processes of each machine of a Slurm cluster."""
        return max(1, self.gpus) if self.slurm.processes == "gpu" else 1
