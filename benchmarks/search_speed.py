"""Candidates per second: one masked program for all, against a new slice for each.

    python benchmarks/search_speed.py [--quick]

Both sides score the same candidates of ResNet-20 (half of its multiply-adds; `--quick`: a narrow
network) on the same images without re-estimation. Compilation is included: the masked program is
compiled once, each slice by itself, as pruning libraries do. The masked side scores all
`candidates`; the serial side scores `serial` of them, and its time is scaled up, since all cost the
same. The last line is one JSON
object; "vs_serial" is serial seconds over masked seconds for all candidates.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.model import Model, Variables
from jaxfm.models import build, resnet_config
from jaxfm.search import (
    Network,
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


class Race(NamedTuple):
    """Candidates of one network, and the images that they are scored on.

    Attributes:
      network, variables: the dense network.
      order: `ranks`: which units go first.
      counts: i32[N, G], channels of each candidate.
      images, labels: f32[B, H, W, C] and i32[B].
    """

    network: Network
    variables: Variables
    order: Any
    counts: jax.Array
    images: jax.Array
    labels: jax.Array


def race(
    model: Model, variables: Variables, images: jax.Array, labels: jax.Array, number: int,
    macs: float = 0.5,
) -> Race:  # fmt: skip
    """As many random candidates as `number`, all with a share `macs` of the multiply-adds."""
    net = model_network(model, variables, images)
    order = jax.jit(lambda v: ranks(importance(net, v, "l2")))(variables)
    project = projection(net.sizes, budgets(net, macs=macs))
    logits = jax.random.normal(jax.random.key(1), (number, len(net.groups)))
    counts = jax.jit(jax.vmap(project))(logits)
    return Race(net, variables, order, counts, images, labels)


def score(out: jax.Array, labels: jax.Array) -> jax.Array:
    return (out.argmax(-1) == labels).astype(jnp.float32).mean()


def masked_scores(race: Race, width: int | None = None) -> Callable[[jax.Array], jax.Array]:
    """`(counts i32[n, G]) -> accuracies f32[n]`, one program, `width` candidates side by side."""
    run = masked(race.network)

    def every(variables, order, counts, images, labels):
        one = lambda c: score(run(variables, masks(order, c), images), labels)
        return jax.lax.map(one, counts, batch_size=width)

    compiled = jax.jit(every)
    return lambda counts: compiled(race.variables, race.order, counts, race.images, race.labels)


def sliced_score(race: Race, counts: np.ndarray) -> Callable[[], jax.Array]:
    """`() -> accuracy` of one candidate, cut out of the network; the first call compiles it."""
    kept = keep(race.order, counts)
    small = cut(race.network, race.variables, kept)
    run = jax.jit(sliced(race.network, kept))
    return lambda: score(run(small, race.images), race.labels)


def main(config: Config) -> None:
    quick = config.quick
    model = tiny_resnet() if quick else build(resnet_config(20))
    side, number, some = (8, 64, 3) if quick else (32, config.candidates, config.serial)
    images = jax.random.normal(jax.random.key(0), (config.images, side, side, 3))
    labels = jnp.arange(config.images) % 5
    candidates = race(model, random_variables(model), images, labels, number)

    began = time.perf_counter()
    found = np.asarray(masked_scores(candidates)(candidates.counts))
    together = time.perf_counter() - began

    began = time.perf_counter()
    alone = [sliced_score(candidates, row)() for row in np.asarray(candidates.counts[:some])]
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
