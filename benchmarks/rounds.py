"""What a round of federated averaging costs: the engine, a hand-written loop, plain training.

    python benchmarks/rounds.py [--quick | --full] [--data_dir=FOLDER]

The same clients, batches and starting weights on three sides, in turn, in one process on one core:

- ours: `jaxfm.federated.compile_rounds` with `fed_avg`, one call for each round;
- loop: a Python loop over clients and batches with a jitted step, weights donated, pooling by
  reshape, examples on the device or on the host, whichever is faster; and the simple loop that one
  writes first, which donates nothing and averages by `jax.tree.map`;
- plain: as many steps of the same batch size on one data set, in one compiled scan.

Where they are installed, two libraries play the same rounds: DrJAX in turn with these sides (all
clients of a round at a time, or one, whichever is faster), and Flower's simulation engine
(flwr[simulation], Ray with one worker, its step the loop's) in a process of its own, with ours
before and after it; both must reach the same parameters.

Figures are processor seconds, so that a busy machine disturbs them little: medians of a round over
repetitions, and what the first round takes longer, to compile. Ours and the loop must reach the
same parameters, or the script fails. The last line is one JSON object: "*_vs_loop" is the loop's
seconds over ours, "*_vs_simple_loop" the simple loop's, "*_vs_plain_training" plain training's,
"*_vs_drjax" DrJAX's; "simulation_vs_flower_simulation" is Flower's time by the clock over ours.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from round_peers import flower_simulation
from round_peers.drjax_round import drjax_round

from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.data.federation import Federation, federate
from jaxfm.data.idx import mnist
from jaxfm.data.partition import dirichlet, iid
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithm import Algorithm, Bucket
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.local import Local, local_fit
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import Rounds, compile_rounds
from jaxfm.model import Model, Variables
from jaxfm.models.families.cnn import cnn, mlp
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tasks import classification

BATCH = 20
LEARNING_RATE = 0.05
LOCAL = Local(optax.sgd(LEARNING_RATE), BATCH)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    quick: bool = option(False, "a tenth of the images, a fifth of the cnn's cohort: under 45 s")
    full: bool = option(False, "9 repetitions of each side instead of 3 (tiny: 5)")
    data_dir: str = option(
        os.environ.get("JAXFM_DATA_DIR", ""),
        "folder with MNIST in its four files, or in mnist/ below it; else images are made up",
    )

    def __post_init__(self):
        check(self)
        if self.quick and self.full:
            raise ValueError("quick and full: give one of them.")


class Work(NamedTuple):
    """One workload: cohort_size clients a round train the model for one epoch."""

    name: str
    model: Model
    federation: Federation
    cohort_size: int


def main(config: Config) -> None:
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    data = load(config)
    print(f"jax {jax.__version__}, {jax.default_backend()}; {len(data['label'])} images")
    results = {name: compare(make_work(name, data, config.quick), 9 if config.full else repeats)
               for name, repeats in (("tiny", 3 if config.quick else 5), ("cnn", 3))}  # fmt: skip
    line: dict = {"name": "rounds"}
    for name, result in results.items():
        line |= {f"{name}_{key}": ratio for key, ratio in result["ratios"].items()}
    if all(map(importlib.util.find_spec, ("flwr", "ray"))):
        rounds = 1 + (3 if config.quick else 5)
        line |= against_flower(make_work("tiny", data, config.quick), rounds)
    for key in ("seconds", "compile_s"):
        line[key] = {name: result[key] for name, result in results.items()}
    line["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(line))


def load(config: Config) -> dict[str, np.ndarray]:
    """Leaves "image" f32[N, 28, 28, 1] and "label" i32[N]: MNIST, or noise over prototypes."""
    size = 6000 if config.quick else 60_000
    if config.data_dir:
        below = Path(config.data_dir) / "mnist"
        train = mnist(below if below.is_dir() else config.data_dir)["train"].examples
        image = train["image"][:size].astype(np.float32) / 255
        return {"image": image, "label": train["label"][:size]}
    rng = np.random.default_rng(0)
    label = rng.integers(0, 10, size, dtype=np.int32)
    prototypes = np.kron(rng.standard_normal((10, 7, 7), np.float32), np.ones((4, 4), np.float32))
    image = rng.standard_normal((size, 28, 28), np.float32) + 0.7 * prototypes[label]
    return {"image": (0.25 * image)[..., None], "label": label}


def make_work(name: str, data: dict[str, np.ndarray], quick: bool) -> Work:
    """The clients and the model of a comparison."""
    size = len(data["label"])
    if name == "cnn":
        num_clients, cohort_size = (20, 2) if quick else (100, 10)
        parts = dirichlet(data["label"], num_clients, beta=0.5, seed=1, min_examples=BATCH)
        return Work(name, cnn(), federate(data, parts), cohort_size)
    parts = iid(size - size % 60, size // 60, seed=1)
    return Work(name, mlp(), federate(data, parts), 50)


def engine_of(
    work: Work, algorithm: Algorithm, devices: int = 1, clients_at_once: int | None = None
) -> Rounds:
    num_clients = len(work.federation.count)
    people = Population(work.federation, profiles(num_clients), np.zeros(num_clients, np.int32))
    mesh = make_mesh(clients=devices, devices=jax.devices()[:devices])
    return compile_rounds(
        algorithm,
        people,
        cohort_size=work.cohort_size,
        mesh=mesh,
        clients_at_once=clients_at_once,
    )


def compare(work: Work, repeats: int) -> dict:
    """Processor seconds a round of each side, medians; ratios to ours, medians over rounds."""
    key, variables = jax.random.key(1), work.model.init(jax.random.key(0))
    engine = engine_of(work, fed_avg(work.model, classification(10), LOCAL))
    schedule = recorded(work, key, 1 + repeats)
    sides: dict[str, Callable] = {
        "ours": lambda state, clients: engine.run(state)[0],
        "loop, device": hand_written(work, "device"),
        "loop, host": hand_written(work, "host"),
        "simple loop": hand_written(work, "host", tuned=False),
        "plain": plain_training(work),
    }
    if importlib.util.find_spec("drjax") is not None:
        widths = {"drjax, side by side": work.cohort_size, "drjax, in turn": 1}
        most = max(len(batches) for cohort in schedule for batches in cohort)
        sides |= {side: mapped(work, width, most) for side, width in widths.items()}
    states = {side: jax.tree.map(jnp.copy, variables.params) for side in sides}
    states["ours"] = engine.init(variables, key)
    took: dict[str, list[float]] = {side: [] for side in sides}
    apart: list[float] = []
    for clients in schedule:
        for side, run in sides.items():
            start = time.process_time()
            states[side] = jax.block_until_ready(run(states[side], clients))
            took[side].append(time.process_time() - start)
        ours = states["ours"].server.variables.params
        apart.append({
            side: distance(ours, states[side])
            for side in sides if side.startswith(("loop, device", "drjax"))
        })  # fmt: skip
    for side, first in apart[0].items():
        # Rounding leaves 1e-7. DrJAX's convolutions round differently, which some 20 steps later
        # turns a ReLU or a maximum the other way: 1e-5 of the norm, and more with each step.
        most_apart = 1e-3 if work.name == "cnn" and side.startswith("drjax") else 1e-5
        if not first < most_apart:
            raise AssertionError(f"{work.name}: {side} ends {first:.1e} from ours after a round.")
    counted = {side: np.array(times[1:]) for side, times in took.items()}
    seconds = {side: round(float(np.median(times)), 4) for side, times in counted.items()}
    loop = min(("loop, device", "loop, host"), key=seconds.get)
    compile_s = round(took["ours"][0] - seconds["ours"], 1)
    print(f"{work.name}: processor seconds a round {seconds}, to compile ours {compile_s}; "
          f"distance from the loop's parameters {apart}", flush=True)  # fmt: skip
    ratio = lambda side: round(float(np.median(counted[side] / counted["ours"])), 3)
    vs = {
        "vs_loop": ratio(loop),
        "vs_simple_loop": ratio("simple loop"),
        "vs_plain_training": ratio("plain"),
    }
    if mapping := [side for side in sides if side.startswith("drjax")]:
        vs["vs_drjax"] = ratio(min(mapping, key=seconds.get))
    return {"ratios": vs, "seconds": seconds, "compile_s": compile_s}


def mapped(work: Work, width: int, steps: int) -> Callable:
    """round(params, rows of each client's batches, `steps` at most) -> params, by DrJAX."""
    examples = work.federation.examples
    shape = (work.cohort_size, steps, BATCH)
    step = sgd_step(lambda params, x: work.model.apply(Variables(params, {}, {}), x)[0])
    return drjax_round(step, examples["image"], examples["label"], shape, width)


def against_flower(work: Work, num_rounds: int) -> dict[str, object]:
    """Seconds by the clock of a round of Flower's simulation, and of ours before and after it."""
    key, variables = jax.random.key(1), work.model.init(jax.random.key(0))
    engine = engine_of(work, fed_avg(work.model, classification(10), LOCAL))
    schedule = recorded(work, key, num_rounds)
    after, ours = timed(engine, variables, key, num_rounds)
    leaves = {
        "params/" + "/".join(entry.key for entry in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables.params)
    }
    examples = work.federation.examples
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/data.npz", images=examples["image"], labels=examples["label"], **leaves)
        batches = {f"{r}/{i}": b for r, cohort in enumerate(schedule) for i, b in enumerate(cohort)}
        np.savez(f"{folder}/rounds.npz", **batches)
        words = [sys.executable, flower_simulation.__file__, folder]
        done = subprocess.run(words, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            print(f"Flower's simulation did not run: {done.stderr.strip()[-300:]}")
            return {}
        theirs = json.loads(done.stdout.strip().splitlines()[-1])
        found = np.load(f"{folder}/after.npz")
        apart = distance(after, flower_simulation.tree_of(found.files, [*found.values()]))
    if not apart < 1e-5:
        raise AssertionError(f"Flower ends {apart:.1e} from ours after a round.")
    ours += timed(engine, variables, key, num_rounds)[1]
    seconds = {"ours": float(np.median(ours)), "flower": float(np.median(theirs[1:]))}
    print(f"by the clock: {seconds}; {apart:.1e} apart after a round", flush=True)
    ratio = round(seconds["flower"] / seconds["ours"], 1)
    return {"simulation_vs_flower_simulation": ratio, "wall_seconds": seconds}


def timed(engine: Rounds, variables: Variables, key, num_rounds: int) -> tuple[dict, list[float]]:
    """The parameters after the first round, and seconds by the clock of the others."""
    state, took, first = engine.init(variables, key), [], {}
    for number in range(num_rounds):
        start = time.perf_counter()
        state = jax.block_until_ready(engine.run(state)[0])
        took.append(time.perf_counter() - start)
        if not number:
            first = jax.device_get(state.server.variables.params)
    return first, took[1:]


def distance(a, b) -> float:
    """The norm of a - b over the norm of a."""
    return float(optax.global_norm(jax.tree.map(jnp.subtract, a, b)) / optax.global_norm(a))


def recorded(work: Work, key, num_rounds: int) -> list[list[np.ndarray]]:
    """Per round and client, the rows i32[steps, BATCH] of its batches; -1 fills the last one.

    The engine itself tells: an algorithm that learns nothing, whose clients remember what came.
    """
    longest = -(-work.federation.index.longest // BATCH)
    blank = np.full((longest, BATCH), -1, np.int32)

    def loss(params, variables, batch, real, key):
        seen, step = variables.stats
        seen = seen.at[step].set(jnp.where(real > 0, batch["row"], -1))
        return 0 * params, ((seen, step + 1), 0.0, 0.0)

    def client(download, memory, data, profile, key):
        nothing = Variables(jnp.zeros(()), (jnp.asarray(blank), 0), {})
        trained, info = local_fit(loss, LOCAL)(nothing, data, profile.max_steps, key)
        return jnp.zeros(()), trained.stats[0], info

    bucket = Bucket(None, lambda server, public: server, client, lambda *_: blank)
    recorder = Algorithm(lambda x: x, (bucket,), lambda server, totals, public, key: (server, {}))
    rows = {"row": np.arange(len(work.federation.examples["label"]), dtype=np.int32)}
    engine = engine_of(work._replace(federation=work.federation._replace(examples=rows)), recorder)
    schedule = []
    for number in range(num_rounds):
        state = engine.init(jnp.zeros(()), key)._replace(round=jnp.int32(number))
        memories = np.asarray(engine.run(state)[0].memories[0])
        seen = [client[client[:, 0] >= 0] for client in memories]
        schedule.append([client for client in seen if len(client)])
    return schedule


def forward(params, x):
    """The two networks as one writes them by hand: images [B, 28, 28, 1] to logits [B, 10]."""

    def dense(name, x):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        return x @ kernel.reshape(x.shape[1], -1) + bias

    if "conv1" not in params:
        return dense("dense2", jax.nn.relu(dense("dense1", x.reshape(len(x), -1))))
    for name in ("conv1", "conv2"):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        x = lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + bias)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
    return dense("classifier", jax.nn.relu(dense("dense", x.reshape(len(x), -1))))


def sgd_step(apply: Callable) -> Callable:
    """step(params, images, labels, real f32[B]) -> params; `real` is 0 where a row is a filler."""

    def loss(params, images, labels, real):
        nats = optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels)
        return (nats * real).sum() / real.sum()

    def step(params, images, labels, real):
        grads = jax.grad(loss)(params, images, labels, real)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)

    return step


