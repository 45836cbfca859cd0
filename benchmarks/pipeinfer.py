"""Continuous speculation through a pipe: schedules by the clock, ticks of the engine, real devices.

    python benchmarks/pipeinfer.py [--quick]

Three parts, each with both sides in one run on the same text:

1. An emulated cluster (`jaxfm.parallel.simulation.sleeping_cluster`): one thread a node, which
   sleeps instead of computing. It is compared with plain pipelined decoding and draft-then-verify,
   with a fixed draft length and with the best one, which is found by trying all of them on the very
   text that is timed.
2. The engine's ticks on 8 emulated devices with a draft that is told when to be wrong, against
   (1 - a) S + a a token at the acceptance that came out.
3. Tokens a second on two host devices with models trained here on the standard library's source.

The last line is one JSON object:
  identical            whether every decoder gave the tokens of plain decoding
  ticks_over_optimum   ticks of the engine over the chain's optimum
  vs_tuned_fast        over the best draft-then-verify: 8 stages, draft of half a stage, a = 0.66
  vs_tuned_slow        the same with a draft of one and a half stages
  vs_fixed             published regime: each further token costs 30 %, draft as slow as a stage,
                       over draft-then-verify of length 8
  vs_plain_at_a01      over plain decoding where one draft in ten is right
  tree8_vs_plain, tree14_vs_plain   trees of 4 candidates, 0.88 of which hold the next token
  kv_copies            copies of keys or values in the engine's optimised tick
  wall_vs_plain, wall_vs_speculative   part 3: over plain and speculative decoding on one device
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

FULL = {"tokens": 160, "stage_s": 0.02, "steps": 300, "layers": 6, "embed": 192, "new": 160,
        "rounds": 3}  # fmt: skip
QUICK = {"tokens": 48, "stage_s": 0.01, "steps": 40, "layers": 4, "embed": 64, "new": 48,
         "rounds": 1}  # fmt: skip
TREE = (0.66, 0.78, 0.84, 0.88)

ENGINE = """
import json, sys, numpy as np
from jaxfm.parallel import generate, make_mesh, plain
from jaxfm.parallel.drafters.scripted import scripted_drafter
from jaxfm.parallel.pipe.pipeinfer import pipeinfer
from jaxfm.testing import random_variables, tiny_decoder
model = tiny_decoder(num_layers=8, max_len=512)
variables = random_variables(model)
prompt, new = [3, 1, 4, 1, 5], int(sys.argv[1])
truth = generate(plain(model, variables), [prompt], max_new_tokens=new).tokens[0]
rows = np.array([[*prompt, *truth]], np.int32)
out = []
for share in (0.1, 0.66, 0.9):
    ranks = np.where(np.random.default_rng(0).random(rows.shape) < share, 0, 9)
    made = pipeinfer(model, variables, scripted_drafter(rows, ranks, 64), mesh=make_mesh(stage=8))
    got = generate(made, [prompt], max_new_tokens=new)
    a = int(got.stats.accepted.sum()) / new
    best = new * ((1 - a) * 8 + a)
    out.append([share, a, int(got.counters.ticks), best, got.tokens[0].tolist() == truth.tolist()])
