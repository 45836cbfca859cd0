"""What a tick of a small decoder costs, and what part of it is the arithmetic of its rows.

    python benchmarks/decode_tick.py [--quick]

First single products: rows [M, K] by kernels [K, N] that are taken in turn, so that none is still
in the nearest cache, each output added to the next input. Then whole ticks of a Llama of the demo's
sizes with random weights, by each decoder, in turns; all must give the same tokens, or the script
fails. Times are the least of several repeats; the last line is one JSON object.
`verify_over_plain` is the time of a lookup tick, which is a pass over the drafted tokens and the
last one, over that of a plain tick, a pass over one token: a decoder that speculates gains nothing
unless it keeps more tokens a tick than that.
"""

import argparse
import json
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxfm.models.families.decoder import DecoderConfig, decoder
from jaxfm.parallel import early_exit_drafter, generate, lookup, plain, speculative
from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.simulation.xla_copy_probe import count_operations, tick_program

CONFIG = DecoderConfig(vocab_size=260, embed_dim=128, num_layers=4, num_heads=4, mlp_dim=384)
TOGETHER = 2**21  # bytes of the kernels that are taken in turn
DRAFTS = 3


def least(run: Callable, repeats: int) -> float:
    """Seconds of the fastest of several runs, after one that compiles."""
    jax.block_until_ready(run())
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        took.append(time.perf_counter() - start)
    return min(took)


def product_us(rows: int, shape: tuple[int, int], repeats: int) -> float:
    """Microseconds a product."""
    count = max(3, TOGETHER // (4 * shape[0] * shape[1]))
    keys = jax.random.split(jax.random.key(0), count)
    kernels = [jax.random.normal(key, shape) / shape[0] ** 0.5 for key in keys]

    @jax.jit
    def run(x: Array, kernels: list[Array]) -> Array:
        out = jnp.zeros((rows, shape[1]))
        for kernel in kernels:
            out = x @ kernel
            x = x + 1e-6 * out.sum()
        return out

    x = jnp.ones((rows, shape[0]))
    return least(lambda: run(x, kernels), repeats) / count * 1e6


def decoders() -> dict[str, Decoder]:
    """Each decoder over one model of random weights."""
    model = decoder(CONFIG)
    variables = model.init(jax.random.key(0))
    draft = early_exit_drafter(model, variables, 1)
    return {
        "plain": plain(model, variables),
        "speculative": speculative(model, variables, draft, length=DRAFTS),
        "lookup": lookup(model, variables, length=DRAFTS),
    }


def tick_us(ways: dict[str, Decoder], new_tokens: int, repeats: int) -> dict[str, float]:
    """Microseconds a tick by each decoder.

    Raises:
      ValueError: the decoders continue the prompt differently.
    """
    prompt = np.random.default_rng(0).integers(0, 256, 96).tolist()
    settings = {"max_new_tokens": new_tokens, "ticks": new_tokens}
    results = {name: generate(way, [prompt], **settings) for name, way in ways.items()}  # compiles
    if len({tuple(result.tokens[0].tolist()) for result in results.values()}) > 1:
        raise ValueError("The decoders continue the prompt differently.")
    figures = dict.fromkeys(ways, np.inf)
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            generate(way, [prompt], **settings)
            took = 1e6 * (time.perf_counter() - start) / int(results[name].stats.passes[0])
            figures[name] = min(figures[name], took)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats (< 60 s)")
    args = parser.parse_args()
    repeats = 5 if args.quick else 15
    shapes = [(128, 384)] if args.quick else [(128, 128), (128, 384), (512, 512), (1024, 1024)]

    print(f"jax {jax.__version__}, {jax.default_backend()}, {len(os.sched_getaffinity(0))} cores")
    print("microseconds a product    one row   2 rows   4 rows   8 rows")
    four = {}
    for shape in shapes:
        took = {rows: product_us(rows, shape, repeats) for rows in (1, 2, 4, 8)}
        four["x".join(map(str, shape))] = round(took[4] / took[1], 2)
        print(f"kernel {shape!s:<17}" + "".join(f"{us:9.1f}" for us in took.values()), flush=True)

    ways = decoders()
    operations = {name: count_operations(tick_program(way)[0]) for name, way in ways.items()}
    figures = tick_us(ways, 64 if args.quick else 160, repeats)
    print("microseconds a tick   operations")
    for name, us in figures.items():
        print(f"{name:<12}{us:10.0f}{operations[name]:11.0f}")
    print(json.dumps({
        "name": "decode_tick",
        "verify_over_plain": round(figures["lookup"] / figures["plain"], 2),
        "speculative_over_plain": round(figures["speculative"] / figures["plain"], 2),
        "operations": operations,
        "four_rows_over_one": four,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
