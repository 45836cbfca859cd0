"""Server and clients on this machine, each a process of its own, for one run.

    python -m jaxfm.launch.flower local --clients=4 -- --algorithm=scaffold --data=digits \
        --data.num_clients=4 --cohort_size=4 --rounds=3
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys

from jaxfm.config import option
from jaxfm.launch.flower.join import JoinConfig, joined
from jaxfm.launch.flower.serve import ServeConfig, listening, make_app, submit

TAKES_FLAGS = True


@dataclasses.dataclass(frozen=True)
class LocalConfig(ServeConfig):
    """A server and its clients."""

    clients: int = option(4, "clients, numbered from 0, each a node")

    def __post_init__(self):
        super().__post_init__()
        if self.own_rows:
            raise ValueError("own_rows is for `serve`, whose clients `join` with --data.")
        if self.clients < 1:
            raise ValueError(f"clients={self.clients}: give at least 1.")


CONFIG = LocalConfig


def main(config: LocalConfig, words: list[str]) -> None:
    """Runs everything."""
    status = play(config, words)
    if status:
        sys.exit(status)


def play(config: LocalConfig, words: list[str]) -> int:
    """Runs everything; returns the exit status of `flwr run`."""
    app = make_app(config, words)
    clients = JoinConfig(
        tuple(range(config.clients)), f"{config.host}:{config.port}",
        str(pathlib.Path(config.folder) / "clients"), config.certificates,
    )  # fmt: skip
    with listening(config) as home, joined(clients):
        return submit(home, app)