print(json.dumps(out))
"""


def emulated(sizes: dict) -> dict:
    """Part 1."""
    from jaxfm.parallel.pipe.speed import Pipe, linear_cost
    from jaxfm.parallel.simulation.heads import Head, RoundHead
    from jaxfm.parallel.simulation.simulator import best_speculative, draw_ranks, simulate
    from jaxfm.parallel.simulation.sleeping_cluster import run_cluster

    unit, tokens = sizes["stage_s"], sizes["tokens"]
    cluster = lambda stages, draft, link=0.05, cost=0.0: Pipe(
        stages, unit, draft * unit, link * unit, linear_cost(cost)
    )

    def timed(name: str, head, pipe: Pipe):
        played = run_cluster(head(), pipe)
        expected = simulate(head(), pipe)
        print(f"  {name:34s} {played.rate:7.2f} tokens/s (simulated {expected.rate:7.2f}); first "
              f"{1e3 * played.first:5.0f} ms, between p50 {1e3 * played.between(50):4.0f} p99 "
              f"{1e3 * played.between(99):4.0f} ms, in use {played.utilisation:.0%}")  # fmt: skip
        return played.rate

    def versus(title: str, ranks: list, pipe: Pipe, other, **settings) -> float:
        print(title)
        name, head = other(ranks, pipe)
        ours = timed("continuous", lambda: Head(ranks, **settings), pipe)
        return ours / timed(name, head, pipe)

    def tuned(ranks, pipe):
        length, _ = best_speculative(ranks, pipe)
        return f"draft-then-verify, best of all: {length}", lambda: RoundHead(ranks, length)

    fixed = lambda ranks, pipe: ("draft-then-verify, 8", lambda: RoundHead(ranks, 8))
    plain = lambda ranks, pipe: ("plain", lambda: Head(ranks, width=0))
    fast, slow = draw_ranks(tokens, [0.66], seed=1), draw_ranks(tokens, [0.66], seed=1)
    out = {
        "vs_tuned_fast": versus("a = 0.66, fast draft", fast, cluster(8, 0.5), tuned),
        "vs_tuned_slow": versus("a = 0.66, slow draft", slow, cluster(8, 1.5), tuned),
        "vs_fixed": versus("published regime, a = 0.66", fast, cluster(7, 1.0, cost=0.3), fixed),
        "vs_plain_at_a01": versus(
            "a = 0.1", draw_ranks(tokens, [0.1], seed=1), cluster(8, 0.5), plain
        ),
    }
    for stages in (8, 14):
        ranks = draw_ranks(tokens, TREE, seed=2)
        out[f"tree{stages}_vs_plain"] = versus(
            f"tree of 4, {stages} stages", ranks, cluster(stages, 0.9), plain, width=4
        )
    print("time of a hop, in stages: share of the speed at 0 that is left (simulated)")
    long = draw_ranks(1000, [0.79], seed=3)
    bases = {}
    for link in (0.0, 0.25, 0.5, 1.0, 2.0):
        pipe = Pipe(8, 1.0, 0.5, link)
        rates = {"continuous": simulate(Head(long), pipe).rate, "draft-then-verify":
                 best_speculative(long, pipe)[1].rate, "plain": 1 / pipe.trip_s}  # fmt: skip
        bases = bases or rates
        print(f"  {link:4.2f}  " + "  ".join(f"{n} {r / bases[n]:.2f}" for n, r in rates.items()))
        out[f"link_{link:g}"] = rates["continuous"] / bases["continuous"]
    return out


def engine_ticks(sizes: dict) -> tuple[float, bool]:
    """Part 2, in a process of its own with 8 emulated devices."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, str(sizes["tokens"])],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    worst, same = 0.0, True
    for share, a, ticks, best, identical in json.loads(done.stdout.splitlines()[-1]):
        print(f"  draft right {share:.0%}: accepted {a:.3f}, {ticks} ticks, optimum {best:.0f}")
        worst, same = max(worst, ticks / best), same and identical
    return worst, same


