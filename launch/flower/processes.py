"""Flower's processes on this machine: a SuperLink, SuperNodes, and `flwr run`.

Nothing here reaches out: telemetry and the update check are off, and no app installs anything.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

from jaxfm.federated.remote.flower import need_flower

CONNECTION = "jaxfm"
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_POLL = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}  # seconds; it is 1 by default


class Certificates(NamedTuple):
    """Files of TLS, as `keys` makes them in one folder.

    Attributes:
      folder: where they are.
    """

    folder: pathlib.Path

    def file(self, name: str) -> str:
        """The path of one of them; raises ValueError where it is missing."""
        path = self.folder / name
        if not path.exists():
            raise ValueError(
                f"{path} is missing; make it with `python -m jaxfm.launch.flower keys`."
            )
        return str(path.absolute())


def environment(home: pathlib.Path) -> dict[str, str]:
    """Of Flower's processes, which keep what is theirs in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    own = pathlib.Path(sys.executable).parent
    found = {**os.environ, **_QUIET, "FLWR_HOME": str(home.absolute())}
    for name, value in _POLL.items():
        found.setdefault(name, value)
    if sys.dont_write_bytecode:  # each message is a Python of its own, which would compile it all
        found |= {
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": f"{found['FLWR_HOME']}/pycache",
        }
    found["PATH"] = f"{own}{os.pathsep}{found.get('PATH', '')}"
    return found


def program(name: str) -> str:
    """The path of one of Flower's programs; raises where it is missing."""
    need_flower()
    own = pathlib.Path(sys.executable).parent
    found = shutil.which(name, path=f"{own}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise ModuleNotFoundError(f"There is no {name} here: pip install 'jaxfm[flower]'.")
    return found


@contextlib.contextmanager
def running(
    words: Sequence[str], home: pathlib.Path, log: pathlib.Path
) -> Iterator[subprocess.Popen]:
    """A process and its children, which end with the block; its output goes into `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    output: IO
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [program(words[0]), *words[1:]], stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, env=environment(home), start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen, patience_s: float = 10.0) -> None:
    """Ends a process that `running` started, and all that it started."""
    for what in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, what)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)


def superlink(host: str, port: int, certificates: Certificates | None) -> list[str]:
    """The command of a SuperLink; with certificates it takes registered nodes alone."""
    words = [
        "flower-superlink", "--host", host, "--port", str(port), "--isolation", "subprocess",
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    if certificates is None:
        return [*words, "--insecure"]
    return [
        *words, "--ssl-ca-certfile", certificates.file("ca.pem"),
        "--ssl-certfile", certificates.file("server.pem"),
        "--ssl-keyfile", certificates.file("server.key"), "--enable-supernode-auth",
    ]  # fmt: skip


def supernode(
    client: int,
    address: str,
    folder: pathlib.Path,
    certificates: Certificates | None,
    data: pathlib.Path | None = None,
) -> list[str]:
    """The command of a client's SuperNode; `data` says where its own data are."""
    about = f'client={client} folder="{folder.absolute()}"'
    if data is not None:
        about += f' data="{data.absolute()}"'
    words = [
        "flower-supernode", "--superlink", address, "--isolation", "subprocess",
        "--port", str(free_port()),
        "--node-config", about,
    ]  # fmt: skip
    if certificates is None:
        return [*words, "--insecure"]
    return [
        *words, "--root-certificates", certificates.file("ca.pem"),
        "--auth-supernode-private-key", certificates.file(f"client-{client}.key"),
    ]  # fmt: skip


def connect(home: pathlib.Path, address: str, certificates: Certificates | None) -> None:
    """Writes how `flwr run` reaches the SuperLink."""
    home.mkdir(parents=True, exist_ok=True)
    how = "insecure = true"
    if certificates is not None:
        how = f'root-certificates = "{certificates.file("ca.pem")}"'
    text = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "{address}"\n{how}\n'
    )
    (home / "config.toml").write_text(text)


def free_port() -> int:
    """A port of the loopback device that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for_port(host: str, port: int, process: subprocess.Popen, log: pathlib.Path) -> None:
    """Waits until a process listens; raises RuntimeError with its last line if it ends."""
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
            return
        time.sleep(0.2)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise RuntimeError(f"The SuperLink ended: {(lines or ['no output'])[-1]} (see {log})")
