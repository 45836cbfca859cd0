"""What one SGD step of a small CNN costs: dispatched from Python, inside a scan, under vmap.

    python benchmarks/conv_step.py [--quick]          # taskset -c 0 ... for one core

Times are processor milliseconds a client's step, the median of several runs, so a busy machine
disturbs them little. The network: 28x28x1 images, 5x5 convolutions of 32 and 64 channels, each
followed by relu and 2x2 pooling, dense 512, dense 10; batch 20, float32. All forms must reach the
same parameters, or the script fails. The last line is one JSON object.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxfm.conv import conv2d, max_pool

SHAPES = [(5, 5, 1, 32), (5, 5, 32, 64), (7 * 7 * 64, 512), (512, 10)]
BATCH = 20
LEARNING_RATE = 0.05
# Forward and two gradients of each product, less the gradient of the images.
MULTIPLICATIONS = (
    2 * 28 * 28 * 25 * 32 + 3 * 14 * 14 * 25 * 32 * 64 + 3 * 7 * 7 * 64 * 512 + 3 * 512 * 10
)
GFLOPS = 2e-9 * BATCH * MULTIPLICATIONS


def patches(x: Array, kernel: Array) -> Array:
    """Computes a SAME convolution with an odd kernel as one product of patches (im2col)."""
    size, _, channels, out = kernel.shape
    _, height, width, _ = x.shape
    edge = size // 2
    wide = jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    shifts = [(i, j) for i in range(size) for j in range(size)]
    columns = [wide[:, i : i + height, j : j + width] for i, j in shifts]
    return jnp.concatenate(columns, -1) @ kernel.reshape(size * size * channels, out)


def window_pool(x: Array, size: int) -> Array:
    window = (1, size, size, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


FORMS: dict[str, tuple[Callable, Callable]] = {
    "direct": (functools.partial(conv2d, method="direct"), max_pool),
    "canonical": (functools.partial(conv2d, method="canonical"), max_pool),
    "patches": (patches, max_pool),
    "direct, reduce_window": (functools.partial(conv2d, method="direct"), window_pool),
}


def initial_weights(rng: np.random.Generator) -> list[tuple[Array, Array]]:
    def layer(shape):
        bound = 1 / np.sqrt(np.prod(shape[:-1]))
        return jnp.asarray(rng.uniform(-bound, bound, shape), jnp.float32), jnp.zeros(shape[-1])

    return [layer(shape) for shape in SHAPES]


def make_step(conv: Callable, pool: Callable) -> Callable:
    """Returns `step(weights, images [B, 28, 28, 1], labels i32[B]) -> weights`."""

    def loss(weights, x, labels):
        for kernel, bias in weights[:2]:
            x = pool(jax.nn.relu(conv(x, kernel) + bias), 2)
        (w1, b1), (w2, b2) = weights[2:]
        logits = jax.nn.relu(x.reshape(len(x), -1) @ w1 + b1) @ w2 + b2
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    def step(weights, x, labels):
        gradient = jax.grad(loss)(weights, x, labels)
        return jax.tree.map(lambda w, g: w - LEARNING_RATE * g, weights, gradient)

    return step


def scanned(step: Callable) -> Callable:
    """All batches one after another, in one compiled loop."""

    def run(weights, batches):
        return lax.scan(lambda w, batch: (step(w, *batch), None), weights, batches)[0]

    return run


def clock(run: Callable, *args: Any, per: int, repeats: int) -> tuple[float, float, Any]:
    """Returns (processor ms a step, seconds of the first call, result)."""
    start = time.perf_counter()
    result = jax.block_until_ready(run(*args))
    first_s = time.perf_counter() - start
    took = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(run(*args))
        took.append(1e3 * (time.process_time() - start) / per)
    return statistics.median(took), first_s, result


def small_images(channels: int, repeats: int) -> dict[str, float]:
    """Returns processor ms of a 3x3 convolution and both gradients on 2x2 images, by method."""
    x = jnp.ones((BATCH, 2, 2, channels))
    kernel = jnp.full((3, 3, channels, channels), 1e-3)
    took = {}
    for method in ("direct", "canonical"):
        loss = lambda x, k, m=method: jnp.sum(conv2d(x, k, method=m) ** 2)
        run = jax.jit(jax.grad(loss, argnums=(0, 1)))
        took[method], _, _ = clock(run, x, kernel, per=1, repeats=repeats)
    return took


def matmul_gflops(size: int = 1024) -> float:
    a = jnp.ones((size, size))
    ms, _, _ = clock(jax.jit(jnp.matmul), a, a, per=1, repeats=9)
    return 2e-6 * size**3 / ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats (< 45 s)")
    args = parser.parse_args()
    steps, repeats, clients = (2, 3, 2) if args.quick else (5, 7, 4)

    rng = np.random.default_rng(0)
    weights = initial_weights(rng)
    batches = (
        jnp.asarray(rng.standard_normal((steps, BATCH, 28, 28, 1)), jnp.float32),
        jnp.asarray(rng.integers(0, 10, (steps, BATCH)), jnp.int32),
    )
    repeat = functools.partial(jax.tree.map, lambda a: jnp.stack([a] * clients))

    print(f"jax {jax.__version__}, {jax.default_backend()}, {len(os.sched_getaffinity(0))} cores")
    print(f"{'processor ms a step':24}{'dispatched':>12}{'in a scan':>12}{'scan, vmap':>12}")
    times: dict[str, dict[str, float]] = {}
    compile_s, reached = 0.0, None
    for name, (conv, pool) in FORMS.items():
        step = make_step(conv, pool)
        jitted, scan = jax.jit(step), scanned(step)
        slow = repeats if name in ("canonical", "patches") else 1
        runs: dict[str, tuple[Callable, tuple, int, int]] = {
            "dispatched": (
                lambda w, b, jitted=jitted: functools.reduce(
                    lambda w, i: jitted(w, b[0][i], b[1][i]), range(steps), w
                ),
                (weights, batches), steps, repeats,
            ),
            "scan": (jax.jit(scan), (weights, batches), steps, slow),
            "vmap": (
                jax.jit(jax.vmap(scan)), (repeat(weights), repeat(batches)),
                steps * clients, slow,
            ),
        }  # fmt: skip
        if name == "direct, reduce_window":
            runs = {"dispatched": runs["dispatched"]}
        row = times[name] = {}
        for schedule, (run, inputs, per, count) in runs.items():
            row[schedule], first_s, result = clock(run, *inputs, per=per, repeats=count)
            compile_s = max(compile_s, first_s)
            if schedule == "vmap":
                result = jax.tree.map(lambda a: a[-1], result)
            reached = result if reached is None else reached
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), reached, result)
        print(f"{name:24}" + "".join(f"{ms:12.1f}" for ms in row.values()), flush=True)

    small = small_images(128 if args.quick else 512, 3)
    print("3x3 on 2x2 images: " + ", ".join(f"{k} {ms:.1f} ms" for k, ms in small.items()))
    peak = matmul_gflops()
    floor_ms = 1e3 * GFLOPS / peak
    print(f"{GFLOPS:.2f} GFLOP a step at {peak:.0f} GFLOP/s of a large product: {floor_ms:.1f} ms")
    print(json.dumps({
        "name": "conv_step",
        "ratio": round(times["direct"]["dispatched"] / times["canonical"]["scan"], 3),
        "direct_scan_over_canonical_scan": round(
            times["direct"]["scan"] / times["canonical"]["scan"], 2),
        "direct_vmap_over_canonical_vmap": round(
            times["direct"]["vmap"] / times["canonical"]["vmap"], 2),
        "small_images_direct_over_canonical": round(small["direct"] / small["canonical"], 1),
        "share_of_matmul_peak": round(floor_ms / times["canonical"]["scan"], 3),
        "slowest_first_call_s": round(compile_s, 1),
        "cpu_ms_per_step": {k: {s: round(ms, 2) for s, ms in v.items()} for k, v in times.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