def hand_written(work: Work, place: str, tuned: bool = True) -> Callable:
    """round(params, rows of each client's batches) -> params, examples on "device" or "host".

    Tuned: weights donated, sums jitted. Else the loop that one writes first: a jitted step, and
    `jax.tree.map` for the mean.
    """
    examples = work.federation.examples["image"], work.federation.examples["label"]
    step = sgd_step(forward)
    if place == "device":
        examples = jax.device_put(examples)
        gathering = lambda params, images, labels, rows, real: step(
            params, images[rows], labels[rows], real
        )
        batch_of = lambda rows: (*examples, np.maximum(rows, 0), (rows >= 0).astype(np.float32))
    else:
        gathering = step
        batch_of = lambda rows: (*(leaf[rows] for leaf in examples), (rows >= 0).astype(np.float32))
    if not tuned:
        simple = jax.jit(gathering)

        def first_round(params, clients):
            total, seen = jax.tree.map(jnp.zeros_like, params), 0
            for batches in clients:
                local, count = params, int((batches >= 0).sum())
                for rows in batches:
                    local = simple(local, *batch_of(rows))
                total = jax.tree.map(lambda t, p: t + count * p, total, local)  # noqa: B023
                seen += count
            return jax.tree.map(lambda t: t / seen, total)

        return first_round
    # The first step must leave the server's weights alone; the others reuse the client's own.
    first_step, next_step = jax.jit(gathering), jax.jit(gathering, donate_argnums=0)
    add = jax.jit(
        lambda total, params, count: jax.tree.map(lambda t, p: t + count * p, total, params),
        donate_argnums=0,
    )
    divide = jax.jit(lambda total, count: jax.tree.map(lambda t: t / count, total))

    def one_round(params, clients):
        total, seen = jax.tree.map(jnp.zeros_like, params), 0
        for batches in clients:
            local, count = first_step(params, *batch_of(batches[0])), (batches >= 0).sum()
            for rows in batches[1:]:
                local = next_step(local, *batch_of(rows))
            total, seen = add(total, local, np.float32(count)), seen + count
        return divide(total, np.float32(seen))

    return one_round


def plain_training(work: Work) -> Callable:
    """train(params, clients) -> params: as many steps, full batches of all examples."""
    step = sgd_step(lambda params, x: work.model.apply(Variables(params, {}, {}), x)[0])
    order = np.random.default_rng(0).permutation(len(work.federation.examples["label"]))
    order = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH).astype(np.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(params, num_steps, order, images, labels):
        def body(i, params):
            rows = order[i % len(order)]
            return step(params, images[rows], labels[rows], jnp.ones(BATCH))

        return lax.fori_loop(0, num_steps, body, params)

    stored = jax.device_put((order, *(work.federation.examples[n] for n in ("image", "label"))))
    return lambda params, clients: train(params, np.int32(sum(map(len, clients))), *stored)


if __name__ == "__main__":
    configs.run(main, Config)
