"""Starts a server for real clients: a SuperLink, and a run on it.

    python -m jaxfm.launch.flower serve --clients=4 -- --algorithm=scaffold --data=digits \
        --data.num_clients=4 --cohort_size=4 --rounds=3

Waits for the clients' nodes (`python -m jaxfm.launch.flower join`), plays the rounds, and ends.
What follows -- are the flags of `jaxfm.launch.federate`; its run folder gets metrics, refusals,
results and the trained variables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Iterator

from jaxfm.config import check, check_whole, option
from jaxfm.launch.flower.app import write_app
from jaxfm.launch.flower.processes import (
    CONNECTION,
    Certificates,
    connect,
    environment,
    program,
    running,
    superlink,
    wait_for_port,
)  # fmt: skip

TAKES_FLAGS = True


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """A server."""

    folder: str = option("runs/flower", "folder of the app, of Flower's files and of logs")
    host: str = option("127.0.0.1", "address that clients reach the server at")
    port: int = option(8000, "of the SuperLink")
    clients: int = option(0, "clients to wait for before the first round; 0: all there are")
    certificates: str = option(
        "", "folder that `keys` has made: TLS, and nodes with registered keys alone; "
        "empty: no encryption, and any node may join"
    )  # fmt: skip
    round_s: float = option(600.0, "seconds after which a client is absent from its round")
    hello_s: float = option(600.0, "seconds to wait for the first clients")
    own_rows: tuple[int, ...] = option(
        (),
        "clients have data of their own (`join --data=FILE`), of up to so many rows each, or, with "
        "a number for each client, of so many; --data is then the server's own small file, by "
        "which it says what rows look like, and validates and tests; empty: --data is dealt out",
    )

    def __post_init__(self):
        check(self)
        check_whole(self, {"port": 1, "clients": 0})
        for name in ("round_s", "hello_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: give seconds above 0.")


CONFIG = ServeConfig


def certificates_of(folder: str) -> Certificates | None:
    """Of a folder; None for an empty name."""
    return Certificates(pathlib.Path(folder)) if folder else None


@contextlib.contextmanager
def listening(config: ServeConfig) -> Iterator[pathlib.Path]:
    """A SuperLink that runs while the block does; gives Flower's folder."""
    folder, certificates = pathlib.Path(config.folder), certificates_of(config.certificates)
    home, log = folder / "flwr", folder / "superlink.log"
    words = superlink(config.host, config.port, certificates)
    with running(words, home, log) as process:
        wait_for_port(config.host, config.port, process, log)
        connect(home, f"{config.host}:{config.port}", certificates)
        if certificates is not None:
            register(home, certificates)
        yield home


def register(home: pathlib.Path, certificates: Certificates) -> None:
    """Tells the SuperLink the public keys of clients, and their names."""
    for path in sorted(certificates.folder.glob("client-*.pub")):
        words = ["supernode", "register", str(path.absolute()), CONNECTION, "--name", path.stem]
        done = subprocess.run(
            [program("flwr"), *words], env=environment(home), capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stdout + done.stderr).strip()
            raise RuntimeError(f"The SuperLink did not take {path}: {last}")


def submit(home: pathlib.Path, app: pathlib.Path) -> int:
    """Runs the app to its end, and shows what it says."""
    words = [program("flwr"), "run", str(app), CONNECTION, "--stream"]
    return subprocess.run(words, env=environment(home)).returncode


def make_app(config: ServeConfig, words: list[str]) -> pathlib.Path:
    """Writes the app that `flwr run` takes."""
    app = pathlib.Path(config.folder) / "app"
    limits = {"round_s": config.round_s, "hello_s": config.hello_s, "nodes": config.clients}
    write_app(app, words, limits, config.own_rows)
    return app


def main(config: ServeConfig, words: list[str]) -> None:
    """Serves one run."""
    app = make_app(config, words)
    with listening(config) as home:
        print(f"The server listens at {config.host}:{config.port}; its app is {app}.")
        status = submit(home, app)
    if status:
        sys.exit(status)
