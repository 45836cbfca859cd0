"""What a client's training needs of memory, by what is trained and how.

    python benchmarks/client_memory.py [--quick]

One client of a small decoder, Adam, batches of rows. Columns, in megabytes: "state" is what the
ledger counts by shapes alone (parameters, optimizer state, a gradient); "ledger" is what it says of
the compiled program (`compiled_costs`: the download, activations and the upload, too); "process" is
how much larger the resident memory of a process gets, at its fullest, while the client runs in it,
the download included (Linux only; each row in a process of its own). Rows are the method, what it
is done with (`Local(microbatch=...)`, layers computed again in the backward pass, a backbone of few
bits), and share is "ledger" over that of full training.

The last line is one JSON object; "ledger_over_process" is the mean of that ratio, and
"largest_gap" the ratio's largest distance from 1.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

# Buffers do not depend on how well machine code is optimized, and no time is measured.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np
import optax

from jaxfm import adapters, tasks
from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.data.federation import federate
from jaxfm.federated import (
    Local,
    Population,
    client_costs,
    client_data,
    client_key,
    compiled_costs,
    fed_avg,
    profiles,
    run_client,
)
from jaxfm.federated.client import first_memory, send
from jaxfm.model import Model
from jaxfm.models.families.decoder import DecoderConfig, decoder

TASK = tasks.causal_lm()
QUARTER = "microbatch 1/4"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    quick: bool = option(False, "a smaller model, and four rows")
    length: int = option(64, "tokens of a row")
    batch_size: int = option(16, "rows of a step")

    def __post_init__(self):
        check(self)


class Row(NamedTuple):
    """What is trained, of which backbone, and how."""

    adapted: Callable[[Model], Model] = lambda model: model
    bits: str = ""
    remat: bool = False
    pieces: int = 1


LORA = functools.partial(adapters.lora, rank=8, targets="linear")
PROMPT = functools.partial(adapters.soft_prompt, num_tokens=8)
ROWS = {
    "full": Row(),
    f"full, {QUARTER}": Row(pieces=4),
    "full, layers recomputed": Row(remat=True),
    "full, both": Row(remat=True, pieces=4),
    "lora": Row(LORA),
    f"lora, {QUARTER}": Row(LORA, pieces=4),
    "lora, layers recomputed": Row(LORA, remat=True),
    "lora, backbone of 4 bits": Row(LORA, bits="nf4"),
    "lora, 4 bits, both": Row(LORA, bits="nf4", remat=True, pieces=4),
    "prompt": Row(PROMPT),
    f"prompt, {QUARTER}": Row(PROMPT, pieces=4),
    "head": Row(adapters.head_only),
    f"head, {QUARTER}": Row(adapters.head_only, pieces=4),
}
QUICK = ("full", f"full, {QUARTER}", "lora, backbone of 4 bits")


def setting(row: Row, config: Config) -> tuple[Any, Population, Model]:
    """The algorithm of a row, its two clients, and the model that they train."""
    width = 64 if config.quick else 256
    sizes: dict[str, Any] = {"embed_dim": width, "num_layers": 4, "num_heads": 8}
    base = decoder(DecoderConfig(vocab_size=256, mlp_dim=3 * width, remat=row.remat, **sizes))
    model = row.adapted(adapters.quantized(base, row.bits) if row.bits else base)
    size = config.batch_size
    local = Local(optax.adam(1e-3), size, microbatch=size // row.pieces if row.pieces > 1 else 0)
    noise = np.random.default_rng(0)
    rows = {"tokens": noise.integers(0, 256, (2 * size, config.length + 1)).astype(np.int32)}
    data = federate(rows, np.split(np.arange(2 * size), 2))
    return fed_avg(model, TASK, local), Population(data, profiles(2), np.zeros(2, np.int32)), model


def resident(name: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at its fullest."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status does not name {name}.")


def measured(name: str, config: Config, answer: Any) -> None:
    """Sends how much this process grows while a client runs a second time: it is compiled then."""
    algorithm, people, model = setting(ROWS[name], config)
    (bucket,) = algorithm.buckets
    variables = jax.jit(model.init)(jax.random.key(0))
    download = send(bucket, algorithm.init(variables))
    data, profile = client_data(people, 0)
    run_key = jax.random.key(1)
    memory = first_memory(bucket, download, data, profile, client_key(run_key, 0, None))
    go = lambda number: run_client(
        bucket, download, memory, data, profile, client_key(run_key, 0, number)
    )
    go(0)
    ctypes.CDLL(None).malloc_trim(0)  # what the first round freed
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    go(1)
    answer.send(resident("VmHWM") - before)


def grown(name: str, config: Config) -> float:
    """How much a process grows in a client's round, in bytes; NaN where that is not told."""
    if not pathlib.Path("/proc/self/clear_refs").exists():
        return float("nan")
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=measured, args=(name, config, other))
    process.start()
    other.close()
    try:
        return float(mine.recv())
    except EOFError as error:
        raise ValueError("The process that runs a client ended before it answered.") from error
    finally:
        process.join()


def main(config: Config) -> None:
    """Prints the table and the line."""
    table: dict[str, dict[str, float]] = {}
    print(f"{'':26}   state  ledger process  share")
    for name in QUICK if config.quick else tuple(ROWS):
        algorithm, people, model = setting(ROWS[name], config)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        (state,), (whole,) = (
            count(algorithm, people, shapes) for count in (client_costs, compiled_costs)
        )
        figures = {
            "state": state.memory_bytes, "ledger": whole.memory_bytes,
            "process": grown(name, config),
        }  # fmt: skip
        table[name] = own = {key: round(value / 1e6, 2) for key, value in figures.items()}
        own["share"] = round(own["ledger"] / table["full"]["ledger"], 3)
        print(
            f"{name:26} {own['state']:7.2f} {own['ledger']:7.2f} {own['process']:7.2f} "
            f"{own['share']:6.3f}",
            flush=True,
        )
    ratios = np.array([own["ledger"] / own["process"] for own in table.values()])
    print(json.dumps({
        "name": "client_memory", "ledger_over_process": round(float(ratios.mean()), 3),
        "largest_gap": round(float(np.abs(ratios - 1).max()), 3), "megabytes": table,
        "quick": config.quick,
    }))  # fmt: skip


if __name__ == "__main__":
    configs.run(main, Config)
