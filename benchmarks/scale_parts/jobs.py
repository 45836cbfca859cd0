"""Jobs of real processes on loopback, each held to a core; a process prints one line of JSON.

python benchmarks/scale_parts/jobs.py '{"what": "rounds", ...}' [--coordinator=... ...]
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1]
TIMEOUT_S = 900


def run_job(count: int, request: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of `count` processes answers; process p runs on core p modulo the cores.

    Raises:
      RuntimeError: a process failed; with the last lines that it said.
    """
    cores = sorted(os.sched_getaffinity(0))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    paths = [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=1"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags.strip(),
    }  # fmt: skip
    processes = []
    for p in range(count):
        words = ["taskset", "-c", str(cores[p % len(cores)]), sys.executable, __file__]
        words += [json.dumps(request), f"localhost:{port}", str(count), str(p)]
        processes.append(
            subprocess.Popen(words, env=environment, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
        )  # fmt: skip
    try:
        said = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"A process ended with {process.returncode}: {errors[-2000:]}")
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What one process of a job finds."""
    from scale_parts import measure, problem, saves

    if request["what"] == "machine":
        return measure.machine(request["calls"])
    sizes = problem.Problem(**{**request["problem"], "sizes": tuple(request["problem"]["sizes"])})
    if request["what"] == "saves":
        return saves.measure(sizes, request["lasting"], request["every"], request["pairs"])
    return {"seconds": problem.round_seconds(sizes, request["rounds"])}


def main() -> None:
    """Joins the job and prints the answer."""
    request, coordinator, count, number = sys.argv[1:]
    from jaxfm.processes import Job, join

    if int(count) > 1:
        join(Job(coordinator, int(count), int(number)))
    print(json.dumps(answer(json.loads(request))))


if __name__ == "__main__":
    main()
