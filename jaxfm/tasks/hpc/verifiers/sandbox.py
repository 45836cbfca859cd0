"""Runs commands that nobody vouches for: generated programs, and what a language model wrote.

    result = sandbox.run(["./a.out"], {"a.out": binary}, Limits(seconds=5))

The command runs in user, mount, network, process, IPC and host-name namespaces of its own, as a
user without privileges. It sees the file system read-only, without the folders of users and without
sockets; its working folder is in memory, starts with the given files and is gone afterwards. It
has no network and a clean environment. What it starts ends with it. `kind()` says whether this
system allows all that: Linux 5.12 or newer where users may make namespaces. Elsewhere `run`
refuses, unless `Limits(isolated=False)` says that limits and a temporary folder alone will do,
which suits programs of our own generator and never the text of a model.

Memory is measured every 20 ms, since sanitizers reserve terabytes of addresses that no limit on
addresses would grant; a command can exceed it for as long as that. The sandbox stops careless and
broken programs; it is no defence against one that knows a hole in the kernel.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

SUPERVISOR = pathlib.Path(__file__).with_name("supervisor.py")
HIDDEN = ("/home", "/root", "/run", "/var/run", "/var/tmp", "/mnt", "/media", "/srv")
TOOLS = ("gcc", "gfortran", "clang", "valgrind")


class Limits(NamedTuple):
    """What a command may use.

    Attributes:
        seconds: Of wall time, of all its processes together.
        cpu_seconds: Of processor time, of each process.
        memory_bytes: Resident, of all its processes together.
        processes: Processes and threads at a time.
        disk_bytes: Of the working folder, and of each file in it.
        output_bytes: Of standard output, and of standard error.
        isolated: Whether to refuse where namespaces are not to be had.
    """

    seconds: float = 20.0
    cpu_seconds: int = 60
    memory_bytes: int = 2 << 30
    processes: int = 128
    disk_bytes: int = 128 << 20
    output_bytes: int = 4 << 20
    isolated: bool = True


class Result(NamedTuple):
    """What came of a command.

    Attributes:
        returncode: Its exit status; minus the signal that ended it; None where a limit ended it.
        reason: Which limit ended it, as a sentence; empty where it ended by itself.
        files: Contents of the files to keep that it left.
    """

    returncode: int | None
    stdout: str
    stderr: str
    seconds: float
    reason: str
    files: dict[str, bytes]


class Kind(NamedTuple):
    """What the sandbox holds on this system.

    Attributes:
        isolated: Whether commands run in namespaces of their own.
        reason: Why not, as a sentence; empty where they do.
    """

    isolated: bool
    reason: str


class Refused(RuntimeError):
    """The sandbox cannot hold what was asked for; the message says why."""


def run(
    command: Sequence[str],
    files: Mapping[str, str | bytes] | None = None,
    limits: Limits = Limits(),  # noqa: B008
    *,
    environment: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
) -> Result:
    """Runs a command in the sandbox and waits for its end.

    Args:
        command: The program, looked up in PATH, and its arguments. The program may be a file of
            the working folder ("./a.out").
        files: Contents of the files that the working folder starts with; all may be executed.
        limits: What it may use.
        environment: Variables beside PATH and LANG; nothing else of this process's is seen.
        keep: Names of files of the working folder to return.

    Raises:
        Refused: The limits ask for isolation, which this system does not allow.
    """
    for name in (*(files or {}), *keep):
        if not name or pathlib.PurePath(name).name != name:
            raise ValueError(f"Files of the sandbox have plain names, not {name!r}.")
    inherited = {
        name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ
    }
    spec = {
        "command": list(command),
        "files": {name: _encoded(text) for name, text in (files or {}).items()},
        "environment": {"LANG": "C.UTF-8", **inherited, **(environment or {})},
        "keep": list(keep),
        "hidden": _hidden(),
        "rlimits": {
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_NPROC": limits.processes,
            "RLIMIT_FSIZE": limits.disk_bytes,
            "RLIMIT_NOFILE": 256,
            "RLIMIT_CORE": 0,
        },
        **limits._asdict(),
    }
    reply = _supervised(spec, limits.seconds + 30)
    if "refusal" in reply:
        raise Refused(reply["refusal"])
    return Result(
        returncode=reply["returncode"],
        stdout=base64.b64decode(reply["stdout"]).decode(errors="replace"),
        stderr=base64.b64decode(reply["stderr"]).decode(errors="replace"),
        seconds=reply["seconds"],
        reason=reply["reason"],
        files={name: base64.b64decode(text) for name, text in reply["files"].items()},
    )


@functools.cache
def kind() -> Kind:
    """What the sandbox holds on this system, found by running `true` in it."""
    try:
        run(["true"])
    except Refused as refusal:
        return Kind(False, str(refusal))
    return Kind(True, "")


def _encoded(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


@functools.cache
def _hidden() -> list[str]:
    """Folders to hide: those of users and of sockets, but for those that the tools stand in."""
    tools = [os.path.realpath(path) for tool in TOOLS if (path := shutil.which(tool))]
    folders = {*HIDDEN, os.path.expanduser("~")} - {"/"}
    return sorted(f for f in folders if not any(tool.startswith(f"{f}/") for tool in tools))


def _supervised(spec: dict, timeout_s: float) -> dict:
    """The supervisor's reply."""
    if not sys.platform.startswith("linux"):
        raise Refused(f"The sandbox needs Linux, and this is {sys.platform}.")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SUPERVISOR)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(json.dumps(spec).encode(), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise Refused("The sandbox did not end in time; the machine may be overloaded.") from None
    finally:
        process.kill()
        process.wait()
    try:
        return json.loads(out)
    except ValueError:
        last = err.decode(errors="replace").strip().splitlines()[-1:]
        raise Refused(f"The sandbox's supervisor failed: {' '.join(last) or 'no reply'}.") from None
