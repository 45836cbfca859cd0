"""Clients one after another or side by side: the time of a round, on one device and on two.

    python benchmarks/widths.py [--quick]

A width is how many clients the engine trains at once under vmap on one device
(`compile_rounds(clients_at_once=)`); the devices are host devices, one core each.
`jaxfm.federated.rounds.default_clients_at_once` is based on these figures: medians over rounds,
taken in turn. The last line is one JSON object, [processor, wall] seconds of a round; a ratio above
1 means that one client at a time is faster.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time

import jax
import numpy as np
from rounds import LOCAL, Config, engine_of, load, make_work

from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.models.families.cnn import mlp
from jaxfm.tasks import classification

# (devices, clients at once on each)
PLANS = {"1": (1, 1), "10": (1, 10), "all": (1, 50), "1, two devices": (2, 1)}


@dataclasses.dataclass(frozen=True)
class WidthsConfig:
    """What is timed."""

    quick: bool = option(False, "a tenth of the images and no cnn: under 45 s")
    repeats: int = option(5, "rounds of each plan that are counted")

    def __post_init__(self):
        check(self)
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats}: give at least 1.")


def main(config: WidthsConfig) -> None:
    flags = "--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=2"
    os.environ["XLA_FLAGS"] = flags
    data = load(Config(quick=config.quick))
    tiny = make_work("tiny", data, config.quick)
    works = {"mlp": tiny, "logistic": tiny._replace(model=mlp((784, 10)))}
    if not config.quick:
        works["cnn"] = make_work("cnn", data, quick=False)
    seconds: dict[str, dict[str, list[float]]] = {}
    for name, work in works.items():
        algorithm = fed_avg(work.model, classification(10), LOCAL)
        plans = {plan: how for plan, how in PLANS.items() if name != "cnn" or plan != "10"}
        engines = {plan: engine_of(work, algorithm, *how) for plan, how in plans.items()}
        variables = work.model.init(jax.random.key(0))
        states = {plan: e.init(variables, jax.random.key(1)) for plan, e in engines.items()}
        took: dict[str, list[tuple[float, float]]] = {plan: [] for plan in plans}
        for _ in range(1 + config.repeats):  # the first one compiles
            for plan, engine in engines.items():
                cpu, wall = time.process_time(), time.perf_counter()
                states[plan], _ = jax.block_until_ready(engine.run(states[plan]))
                took[plan].append((time.process_time() - cpu, time.perf_counter() - wall))
        seconds[name] = {p: np.median(t[1:], axis=0).round(4).tolist() for p, t in took.items()}
        print(f"{name}, [processor, wall] seconds a round by width: {seconds[name]}", flush=True)
    ratios = {
        f"{name}_all_over_1": round(s["all"][0] / s["1"][0], 3) for name, s in seconds.items()
    }
    print(json.dumps({"name": "widths"} | ratios | {"seconds": seconds}))


if __name__ == "__main__":
    configs.run(main, WidthsConfig)
