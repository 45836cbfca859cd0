"""A job of several processes: which of them this one is, and how it joins the others.

    job = detect(os.environ)  # of Slurm, Open MPI, PBS, torchrun, a TPU pod, ...; None: alone
    if job is not None:
        join(job)  # `jax.distributed.initialize`; before JAX is first used

JAX finds Slurm, Open MPI, Kubernetes (with its API's Python package) and TPU pods by itself, but
only one GPU for each task of Slurm, and no hosts that a scheduler wrote into a file. This module
reads the environment alone, so that it is tested with dictionaries; what JAX has to ask over the
network (the metadata of a TPU VM, the API of Kubernetes) is left to it: `--coordinator=auto`.
"""

from __future__ import annotations

import pathlib
import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

JOIN_TIMEOUT_S = 300
HEARTBEAT_S = 20  # JAX waits 100 s for a silent process; whoever pays for idle nodes does not
SHUTDOWN_S = 3600  # the others wait at the end while process 0 writes a large model
TPU_PORT = 8482
_PORTS = (61440, 4096)  # the first, and how many; a port of its own for each job of a cluster

FLAGS = {
    "coordinator": "host:port of process 0, where a job of several processes meets; auto leaves "
    "all to JAX; the default is what Slurm, MPI, PBS, torchrun, a JobSet or a TPU pod says",
    "num_processes": "number of processes of the job; with --coordinator",
    "process_id": "which of them this is, from 0; with --coordinator",
    "join_timeout_s": f"seconds to wait for the other processes; the default is {JOIN_TIMEOUT_S}",
    "heartbeat_s": "seconds of silence after which a process counts as dead and the job ends; the "
    f"default is {HEARTBEAT_S}",
}


class Job(NamedTuple):
    """A job of several processes, seen from one of them.

    Attributes:
      coordinator: host:port of process 0; "" leaves all to JAX.
      num_processes, process_id: of the job, and of this process from 0.
      devices: local accelerators that are this process's; None: all that it sees.
      found: who said so, for messages.
    """

    coordinator: str
    num_processes: int
    process_id: int
    devices: tuple[int, ...] | None = None
    found: str = "flags"


class JoinError(RuntimeError):
    """The processes of a job did not find each other."""


def given(coordinator: str | None, num_processes: str | None, process_id: str | None) -> Job | None:
    """The job that the three flags describe; None where none of them is given.

    Raises:
      ValueError: some are given and some are not, or a value is none.
    """
    flags = dict(zip(FLAGS, (coordinator, num_processes, process_id)))
    if coordinator == "auto" and num_processes is None and process_id is None:
        return Job("", 0, 0, found="JAX")
    if all(value is None for value in flags.values()):
        return None
    if missing := [f"--{name}" for name, value in flags.items() if value is None]:
        there = [f"--{name}" for name, value in flags.items() if value is not None]
        raise ValueError(
            f"{' and '.join(there)} without {' and '.join(missing)}: give all three, or none to "
            "have them detected."
        )
    count, index = map(_whole, list(flags)[1:], list(flags.values())[1:])
    return _checked(Job(str(coordinator), count, index))


def detect(environ: Mapping[str, str]) -> Job | None:
    """The job that the environment describes, or None where it names no other process.

    Asked in turn: JAX's own variables, torchrun's, Slurm's (within `srun`), Open MPI's, those of
    other MPI launchers (PMI: MPICH, Intel, PALS) and of a TPU pod on Kubernetes.

    Raises:
      ValueError: the variables of a job that are there say too little, or do not fit together.
    """
    for ask in (_jax, _torchrun, _slurm, _open_mpi, _pmi, _tpu_pod):
        job = ask(environ)
        if job is not None:
            return None if job.num_processes == 1 else _checked(job)
    return None


