"""Candidates a second: one masked program for all, against a slice traced anew for each.

    python benchmarks/search_speed.py [--quick]

Both sides score the same candidates of ResNet-20 (half of its multiply-adds; `--quick`: a narrow
network) on the same images without re-estimation, compilation included: the masked program once,
the slices each, as pruning libraries do. The masked side scores all `candidates`; the serial side
as many as `serial`, and its time is scaled up, since each costs alike. The last line is one JSON
object; "vs_serial" is serial seconds over masked seconds for all candidates.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.models import build, resnet_config
from jaxfm.search import (
    budgets,
    cut,
    importance,
    keep,
    masked,
    masks,
    model_network,
    projection,
    ranks,
    sliced,
)
from jaxfm.testing import random_variables, tiny_resnet


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    quick: bool = option(False, "a narrow network and few candidates")
    candidates: int = option(500, "scored by the masked program")
    serial: int = option(12, "scored one at a time; the time of all is scaled up from these")
    images: int = option(64, "that each candidate is scored on")

    def __post_init__(self):
        check(self)


def main(config: Config) -> None:
    quick = config.quick
    model = tiny_resnet() if quick else build(resnet_config(20))
    side, number, some = (8, 64, 3) if quick else (32, config.candidates, config.serial)
    images = jax.random.normal(jax.random.key(0), (config.images, side, side, 3))
    labels = jnp.arange(config.images) % 5
    variables = random_variables(model)
    net = model_network(model, variables, images)
    order = jax.jit(lambda v: ranks(importance(net, v, "l2")))(variables)
    project = projection(net.sizes, budgets(net, macs=0.5))
    logits = jax.random.normal(jax.random.key(1), (number, len(net.groups)))
    counts = jax.jit(jax.vmap(project))(logits)
    score = lambda out: (out.argmax(-1) == labels).astype(jnp.float32).mean()

    began = time.perf_counter()
    run = masked(net)
    one = lambda variables, order, c: score(run(variables, masks(order, c), images))
    every = jax.jit(lambda v, order, c: jax.lax.map(lambda x: one(v, order, x), c))
    found = np.asarray(every(variables, order, counts))
    together = time.perf_counter() - began

    alone: list[Any] = []
    began = time.perf_counter()
    for row in np.asarray(counts[:some]):
        kept = keep(order, row)
        small = cut(net, variables, kept)
        run = jax.jit(sliced(net, kept))
        alone.append(score(run(small, images)))
    serial = (time.perf_counter() - began) / some * number
    gap = float(np.abs(found[:some] - np.array(alone)).max())
    print(f"masked {together:.1f} s, serial {serial:.1f} s for {number} candidates")
    result = {
        "name": "search_speed",
        "candidates_per_s": round(number / together, 2),
        "serial_per_s": round(number / serial, 3),
        "vs_serial": round(serial / together, 2),
        "largest_difference_of_scores": gap,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    configs.run(main, Config)
