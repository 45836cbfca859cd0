"""Pre-training over clients: bits per byte against the bytes that were exchanged.

    python benchmarks/pretraining.py [--quick]

A byte-level decoder learns the standard library's code, dealt out by package. Every arm makes the
same number of steps of AdamW of the same batch on every client, so that all learn from as many
tokens; what differs is how often and how finely they exchange:

- data_parallel: every step is one of the pooled rows of all clients, and a gradient in floats goes
  each way at every client;
- fed_avg, diloco: parameters go each way every --inner steps;
- streaming_diloco: one of --fragments of the layers goes each way every inner / fragments steps, up
  in 4 bits and down in 8;
- sparse_loco: every --inner steps 1/64 of the entries go up, in 2 bits with error feedback, and
  parameters down in 8 bits.

Each arm climbs --rates by the bits per byte of validation rows; figures are of test rows. The last
line is one JSON object: pretrain_bytes_saving is the number of bytes that data parallel training
exchanges over those of the arm that exchanges fewest, of all arms at most 1 % worse than it (0 if
there is none); `bits_per_byte`, `megabytes`, `saving` and `worse_percent` are by arm.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfm import config as configs
from jaxfm.config import check, check_whole, option
from jaxfm.data.dealing import Data, deal_out, subsample
from jaxfm.data.federation import merge
from jaxfm.data.standard_library import stdlib
from jaxfm.federated import Local, prepare, quantised, sparse, train, with_compression
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.foundation import Central, TrainState, central_steps
from jaxfm.model import Model, count_parameters
from jaxfm.models import DecoderConfig, decoder
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tasks import causal_lm, evaluate
from jaxfm.tokenizer import ByteTokenizer, bytes_per_token

_EVAL_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained."""

    quick: bool = option(False, "a tiny model, a few files, 16 steps: under a minute")
    num_clients: int = option(8, "the largest packages, all of them in every round")
    steps: int = option(1600, "of every client")
    inner: int = option(50, "steps between two exchanges of a whole model")
    fragments: int = option(2, "of streaming_diloco")
    batch_size: int = option(8, "rows of a client's step")
    length: int = option(128, "bytes of a row")
    embed_dim: int = option(128, "width of the decoder; the MLP is three times as wide")
    num_layers: int = option(4, "of the decoder")
    rates: tuple[float, ...] = option((1e-3, 3e-3), "learning rates of AdamW that each arm tries")
    eval_examples: int = option(512, "validation rows, and test rows")
    seed: int = option(0, "of parameters and batches")

    def __post_init__(self):
        check(self)
        check_whole(self, dict.fromkeys(("num_clients", "steps", "inner", "fragments"), 1))
        if self.steps % self.inner or self.inner % self.fragments:
            raise ValueError(
                f"inner={self.inner} must divide steps={self.steps}, and fragments="
                f"{self.fragments} must divide inner."
            )


class Arm(NamedTuple):
    """How one arm ended.

    Attributes:
      validation, test: bits per byte.
      bytes: up and down, of all clients.
      tokens: that it learned from.
      rate: the learning rate.
    """

    validation: float
    test: float
    bytes: float
    tokens: float
    rate: float