def join(job: Job, *, timeout_s: int = JOIN_TIMEOUT_S, heartbeat_s: int = HEARTBEAT_S) -> None:
    """Joins the other processes; afterwards `jax.devices()` are those of all.

    Args:
      job: of `given` or `detect`.
      timeout_s: how long the others are waited for.
      heartbeat_s: how long one may be silent before all end.
    Raises:
      JoinError: the coordinator did not answer, or not all processes came, in time.
      ValueError: a time below 1 s.
    """
    for name, value in (("join_timeout_s", timeout_s), ("heartbeat_s", heartbeat_s)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1 second.")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    start = time.monotonic()
    if job.coordinator and job.process_id:
        _await(job, timeout_s)
    left = max(1, round(timeout_s - (time.monotonic() - start)))
    known = bool(job.coordinator)
    try:
        jax.distributed.initialize(
            job.coordinator if known else None,
            job.num_processes if known else None,
            job.process_id if known else None,
            local_device_ids=job.devices,
            # None of JAX's own detection where ours has spoken: it would take one GPU of several.
            cluster_detection_method="deactivate" if job.coordinator else None,
            initialization_timeout=left,
            heartbeat_timeout_seconds=heartbeat_s,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")[:160]
        who = f"process {job.process_id} of {job.num_processes}" if job.coordinator else "JAX"
        raise JoinError(
            f"The processes of this job did not all meet at {job.coordinator or 'a coordinator'} "
            f"within {timeout_s} s ({who}: {first}); see whether each was started."
        ) from error


def _await(job: Job, timeout_s: int) -> None:
    """Waits until the coordinator listens, which JAX's own client says in no sentence."""
    host, _, port = job.coordinator.rpartition(":")
    end, reason = time.monotonic() + timeout_s, "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=left).close()
            return
        except OSError as error:
            reason = error.strerror or str(error) or reason
            time.sleep(min(0.5, max(0.0, end - time.monotonic())))
    raise JoinError(
        f"The coordinator {job.coordinator} did not answer process {job.process_id} within "
        f"{timeout_s} s ({reason}): see whether process 0 runs there, and whether a firewall "
        "closes the port."
    )


def _jax(environ: Mapping[str, str]) -> Job | None:
    """JAX_COORDINATOR_ADDRESS and the two numbers; the index of a Kubernetes Job is an id, too."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if not any(environ.get(name) for name in names[1:]):
        return None
    index = environ.get("JAX_PROCESS_ID") or environ.get("JOB_COMPLETION_INDEX", "")
    values = _all_of({**environ, "JAX_PROCESS_ID": index}, names)
    count, number = map(_whole, names[1:], values[1:])
    return Job(values[0], count, number, found="JAX_* variables")


def _torchrun(environ: Mapping[str, str]) -> Job | None:
    if not {"RANK", "WORLD_SIZE"} <= environ.keys():
        return None
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
    host, port, *numbers = _all_of(environ, names)
    # torchrun's own agent holds MASTER_PORT on the first host.
    taken = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    number = _whole("MASTER_PORT", port) + taken
    size, rank = map(_whole, names[2:], numbers)
    local = (environ.get("LOCAL_RANK"), environ.get("LOCAL_WORLD_SIZE"))
    devices = None
    if None not in local:
        devices = _share(_visible(environ), *map(int, local))  # type: ignore[arg-type]
    return Job(f"{host}:{number}", size, rank, devices, "torchrun's variables")


def _slurm(environ: Mapping[str, str]) -> Job | None:
    """A step of `srun`; the batch script itself, which has SLURM_NTASKS, too, is one process."""
    if "SLURM_STEP_NUM_TASKS" not in environ or "SLURM_PROCID" not in environ:
        return None
    size = _whole("SLURM_STEP_NUM_TASKS", environ["SLURM_STEP_NUM_TASKS"])
    if size == 1:
        return Job("", 1, 0, found="Slurm")
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    job, nodes, rank, local = _all_of(environ, names)
    port = _port(_whole("SLURM_JOB_ID", job), environ)
    devices = None
    if not any(name in environ for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK")):
        node = _whole("SLURM_NODEID", environ.get("SLURM_NODEID", "0"))
        tasks = _tasks_on(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"), node)
        devices = _share(_visible(environ), _whole("SLURM_LOCALID", local), tasks)
    return Job(f"{first_host(nodes)}:{port}", size, _whole("SLURM_PROCID", rank), devices, "Slurm")


def _open_mpi(environ: Mapping[str, str]) -> Job | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    size, rank = map(_whole, names, _all_of(environ, names))
    local = int(environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))
    tasks = int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")  # up to version 4: where mpirun runs
    at = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    if at and (number := uri.partition(".")[0]).isdigit():
        host = at[1] or f"[{at[2]}]"
        port = _port(int(number) // 4096, environ)
    else:
        host, port = _scheduled(environ, "Open MPI", tasks == size)
    devices = _share(_visible(environ), local, tasks)
    return Job(f"{host}:{port}", size, rank, devices, "Open MPI")


def _pmi(environ: Mapping[str, str]) -> Job | None:
    if not {"PMI_RANK", "PMI_SIZE"} <= environ.keys():
        return None
    size, rank = (_whole(name, environ[name]) for name in ("PMI_SIZE", "PMI_RANK"))
    if size == 1:
        return Job("", 1, 0, found="PMI")
    local = environ.get("PALS_LOCAL_RANKID", environ.get("MPI_LOCALRANKID", "0"))
    local = environ.get("PMI_LOCAL_RANK", local)
    tasks = int(environ.get("PMI_LOCAL_SIZE", environ.get("MPI_LOCALNRANKS", "1")))
    host, port = _scheduled(environ, "The MPI launcher", tasks == size)
    devices = _share(_visible(environ), int(local), tasks)
    return Job(f"{host}:{port}", size, rank, devices, "PMI")


def _tpu_pod(environ: Mapping[str, str]) -> Job | None:
    """A slice on Kubernetes, or several joined by Megascale."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    names = [host for host in hosts.split(",") if host]
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or "1")
    if not names or len(names) * slices == 1:
        return None
    (worker,) = _all_of(environ, ("TPU_WORKER_ID",))
    first = environ.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]
    rank = _whole("TPU_WORKER_ID", worker)
    rank += len(names) * int(environ.get("MEGASCALE_SLICE_ID") or "0")
    port = environ.get("JAX_COORDINATOR_PORT", TPU_PORT)
    return Job(f"{first.split(':')[0]}:{port}", len(names) * slices, rank, None, "the TPU pod")


