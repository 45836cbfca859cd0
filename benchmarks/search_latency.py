"""VGG-16 at a fifth of its multiply-adds: latency and memory of the compiled network, and a table.

    python benchmarks/search_latency.py [--quick]

The dense network and a slice (uniform widths, exact multiply-adds) run on the same images in turns.
Memory is what the compiler allocates for each executable: parameters, temporaries and outputs. Then
a latency table is fitted to slices of the network; its error is that on slices that it did not see.
The last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.models import build, vgg_config
from jaxfm.search import fit_latency, full, model_network, prune, sliced
from jaxfm.testing import random_variables


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    quick: bool = option(False, "VGG-11 on 32x32 images, few repeats")
    macs: float = option(0.2, "share of the multiply-adds that remains")
    repeats: int = option(9, "calls of each network; the median counts")
    samples: int = option(0, "slices that the latency table is fitted to; 0: no table")

    def __post_init__(self):
        check(self)


def compiled(run: Any, params: Any, images: Any) -> Any:
    return jax.jit(run).lower(params, images).compile()


def megabytes(program: Any) -> float:
    stats = program.memory_analysis()
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return sum(getattr(stats, part) for part in parts) / 1e6


def main(config: Config) -> None:
    quick = config.quick
    model = build(vgg_config(11, cifar=True)) if quick else build(vgg_config(16))
    side = 32 if quick else 224
    result: dict[str, Any] = {"name": "search_latency", "network": "vgg11" if quick else "vgg16"}
    variables = random_variables(model)
    for batch in (1, 8):
        images = jax.random.normal(jax.random.key(0), (batch, side, side, 3))
        net = model_network(model, variables, images)
        small = prune(net, variables, images, macs_ratio=config.macs)
        programs = {
            "dense": (compiled(sliced(net, full(net)), variables, images), variables),
            "sliced": (compiled(small.apply, small.params, images), small.params),
        }
        times: dict[str, list[float]] = {name: [] for name in programs}
        for turn in range(1 + (3 if quick else config.repeats)):
            for name, (run, params) in programs.items():
                began = time.perf_counter()
                jax.block_until_ready(run(params, images))
                if turn:
                    times[name].append(time.perf_counter() - began)
        ms = {name: 1e3 * statistics.median(x) for name, x in times.items()}
        memory = {name: megabytes(run) for name, (run, _) in programs.items()}
        print(f"batch {batch}: {ms} ms, {memory} MB", flush=True)
        if batch == 1:
            result |= {
                "vgg_speedup": round(ms["dense"] / ms["sliced"], 2),
                "vgg_memory_saved_mb": round(memory["dense"] - memory["sliced"], 1),
                "macs_share": round(small.table()["macs"][1] / small.table()["macs"][0], 4),
            }
        result[f"speedup_batch_{batch}"] = round(ms["dense"] / ms["sliced"], 2)
    if config.samples:
        table = fit_latency(net, variables, jnp.asarray(np.asarray(images)), samples=config.samples)
        result["latency_table_error"] = round(table.error, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    configs.run(main, Config)
