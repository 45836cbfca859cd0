"""Joins a server with one or several clients, each a SuperNode that keeps its data.

    python -m jaxfm.launch.flower join --numbers=0,1,2,3
    python -m jaxfm.launch.flower join --numbers=2 --server=fed.example.org:8000 \
        --certificates=certificates

A client keeps its memory (personal layers, control variates) in --folder. It runs until it is
stopped (Ctrl-C), and takes part in all runs of the server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator
from subprocess import Popen

from jaxfm.config import check, option
from jaxfm.launch.flower.processes import running, supernode
from jaxfm.launch.flower.serve import certificates_of


@dataclasses.dataclass(frozen=True)
class JoinConfig:
    """Clients of this machine."""

    numbers: tuple[int, ...] = option((0,), "which clients they are, counted from 0")
    server: str = option("127.0.0.1:8000", "address of the SuperLink")
    folder: str = option("runs/flower-clients", "where clients keep what is theirs, and logs")
    certificates: str = option(
        "", "folder with ca.pem and client-N.key, of `keys`; empty: no encryption"
    )

    def __post_init__(self):
        check(self)
        if not self.numbers or min(self.numbers) < 0:
            raise ValueError(f"numbers={self.numbers}: give the numbers of clients, from 0 on.")
        if len(set(self.numbers)) < len(self.numbers):
            raise ValueError(f"numbers={self.numbers}: a client is one node.")


CONFIG = JoinConfig


@contextlib.contextmanager
def joined(config: JoinConfig) -> Iterator[list[Popen]]:
    """Clients that run while the block does."""
    folder, certificates = pathlib.Path(config.folder), certificates_of(config.certificates)
    with contextlib.ExitStack() as stack:
        nodes = []
        for number in config.numbers:
            own = folder / f"node_{number}"
            words = supernode(number, config.server, own / "clients", certificates)
            started = running(words, own / "flwr", own / "supernode.log")
            nodes.append(stack.enter_context(started))
        yield nodes


def main(config: JoinConfig) -> None:
    """Runs the clients until they are stopped."""
    with joined(config) as nodes:
        print(f"{len(nodes)} clients talk to {config.server}; stop them by Ctrl-C.")
        with contextlib.suppress(KeyboardInterrupt):
            while all(node.poll() is None for node in nodes):
                time.sleep(1)
    over = [n for n, node in zip(config.numbers, nodes, strict=True) if node.returncode > 0]
    if over:
        raise RuntimeError(f"Client {over[0]} ended; see its log in {config.folder}.")