def first_host(nodes: str) -> str:
    """The first host of Slurm's short form: `first_host("rack[2,5-7]n[01-04],login")` is rack2n01.

    >>> first_host("rack[2,5-7]n[01-04],login")
    'rack2n01'
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no host; give --coordinator.")
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", first[0])


def _tasks_on(per_node: str, node: int) -> int:
    """The tasks of a node in Slurm's form "4(x2),1": 4 on two nodes and 1 on the third."""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        counts += [int(tasks)] * int(times or 1)
    return counts[node] if node < len(counts) else 1


def _scheduled(environ: Mapping[str, str], launcher: str, is_one_host: bool) -> tuple[str, int]:
    """Host and port where the launcher names none: the scheduler's first host, or this one."""
    digits = re.match(r"\d+", environ.get("PBS_JOBID", environ.get("SLURM_JOB_ID", "")))
    port = _port(int(digits[0]) if digits else 0, environ)
    if path := environ.get("PBS_NODEFILE"):
        try:
            lines = pathlib.Path(path).read_text().split()
        except OSError as error:
            raise ValueError(
                f"PBS_NODEFILE={path}: {error.strerror}; give --coordinator."
            ) from None
        if not lines:
            raise ValueError(f"PBS_NODEFILE={path} names no host; give --coordinator.")
        return lines[0], port
    if nodes := environ.get("SLURM_JOB_NODELIST"):
        return first_host(nodes), port
    if is_one_host:
        return "127.0.0.1", port
    raise ValueError(
        f"{launcher} started several processes and names no host of the first: give "
        "--coordinator=HOST:PORT, --num_processes and --process_id."
    )


def _port(number: int, environ: Mapping[str, str]) -> int:
    if chosen := environ.get("JAX_COORDINATOR_PORT"):
        return _whole("JAX_COORDINATOR_PORT", chosen)
    return _PORTS[0] + number % _PORTS[1]


def _visible(environ: Mapping[str, str]) -> int:
    """GPUs that this process sees; 0: unknown, or none."""
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if environ.get(name):
            return len(environ[name].split(","))
    return int(environ.get("SLURM_GPUS_ON_NODE") or "0")


def _share(gpus: int, local: int, tasks: int) -> tuple[int, ...] | None:
    """The GPUs of one of several tasks of a host; None: all that it sees."""
    if gpus <= 1 or tasks <= 1:  # none, bound to the task already, or all for the only task
        return None
    if gpus % tasks or local >= tasks:
        raise ValueError(
            f"{gpus} GPUs do not divide over the {tasks} processes of this host: start as many "
            "processes as divide them, or one."
        )
    each = gpus // tasks
    return tuple(range(local * each, (local + 1) * each))


def _all_of(environ: Mapping[str, str], names: tuple[str, ...]) -> list[str]:
    """The values of variables that only have a meaning together."""
    if missing := [name for name in names if not environ.get(name)]:
        there = [name for name in names if environ.get(name)]
        raise ValueError(
            f"{' and '.join(missing)} missing{' beside ' + ', '.join(there) if there else ''}: set "
            "all, or give --coordinator, --num_processes and --process_id."
        )
    return [environ[name] for name in names]


def _whole(name: str, text: str | None) -> int:
    if text is None or not text.isascii() or not text.isdigit():
        raise ValueError(f"{name}={text!r}: give a whole number of at least 0.")
    return int(text)


def _checked(job: Job) -> Job:
    host, _, port = job.coordinator.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"coordinator={job.coordinator!r}: give HOST:PORT, as node1:1234.")
    if job.num_processes < 1 or job.process_id >= job.num_processes:
        raise ValueError(
            f"process_id={job.process_id} with num_processes={job.num_processes} ({job.found}): "
            "ids go from 0 to one less than the number."
        )
    return job


def join_from(
    values: Mapping[str, str | None], environ: Mapping[str, str], *, saves: bool = True
) -> Job | None:
    """Joins the job that flags or the environment name; returns it, or None where there is none.

    Args:
      values: of `FLAGS`, by name; None: not given.
      environ: as `os.environ`.
      saves: whether the program answers SIGTERM (`jaxfm.preemption`); else SIGTERM ends it.
    Raises:
      ValueError, JoinError: as `given`, `detect` and `join`.
    """
    job = given(values["coordinator"], values["num_processes"], values["process_id"])
    job = detect(environ) if job is None else job
    seconds: Callable[[str, int], int] = lambda name, usual: (
        usual if values[name] is None else _whole(name, values[name])
    )
    times = seconds("join_timeout_s", JOIN_TIMEOUT_S), seconds("heartbeat_s", HEARTBEAT_S)
    if job is not None and job.num_processes != 1:
        jax.config.update("jax_enable_preemption_service", saves)
        join(job, timeout_s=times[0], heartbeat_s=times[1])
    return job