def pair(sizes: dict, folder: pathlib.Path):
    """A target and two drafts, trained on the standard library's source, and held-out prompts."""
    from jaxfm import hub

    def train(name: str, layers: int, embed: int, steps: int):
        command = [
            sys.executable, "-m", "jaxfm.launch.pretrain", f"--run_dir={folder / name}",
            f"--steps={steps}", f"--eval_every={steps}", "--eval_examples=32",
            f"--model.num_layers={layers}", f"--model.embed_dim={embed}",
            f"--model.mlp_dim={2 * embed}", "--batch_size=16",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        return hub.load(folder / name / "model")

    steps = sizes["steps"]
    target = train("target", sizes["layers"], sizes["embed"], steps)
    good = train("good", 1, sizes["embed"] // 2, 2 * steps)
    poor = train("poor", 1, 16, max(steps // 2, 1))
    return target, {"good": good, "poor": poor}


def wall(sizes: dict) -> dict:
    """Part 3."""
    from jaxfm.launch.setup import DataConfig, load_data
    from jaxfm.parallel import generate, make_mesh, plain, speculative
    from jaxfm.parallel.drafters.model import model_drafter
    from jaxfm.parallel.pipe.pipeinfer import pipeinfer, pipelined
    from jaxfm.parallel.simulation.xla_copy_probe import cache_copies

    with tempfile.TemporaryDirectory() as folder:
        (model, variables), drafts = pair(sizes, pathlib.Path(folder))
    held = load_data(DataConfig(), 0).test["tokens"]
    prompts = [row[:48].tolist() for row in held[:: max(1, len(held) // 2)][:2]]
    mesh, new = make_mesh(stage=2), sizes["new"]
    decoders = {
        "plain": plain(model, variables),
        "pipelined": pipelined(model, variables, mesh=mesh),
    }
    for name, (small, weights) in drafts.items():
        drafter = model_drafter(small, weights)
        decoders[f"speculative, {name}"] = speculative(model, variables, drafter, length=3)
        decoders[f"continuous, {name}"] = pipeinfer(model, variables, drafter, mesh=mesh)
        decoders[f"tree of 4, {name}"] = pipeinfer(model, variables, drafter, mesh=mesh, width=4)
    best = {name: [float("inf")] * len(prompts) for name in decoders}
    tokens, accepted = {}, {}
    for turn in range(sizes["rounds"] + 1):
        for name, decoder in decoders.items():
            for i, prompt in enumerate(prompts):
                start = time.perf_counter()
                result = generate(decoder, [prompt], max_new_tokens=new, ticks=new)
                seconds = time.perf_counter() - start
                best[name][i] = min(best[name][i], seconds) if turn else best[name][i]
                tokens[name, i] = result.tokens[0].tolist()
                drafted = max(int(result.stats.drafted.sum()), 1)
                accepted[name] = int(result.stats.accepted.sum()) / drafted
    rate = {name: new * len(prompts) / sum(seconds) for name, seconds in best.items()}
    for name, value in rate.items():
        print(f"  {name:24s} {value:8.1f} tokens/s  accepted {accepted[name]:.2f}")
    same = all(tokens[name, i] == tokens["plain", i] for name, i in tokens)
    ours = max(v for n, v in rate.items() if n.startswith(("continuous", "tree")))
    theirs = max(v for n, v in rate.items() if n.startswith("speculative"))
    pipe = decoders["continuous, good"]
    held_bytes = sum(x.nbytes for x in _leaves(pipe.variables.cut.layers)) / mesh.shape["stage"]
    shared = sum(x.nbytes for x in _leaves(pipe.variables.cut.shared))
    print(
        f"  memory a stage: layers {held_bytes / 1e6:.2f} MB, embedding and head {shared / 1e6:.2f}"
    )
    return {
        "wall_vs_plain": ours / rate["plain"],
        "wall_vs_speculative": ours / theirs,
        "wall_vs_pipelined": ours / rate["pipelined"],
        "acceptance_good": accepted["continuous, good"],
        "acceptance_poor": accepted["continuous, poor"],
        "kv_copies": cache_copies(pipe),
        "identical": same,
    }


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def main(sizes: dict) -> dict:
    print("1. Emulated cluster")
    out = emulated(sizes)
    print("2. Ticks of the engine, 8 stages")
    worst, same = engine_ticks(sizes)
    print("3. Two host devices")
    measured = wall(sizes)
    return {
        "name": "pipeinfer",
        **out,
        "ticks_over_optimum": worst,
        **measured,
        "identical": same and measured["identical"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a small case, about a minute")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    result = main(QUICK if parser.parse_args().quick else FULL)
    rounded = {
        k: round(float(v), 3) if isinstance(v, float | np.floating) else v
        for k, v in result.items()
    }
    print(json.dumps(rounded))
