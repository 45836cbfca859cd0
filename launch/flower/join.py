"""Joins a server with one or several clients, each a SuperNode that keeps its data.

    python -m jaxfm.launch.flower join --numbers=0,1,2,3
    python -m jaxfm.launch.flower join --numbers=2 --server=fed.example.org:8000 \
        --certificates=certificates
    python -m jaxfm.launch.flower join --numbers=2 --data=mine.csv --data.label=diagnosis

With --data, a client trains on rows that nobody else has, for a server with --own_rows. A client
keeps its memory (personal layers, control variates) in --folder. It runs until it is
stopped (Ctrl-C), and takes part in all runs of the server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator
from subprocess import Popen

from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.launch.flower.processes import running, supernode
from jaxfm.launch.flower.serve import certificates_of


@dataclasses.dataclass(frozen=True)
class OwnDataConfig:
    """A client's own data; what is left out is called as in the server's file."""

    source: str = option("", "a file (CSV, TSV, JSON, JSONL, Parquet, npz, txt) or a folder")
    label: str = option("", "column of the class; folder: texts lie in one folder for each class")
    text: tuple[str, ...] = option((), "column of the text, or several that are joined")
    image: str = option("", "column of the image, or of its path")
    features: tuple[str, ...] = option((), "columns of numbers, in the order of the server's")
    columns: tuple[str, ...] = option((), "names of the columns of a CSV file without a header")
    encoding: str = option("utf-8-sig", "of text files")

    def __post_init__(self):
        check(self)
        others = (self.label, self.text, self.image, self.features, self.columns)
        if not self.source and any(others):
            raise ValueError("data.source is missing: say which file holds the client's data.")


@dataclasses.dataclass(frozen=True)
class JoinConfig:
    """Clients of this machine."""

    numbers: tuple[int, ...] = option((0,), "which clients they are, counted from 0")
    server: str = option("127.0.0.1:8000", "address of the SuperLink")
    folder: str = option("runs/flower-clients", "where clients keep what is theirs, and logs")
    certificates: str = option(
        "", "folder with ca.pem and client-N.key, of `keys`; empty: no encryption"
    )
    data: OwnDataConfig = OwnDataConfig()

    def __post_init__(self):
        check(self)
        if self.data.source and len(self.numbers) > 1:
            raise ValueError(
                f"data.source={self.data.source!r} is one client's; give --numbers one number, and "
                "each client a command of its own."
            )
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
            data = _written(config.data, own)
            words = supernode(number, config.server, own / "clients", certificates, data)
            started = running(words, own / "flwr", own / "supernode.log")
            nodes.append(stack.enter_context(started))
        yield nodes


def _written(data: OwnDataConfig, folder: pathlib.Path) -> pathlib.Path | None:
    """A file that says where a client's own data are; None: it has none."""
    if not data.source:
        return None
    if not pathlib.Path(data.source).exists():
        raise ValueError(f"data.source={data.source!r}: there is no such file or folder.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data.json"
    source = str(pathlib.Path(data.source).absolute())
    configs.save(dataclasses.replace(data, source=source), path)
    return path


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
