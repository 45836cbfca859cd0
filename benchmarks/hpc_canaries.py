"""Secrets in one site's code: how much a federated model of code learns by heart of them.

    python benchmarks/hpc_canaries.py [--quick] [--rounds=40]

Four sites write their own dialect (`jaxfm.tasks.hpc.sites`), and train a decoder of bytes together,
by federated averaging. The last site's code has lines with numbers of eight digits, each in one,
four or sixteen of its rows. Afterwards the model is asked for the loss of each line, and of 1,023
lines with other numbers: exposure is how far down the secret's loss ranks, 10 bits where none is
lower, and about 1 where it is like any other. Once plainly, and once with DP-SGD at every site
(epsilon 8 for a row of the site with the fewest, less for those of others; a secret in sixteen rows
is sixteen rows). Columns: bits per byte of held-out code, then the mean exposure of
four secrets by how often each stands there. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time

import jax
import numpy as np
import optax

from jaxfm import tasks
from jaxfm.data.federation import federate
from jaxfm.federated import (
    ExamplePrivacy,
    Local,
    Population,
    Sampling,
    compile_rounds,
    fed_avg,
    plan_privacy,
    profiles,
)
from jaxfm.federated.audit.exposure import canaries, exposure
from jaxfm.federated.audit.losses import example_losses
from jaxfm.models import DecoderConfig, decoder
from jaxfm.tasks.hpc.lexer import compact
from jaxfm.tasks.hpc.sites import sites

LENGTH, TIMES, SECRETS, DIGITS, REFERENCES = 96, (1, 4, 16), 4, 8, 1023
PAD, DELTA, CLIP, EPSILON = 256, 1e-4, 1.0, 8.0
PREFIX = np.frombuffer(b"const long site_key = ", np.uint8).astype(np.int32)
NUMBERS = np.frombuffer(b"0123456789", np.uint8).astype(np.int32)


def windows(sources: list[str]) -> np.ndarray:
    """i32[N, LENGTH + 1]: the bytes of sources one after the other, cut into rows."""
    text = np.frombuffer("\n".join(map(compact, sources)).encode(), np.uint8).astype(np.int32)
    return text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)


def lines(seed: int, number: int) -> np.ndarray:
    """i32[number, LENGTH + 1]: lines with a secret each, and nothing behind them."""
    drawn = np.asarray(canaries(jax.random.key(seed), number, PREFIX, DIGITS, NUMBERS))
    room = LENGTH + 1 - drawn.shape[1]
    return np.pad(drawn, ((0, 0), (0, room)), constant_values=PAD).astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few programs and rounds")
    parser.add_argument("--items", type=int, default=300, help="programs of all sites together")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3, help="of Adam")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.quick:
        args.items, args.rounds, args.batch = 60, 2, 8
    began = time.perf_counter()
    drawn = sites(args.seed, args.items, 10)
    own = [windows([row.source for row in rows]) for rows in drawn.train.values()]
    held = windows([row.source for rows in drawn.test.values() for row in rows])
    planted = {n: lines(args.seed + n, SECRETS) for n in TIMES}
    own[-1] = np.concatenate([own[-1], *(np.repeat(rows, n, 0) for n, rows in planted.items())])
    others = lines(args.seed + 99, REFERENCES)
    ends = np.cumsum([len(rows) for rows in own])
    data = federate(
        {"tokens": np.concatenate(own)},
        [np.arange(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)],
    )
    shape = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    if not args.quick:
        shape = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "mlp_dim": 160}
    model = decoder(DecoderConfig(vocab_size=PAD + 1, max_len=LENGTH, **shape))
    task = tasks.causal_lm(np.r_[np.ones(PAD, np.float32), 0.0], PAD)
    smallest = min(map(len, own))
    steps = args.rounds * -(-smallest // args.batch)
    plan = plan_privacy(
        Sampling(smallest, args.batch, "poisson"), delta=DELTA, epsilon=EPSILON, rounds=steps
    )
    table: dict[str, dict[str, float]] = {}
    for name, private in (
        ("plain", None),
        (f"epsilon {EPSILON:g}", ExamplePrivacy(CLIP, plan.noise_multiplier)),
    ):
        local = Local(optax.adam(args.rate), args.batch, private=private)
        people = Population(data, profiles(len(own)), np.zeros(len(own), np.int32))
        engine = compile_rounds(fed_avg(model, task, local), people, cohort_size=len(own))
        state = engine.init(model.init(jax.random.key(args.seed)), jax.random.key(args.seed))
        for _ in range(args.rounds):
            state, _ = engine.run(state)
        variables = state.server.variables
        losses = lambda rows, v=variables: example_losses(model, v, task, {"tokens": rows})
        bits = tasks.evaluate(model.apply, variables, task, {"tokens": held}, 64)["bits_per_byte"]
        rest = losses(others)
        found = {n: float(exposure(losses(rows), rest).mean()) for n, rows in planted.items()}
        table[name] = {"bits_per_byte": round(bits, 3)} | {
            f"exposure_{n}": round(value, 2) for n, value in found.items()
        }
        print(f"{name:<12}", table[name], flush=True)
    result = {
        "name": "hpc_canaries", "quick": args.quick, "rows": [len(rows) for rows in own],
        "rounds": args.rounds, "seed": args.seed, "delta": DELTA,
        "noise_multiplier": round(plan.noise_multiplier, 3), "most_bits": 10, **table,
        "seconds": round(time.perf_counter() - began),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
