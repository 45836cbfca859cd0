"""Tokens a second under a grammar: what its mask costs, and what forced drafts give back.

    python benchmarks/grammar.py [--quick]

A decoder of random weights writes an OpenMP directive under a regular expression, plainly and with
drafts that are looked up or forced; all must give the same tokens, or the script fails. Times are
the least of several repeats. The last line is one JSON object:
  mask_cost                  seconds a token under the grammar, over those without
  verified_decoding_speedup  tokens/s with lookup and forced drafts, over plain, both masked
  passes_saved               share of plain's passes that these drafts save
"""

import argparse
import json
import time

import jax
import numpy as np

from jaxfm.models.families.decoder import DecoderConfig, decoder
from jaxfm.parallel import forced_drafter, generate, lookup, plain, speculative
from jaxfm.tokenizer import ByteTokenizer

PATTERN = (
    r"#pragma omp parallel for( private\((tmp|other)\))?( reduction\((\+|\*): (sum|total)\))?"
    r"( schedule\((static|dynamic|guided)(, \d{1,3})?\))?\n"
)
PROMPT = "for (int i = 0; i < n; i++) { tmp = a[i]; sum = sum + tmp * b[i]; }\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer repeats")
    quick = parser.parse_args().quick
    layers, width, repeats = (2, 128, 2) if quick else (8, 512, 5)
    config = DecoderConfig(
        vocab_size=260, embed_dim=width, num_layers=layers, num_heads=4, mlp_dim=3 * width,
        max_len=512,
    )  # fmt: skip
    model = decoder(config)
    variables = model.init(jax.random.key(0))
    decoders = {
        "free": plain(model, variables),
        "plain": plain(model, variables),
        "forced": speculative(model, variables, forced_drafter(), length=8),
        "lookup": lookup(model, variables, length=8),
    }
    seconds, results = {}, {}
    for name, made in decoders.items():
        grammar = None if name == "free" else PATTERN
        run = lambda made=made, grammar=grammar: generate(
            made,
            [PROMPT],
            tokenizer=ByteTokenizer(),
            grammar=grammar,
            max_new_tokens=128,
            ticks=128,
        )
        run()
        took = []
        for _ in range(repeats):
            begin = time.perf_counter()
            results[name] = run()
            took.append(time.perf_counter() - begin)
        tokens = results[name].tokens[0]
        seconds[name] = min(took) / len(tokens)
        passes = int(results[name].stats.passes[0])
        print(f"{name:8} {len(tokens)} tokens in {passes} passes, {1 / seconds[name]:.0f} a second")
    for name in ("forced", "lookup"):
        if not np.array_equal(results[name].tokens[0], results["plain"].tokens[0]):
            raise SystemExit(f"The tokens of {name} are not those of plain decoding.")
    passes = {name: int(result.stats.passes[0]) for name, result in results.items()}
    figures = {
        "name": "grammar",
        "mask_cost": round(seconds["plain"] / seconds["free"], 3),
        "forced_speedup": round(seconds["plain"] / seconds["forced"], 3),
        "verified_decoding_speedup": round(seconds["plain"] / seconds["lookup"], 3),
        "passes_saved": round(1 - passes["lookup"] / passes["plain"], 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
