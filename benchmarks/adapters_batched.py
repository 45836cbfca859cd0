"""Many clients' adapters over one base: requests in one batch against one adapter at a time.

    python benchmarks/adapters_batched.py [--quick]

A Llama of random weights with a LoRA adapter for each client. Every client asks for one
continuation, greedily. One side decodes all requests in one batch, each row with its own adapter
(`jaxfm.adapters.together`); the other decodes them one after another with the client's adapter
attached, in one compiled program (the adapter's numbers change, no shape does). Both must give the
same tokens, or the script fails. Sides take turns; times are the least of three, without compiling.
The last line is one JSON object; `adapters_batched_speedup` is the ratio of tokens a second.
"""

import argparse
import json
import os
import time
from collections.abc import Callable

import jax
import numpy as np

from jaxfm.adapters import attach, for_requests, lora, together
from jaxfm.cost import num_bytes
from jaxfm.models.families.decoder import DecoderConfig, decoder
from jaxfm.parallel import generate, plain
from jaxfm.parallel.cache import decoding_layout

CONFIG = DecoderConfig(vocab_size=512, embed_dim=256, num_layers=4, num_heads=8, mlp_dim=768)


def clients(model, variables, count: int) -> list:
    """The parameters of an adapter for each client, large enough to change the text."""
    noise = np.random.default_rng(0)
    shaken = lambda x: x + 0.3 * noise.normal(size=x.shape).astype(x.dtype)
    return [jax.tree.map(shaken, variables.params) for _ in range(count)]


def seconds(run: Callable) -> tuple[float, list]:
    """Seconds of a run, and what it gave."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer clients and tokens")
    args = parser.parse_args()
    count, new_tokens, repeats = (16, 16, 1) if args.quick else (100, 64, 3)
    base = decoder(CONFIG)
    adapted = lora(base, 8, targets="attention")
    start = attach(adapted, base.init(jax.random.key(0)), jax.random.key(1))
    adapters = clients(adapted, start, count)
    model, held = together(adapted, start, adapters)
    prompts = np.random.default_rng(1).integers(0, 512, (count, 16)).tolist()
    settings = {"max_new_tokens": new_tokens, "ticks": new_tokens}

    batch = plain(model, for_requests(held, range(count)))
    alone = plain(adapted, start)
    layout = [decoding_layout(start._replace(params=params)) for params in adapters]

    def one_by_one() -> list:
        texts = []
        for prompt, variables in zip(prompts, layout, strict=True):
            own = alone._replace(variables=(variables, *alone.variables[1:]))
            texts += generate(own, [prompt], **settings).tokens
        return texts

    together_at_once = lambda: generate(batch, prompts, **settings).tokens
    one_by_one()
    together_at_once()
    took: dict[str, float] = {}
    for _ in range(repeats):
        for name, run in (("one", one_by_one), ("batch", together_at_once)):
            last, texts = seconds(run)
            took[name] = min(last, took.get(name, np.inf))
            if name == "one":
                expected = texts
            elif any(a.tolist() != b.tolist() for a, b in zip(texts, expected, strict=True)):
                raise ValueError("The two sides continue a prompt differently.")
    tokens = count * new_tokens
    adapter_bytes = num_bytes(adapters[0])
    print(f"jax {jax.__version__}, {jax.default_backend()}, {os.cpu_count()} cores")
    print(f"{count} clients; base {num_bytes(start.frozen):,} bytes, adapter {adapter_bytes:,}")
    for name, label in (("one", "one adapter at a time"), ("batch", "all in one batch")):
        print(f"{label:<24}{tokens / took[name]:10.0f} tokens/s")
    print(json.dumps({
        "name": "adapters_batched",
        "adapters_batched_speedup": round(took["one"] / took["batch"], 2),
        "clients": count,
        "new_tokens": new_tokens,
        "tokens_per_s": {name: round(tokens / s) for name, s in took.items()},
        "adapter_share_of_base": round(adapter_bytes / num_bytes(start.frozen), 4),
        "identical": True,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
