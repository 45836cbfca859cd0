"""Flower's simulation engine (Ray) on recorded batches: FedAvg, a node for each client of a round.

    python benchmarks/round_peers/flower_simulation.py FOLDER

FOLDER has data.npz (images, labels, params by path), and rounds.npz with each round's batches. The
last line of the output is JSON: seconds of each round by the clock; the parameters after the first
round are in after.npz. A node's step is the jitted one of the hand-written loop.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip


@functools.cache
def loaded(folder: str) -> tuple[Any, ...]:
    """What a worker keeps between messages: examples, batches of all rounds, and the step."""
    import jax
    from rounds import forward, sgd_step

    data, rounds = (np.load(pathlib.Path(folder) / f"{name}.npz") for name in ("data", "rounds"))
    names = sorted(name for name in data.files if name.startswith("params/"))
    return data["images"], data["labels"], dict(rounds), names, jax.jit(sgd_step(forward))


def tree_of(names: list[str], leaves: list[np.ndarray]) -> dict[str, Any]:
    """Nested dicts of leaves called "params/layer/kernel"."""
    tree: dict[str, Any] = {}
    for name, leaf in zip(names, leaves, strict=True):
        _, layer, part = name.split("/")
        tree.setdefault(layer, {})[part] = leaf
    return tree


def trained(folder: str, number: int, place: int, leaves: list[np.ndarray]) -> tuple[list, int]:
    """A client's local epoch: its parameters, and how many examples it has."""
    images, labels, rounds, names, step = loaded(folder)
    batches = rounds[f"{number}/{place}"]
    params = tree_of(names, leaves)
    for rows in batches:
        real = (rows >= 0).astype(np.float32)
        params = step(params, images[rows], labels[rows], real)
    parts = [name.split("/")[1:] for name in names]
    return [np.asarray(params[layer][part]) for layer, part in parts], int((batches >= 0).sum())


def main(folder: str) -> None:
    """Plays all rounds."""
    os.environ.update(QUIET)
    paths = [str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # of Ray's workers
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    data, rounds = (np.load(pathlib.Path(folder) / f"{name}.npz") for name in ("data", "rounds"))
    names = sorted(name for name in data.files if name.startswith("params/"))
    num_rounds = 1 + max(int(name.split("/")[0]) for name in rounds.files)
    cohort = sum(name.startswith("0/") for name in rounds.files)
    client_app, server_app, stamps = ClientApp(), ServerApp(), []

    @client_app.train()
    def train(message: Any, context: Any) -> Any:
        from flower_simulation import trained as own

        config = message.content["config"]
        leaves = message.content["arrays"].to_numpy_ndarrays()
        after, count = own(folder, config["server-round"] - 1, config["place"], leaves)
        content = {"arrays": ArrayRecord(after), "metrics": MetricRecord({"num-examples": count})}
        return Message(RecordDict(content), reply_to=message)

    class Recorded(FedAvg):
        """FedAvg whose i-th node trains as the i-th client of the round."""

        def configure_train(self, server_round: int, *rest: Any) -> Any:
            stamps.append(time.perf_counter())
            for place, message in enumerate(super().configure_train(server_round, *rest)):
                config = type(message.content["config"])(
                    {**message.content["config"], "place": place, "server-round": server_round}
                )
                content = {"arrays": message.content["arrays"], "config": config}
                yield Message(RecordDict(content), message.metadata.dst_node_id, "train")

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            done = super().aggregate_train(server_round, replies)
            if server_round == 1:
                after = dict(zip(names, done[0].to_numpy_ndarrays(), strict=True))
                np.savez(pathlib.Path(folder) / "after.npz", **after)
            stamps.append(time.perf_counter())
            return done

    @server_app.main()
    def serve(grid: Any, context: Any) -> None:
        strategy = Recorded(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=cohort,
            min_available_nodes=cohort,
        )  # fmt: skip
        first = ArrayRecord([data[name] for name in names])
        strategy.start(grid=grid, initial_arrays=first, num_rounds=num_rounds)

    backend = {
        "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},
        "init_args": {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False},
    }
    run_simulation(server_app, client_app, num_supernodes=cohort, backend_config=backend)
    if len(stamps) != 2 * num_rounds:
        raise RuntimeError(f"{len(stamps) // 2} of {num_rounds} rounds were played.")
    print(json.dumps([end - begin for begin, end in zip(stamps[::2], stamps[1::2])]))


if __name__ == "__main__":
    main(sys.argv[1])