def main(config: Config) -> None:
    if config.quick:
        jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of it
        config = dataclasses.replace(
            config, num_clients=2, steps=16, inner=4, batch_size=2, length=32, embed_dim=16,
            num_layers=2, rates=(3e-3,), eval_examples=16,
        )  # fmt: skip
    began, data = time.perf_counter(), load(config)
    model = decoder(DecoderConfig(
        vocab_size=ByteTokenizer.vocab_size, max_len=config.length, embed_dim=config.embed_dim,
        num_layers=config.num_layers, num_heads=max(1, config.embed_dim // 32),
        mlp_dim=3 * config.embed_dim,
    ))  # fmt: skip
    size = count_parameters(jax.eval_shape(model.init, jax.random.key(0)).params)
    print(f"{size:,} parameters, {config.num_clients} clients, {config.steps} steps each")
    print("arm               bits/byte         MB   saving    rate")
    runs = {"data_parallel": functools.partial(data_parallel, config, data, model)} | {
        name: functools.partial(federated, config, data, model, name)
        for name in ("fed_avg", "diloco", "streaming_diloco", "sparse_loco")
    }
    arms: dict[str, Arm] = {}
    for name, run in runs.items():
        arms[name] = min((run(rate) for rate in config.rates), key=lambda arm: arm.validation)
        arm, full = arms[name], arms["data_parallel"]
        print(
            f"{name:<16} {arm.test:10.4f} {arm.bytes / 1e6:10.2f} {full.bytes / arm.bytes:8.1f} "
            f"{arm.rate:7.4f}  ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
    print(json.dumps(figures(arms)))


def load(config: Config) -> Data:
    """The code by package; the same rows for all arms."""
    splits = stdlib(length=config.length, num_clients=config.num_clients, tiny=config.quick)
    task = causal_lm(bytes_per_token(ByteTokenizer()))
    return deal_out(
        splits, task, num_clients=config.num_clients, tokenizer=ByteTokenizer(), seed=config.seed
    )


def data_parallel(config: Config, data: Data, model: Model, rate: float) -> Arm:
    """Every step one of AdamW on the pooled rows; a gradient each way at each client."""
    batch = config.num_clients * config.batch_size
    central = Central(optimizer(rate), batch)
    program = central_steps(model, data.task, central, make_mesh())
    variables = model.init(jax.random.key(config.seed))
    state = TrainState(
        variables, central.optimizer.init(variables.params), jnp.int32(0),
        jax.random.key(config.seed + 1),
    )  # fmt: skip
    state, _, count = program(state, jax.device_put(merge(data.train)), jnp.int32(config.steps))

    def bits(examples) -> float:
        some = subsample(examples, config.eval_examples)
        metrics = evaluate(model.apply, state.variables, data.task, some, _EVAL_BATCH)
        return metrics["bits_per_byte"]

    traffic = 2 * 4 * count_parameters(variables.params) * config.num_clients * config.steps
    return Arm(bits(data.validation), bits(data.test), traffic, float(count), rate)


def federated(config: Config, data: Data, model: Model, name: str, rate: float) -> Arm:
    """Rounds of all clients."""
    options: dict[str, Any] = {}
    algorithm, wrap, inner = name, None, config.inner
    if name == "streaming_diloco":
        options, inner = {"fragments": config.fragments}, config.inner // config.fragments
        wrap = lambda own: with_compression(own, quantised(4, block=256), down=8)
    if name == "sparse_loco":
        algorithm, options = "diloco", {"learning_rate": 1.0, "momentum": 0.0}
        wrap = sent_sparsely
    rounds = config.steps // inner
    ready = prepare(
        algorithm, model, data, Local(optimizer(rate), config.batch_size, config.steps),
        num_rounds=rounds, options=options, wrap=wrap, max_steps=inner, seed=config.seed,
    )  # fmt: skip
    result = train(
        ready, data, num_rounds=rounds, cohort_size=config.num_clients, seed=config.seed,
        eval_every=rounds, eval_examples=config.eval_examples,
        test_examples=config.eval_examples,
    )  # fmt: skip
    return Arm(
        validation=result.history[-1]["validation/bits_per_byte"],
        test=result.test["global/bits_per_byte"],
        bytes=result.totals["bytes_up"] + result.totals["bytes_down"],
        tokens=sum(line["clients/targets"] for line in result.history),
        rate=rate,
    )


def sent_sparsely(algorithm: Algorithm) -> Algorithm:
    """SparseLoCo's uploads; downloads in 8 bits."""
    return with_compression(algorithm, sparse(1 / 64), down=8)


def optimizer(rate: float) -> optax.GradientTransformation:
    """The inner optimizer of all arms."""
    adamw = optax.adamw(rate, b2=0.95, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def figures(arms: dict[str, Arm]) -> dict[str, Any]:
    """The JSON object.

    Raises:
      RuntimeError: an arm has learned from another number of tokens than the others.
    """
    full = arms["data_parallel"]
    for name, arm in arms.items():
        if abs(arm.tokens / full.tokens - 1) > 0.01:
            raise RuntimeError(f"{name} learned from {arm.tokens:.0f} tokens, not {full.tokens}.")
    worse = {name: 100 * (arm.test / full.test - 1) for name, arm in arms.items()}
    saving = {name: full.bytes / arm.bytes for name, arm in arms.items()}
    good = [saving[name] for name in arms if name != "data_parallel" and worse[name] <= 1]
    rounded = lambda values: {name: round(value, 4) for name, value in values.items()}
    return {
        "name": "pretraining",
        "pretrain_bytes_saving": round(max(good, default=0.0), 1),
        "tokens": full.tokens,
        "bits_per_byte": rounded({name: arm.test for name, arm in arms.items()}),
        "megabytes": rounded({name: arm.bytes / 1e6 for name, arm in arms.items()}),
        "saving": rounded(saving),
        "worse_percent": rounded(worse),
    }


if __name__ == "__main__":
    configs.run(main, Config)
