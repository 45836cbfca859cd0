"""Part 2: rounds of 1000 tiny clients and of 100 clients with a CNN, all of them every round.

Ours is one compiled program a round; how many clients train side by side is measured first. The
other sides are loops over clients in Python with the same batches: `steps`, a jitted step with
donated weights, and `fits`, a jitted loop over all batches of a client. The faster one counts.
Both must reach our parameters; that is checked with products in full float32 precision.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import rounds as bench
from jax import lax

from accelerator_parts.frame import Case, Figures, Part, Setting, digits, fastest
from jaxfm.data.federation import federate
from jaxfm.data.partition import dirichlet, iid
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.models.families.cnn import CnnConfig, cnn, mlp
from jaxfm.tasks import classification

LARGEST_DISTANCE = 1e-4  # of parameters after a round, relative: rounding of sums in another order


def make_work(name: str, setting: Setting) -> bench.Work:
    """All clients take part: 1000 with 60 images and an MLP, or 100 with about 600 and a CNN."""
    count = {"tiny": (1000, 60), "cnn": (100, 600)}[name]
    clients, each = (20, 40) if setting.dry else count
    data = bench.load(bench.Config(quick=setting.dry, data_dir=""))
    data = {leaf: rows[: clients * each] for leaf, rows in data.items()}
    if name == "tiny":
        return bench.Work(
            name, mlp(), federate(data, iid(clients * each, clients, seed=1)), clients
        )
    parts = dirichlet(data["label"], clients, beta=0.5, seed=1, min_examples=bench.BATCH)
    if setting.dry:
        parts = [part[: 2 * bench.BATCH] for part in parts[:4]]
    small = CnnConfig(image_size=(28, 28), conv_channels=(2, 4), dense_dim=8)
    model = cnn(small) if setting.dry else cnn()
    return bench.Work(name, model, federate(data, parts), len(parts))


def fits(work: bench.Work) -> Callable:
    """round(params, rows of each client's batches) -> params: one call a client and one to add."""
    images, labels = (jax.device_put(work.federation.examples[n]) for n in ("image", "label"))
    step = bench.sgd_step(bench.forward)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total, params, rows, num_steps, images, labels):
        def body(i, own):
            real = (rows[i] >= 0).astype(jnp.float32)
            place = jnp.maximum(rows[i], 0)
            return step(own, images[place], labels[place], real)

        count = (rows >= 0).sum().astype(jnp.float32)
        own = lax.fori_loop(0, num_steps, body, params)
        return jax.tree.map(lambda t, p: t + count * p, total, own)

    divide = jax.jit(lambda total, count: jax.tree.map(lambda t: t / count, total))

    def one_round(params, clients):
        longest, seen = max(map(len, clients)), 0
        total = jax.tree.map(jnp.zeros_like, params)
        for rows in clients:
            padded = np.pad(rows, ((0, longest - len(rows)), (0, 0)), constant_values=-1)
            total = add(total, params, padded, np.int32(len(rows)), images, labels)
            seen += int((rows >= 0).sum())
        return divide(total, np.float32(seen))

    return one_round


class Sides:
    """One workload: our engine by width, and the loops."""

    def __init__(self, name: str, setting: Setting):
        self.work, self.key = make_work(name, setting), jax.random.key(setting.seed + 1)
        self.variables = self.work.model.init(jax.random.key(setting.seed))
        self.algorithm = fed_avg(self.work.model, classification(10), bench.LOCAL)
        self.repeats = 2 if setting.dry else 5
        self.loops = {"steps": bench.hand_written(self.work, "device"), "fits": fits(self.work)}

    @functools.cached_property
    def batches(self):
        """The rows of each client's batches in the first round, as the engine draws them."""
        return bench.recorded(self.work, self.key, 1)[0]

    def engine(self, width: int):
        return bench.engine_of(self.work, self.algorithm, 1, width)

    def ours_seconds(self, engine) -> float:
        """The median seconds of a round after the first."""
        state, taken = engine.init(self.variables, self.key), []
        for _ in range(1 + self.repeats):
            began = time.perf_counter()
            state = jax.block_until_ready(engine.run(state)[0])
            taken.append(time.perf_counter() - began)
        return float(np.median(taken[1:]))

    def loop_seconds(self, one_round: Callable) -> float:
        """The same of a loop; every round has the first one's batches."""
        params, taken = self.variables.params, []
        for _ in range(1 + self.repeats):
            began = time.perf_counter()
            params = jax.block_until_ready(one_round(params, self.batches))
            taken.append(time.perf_counter() - began)
        return float(np.median(taken[1:]))

    def distances(self, engine) -> dict[str, float]:
        """How far each loop ends from our parameters after a round, relative."""
        # A CPU multiplies so anyway; its programs need not be compiled again.
        with jax.default_matmul_precision(None if jax.default_backend() == "cpu" else "highest"):
            ours = engine.run(engine.init(self.variables, self.key))[0].server.variables.params
            found = {n: run(self.variables.params, self.batches) for n, run in self.loops.items()}
        return {name: bench.distance(ours, params) for name, params in found.items()}


def widths(clients: int, dry: bool) -> tuple[int, ...]:
    """Numbers of clients side by side that are tried."""
    if dry:
        return (1, clients)
    return tuple(sorted({1, clients, *(w for w in (10, 50, 250) if w < clients)}))


def measure(name: str, setting: Setting, note) -> Figures:
    """A round's time by clients side by side, then ours and the loops in turn."""
    sides = Sides(name, setting)
    seconds: dict[int, float] = {}
    figures: Figures = {"clients": sides.work.cohort_size}
    for width in widths(sides.work.cohort_size, setting.dry):
        try:
            seconds[width] = sides.ours_seconds(sides.engine(width))
        except jax.errors.JaxRuntimeError as error:  # too wide for the memory
            print(f"{name}: {width} clients side by side fail: {str(error)[:200]}", flush=True)
            continue
        figures["ms_a_round_by_width"] = {str(w): digits(1e3 * s) for w, s in seconds.items()}
        note(figures)
        setting.clock.check(0.0)
    width = fastest(seconds)
    engine = sides.engine(width)
    apart = sides.distances(engine)
    if not max(apart.values()) < LARGEST_DISTANCE:
        raise AssertionError(f"{name}: the loops end {apart} from ours after a round.")
    # Both sides in turn, in one run, at the width that was chosen before.
    loops = {side: sides.loop_seconds(run) for side, run in sides.loops.items()}
    ours = sides.ours_seconds(engine)
    best = min(loops, key=lambda side: loops[side])
    return figures | {
        "width": width,
        "ours_ms_a_round": digits(1e3 * ours),
        "loop_ms_a_round": {side: digits(1e3 * s) for side, s in loops.items()},
        "steps_a_round": sum(map(len, sides.batches)),
        "vs_loop": digits(loops[best] / ours),
        "loop": best,
        "distance": {side: digits(d, 2) for side, d in apart.items()},
    }


def cases(setting: Setting) -> dict[str, Case]:
    return {
        name: Case(lambda done, note, n=name: measure(n, setting, note), 60)
        for name in ("tiny", "cnn")
    }


def ratio(figures: dict[str, Figures]) -> float | None:
    """How many times as fast as the jitted loop a round of tiny clients is."""
    return figures.get("tiny", {}).get("vs_loop")


PART = Part(
    "part2_rounds", cases, ratio,
    "seconds of the faster loop over ours, a round of all tiny clients",
)  # fmt: skip
