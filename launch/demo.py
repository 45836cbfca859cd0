"""The whole loop on real text: federate over unequal machines, cut a draft, serve.

    python -m jaxfm.launch.demo              # a few minutes on two cores
    python -m jaxfm.launch.demo --quick      # a small case, to check that it runs

1. The 24 largest packages of Python's standard library are clients that keep their code. A third
   of their machines holds the full model, a third half of its width, a third a quarter.
2. Eight of them per round train a byte-level language model from scratch (HeteroFL).
3. The quarter tier is cut out and briefly distilled from its parent.
4. Held-out code is completed by plain decoding, by speculation with that draft, and by lookup.
5. model/ and draft/ are saved in Hugging Face format, and report.html shows the results.

If it is stopped, the same command continues from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfm import config as configs
from jaxfm import hub
from jaxfm.config import check, check_whole, option
from jaxfm.data.dealing import Data, subsample
from jaxfm.distillation import distill
from jaxfm.federated import TrainedRun
from jaxfm.launch import federate
from jaxfm.launch.cores import use_cores
from jaxfm.launch.federate_config import FederateConfig
from jaxfm.launch.optimizers import OptimizerConfig
from jaxfm.launch.report import write_report
from jaxfm.launch.setup import DataConfig, ModelConfig
from jaxfm.model import Model, Variables, count_parameters
from jaxfm.models.families.decoder import decoder, resized
from jaxfm.parallel.cache import decoding_layout
from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.model import model_drafter
from jaxfm.parallel.generation import generate, stream
from jaxfm.run_folder import RUN_DIR_HELP, in_folder, open_run, save_results
from jaxfm.subnet import axis_sizes
from jaxfm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """The demonstration."""

    run_dir: str = option("", RUN_DIR_HELP)
    quick: bool = option(False, "a small model and few rounds")
    rounds: int = option(30, "federated rounds (quick: 4)")
    distill_steps: int = option(100, "steps in which the draft learns from its parent (quick: 10)")
    num_prompts: int = option(8, "pieces of held-out code to complete (quick: 2)")
    prompt_bytes: int = option(96, "bytes of each prompt")
    new_bytes: int = option(160, "bytes generated after each prompt (quick: 32)")
    draft_length: int = option(3, "tokens drafted per pass")
    seed: int = option(0, "of all random numbers")

    def __post_init__(self):
        check(self)
        counts = ("rounds", "distill_steps", "num_prompts", "prompt_bytes", "new_bytes")
        check_whole(self, dict.fromkeys((*counts, "draft_length"), 1) | {"seed": 0})
        if self.quick:
            for name, most in (("rounds", 4), ("distill_steps", 10), ("num_prompts", 2),
                               ("new_bytes", 32)):  # fmt: skip
                object.__setattr__(self, name, min(most, getattr(self, name)))


def federated_config(config: DemoConfig) -> Any:
    """Returns the config of the federated part, as `jaxfm.launch.federate` takes it."""
    small = ModelConfig(embed_dim=32, num_layers=2, num_heads=4, mlp_dim=64)
    model = ModelConfig(embed_dim=96, num_layers=3, num_heads=4, mlp_dim=288)
    return FederateConfig(
        run_dir=config.run_dir,
        algorithm="hetero_fl",
        rounds=config.rounds,
        cohort_size=8,
        batch_size=8,
        max_steps=8,
        tiers=(1.0, 0.5, 0.25),
        eval_every=min(5, config.rounds),
        eval_examples=64 if config.quick else 256,
        test_examples=64 if config.quick else 512,
        seed=config.seed,
        data=DataConfig(num_clients=24, length=64 if config.quick else 128),
        model=small if config.quick else model,
        local=OptimizerConfig(learning_rate=2e-3),
    )


def main(config: DemoConfig) -> None:
    """Runs all five parts, one after the other."""
    use_cores(8)
    start = time.monotonic()
    tell = lambda text: print(f"[{time.monotonic() - start:4.0f} s] {text}", flush=True)
    config = in_folder(config, "demo")
    run_dir = open_run(config, config.run_dir)
    federation = federated_config(config)

    tell("1. Clients: the largest packages of the standard library.")
    data, model, prepared = federate.ready(federation)

    tell(
        f"2. Federated training, {config.rounds} rounds (the first compiles). After Ctrl-C, "
        "the same command continues."
    )
    result = federate.train(federation, data, model, prepared)
    _tell_training(result)

    tell("3. The quarter tier becomes a draft: cut out, then distilled from its parent.")
    server = result.state.server
    # On one device, all of whose threads then multiply for the one text that is decoded.
    server = jax.device_put(server, jax.devices()[0])
    parent = model, server.variables
    tier = prepared.algorithm.buckets[-1].shared(server)
    draft, about = make_draft(config, data, parent, tier)
    save_results(run_dir, "draft", about)
    print(
        f"   {about['parameters']:,} of {about['parent_parameters']:,} parameters; agrees with its "
        f"parent on the next token: {about['agreement_before']:.3f} as cut, "
        f"{about['agreement_after']:.3f} distilled"
    )

    tell("4. Held-out code, completed three ways.")
    part = decode(config, data, parent, draft)
    save_results(run_dir, "decode", part)
    _tell_decoding(part)

    tell("5. Saving both models in Hugging Face format, and the report.")
    hub.save(*parent, run_dir / "model", tokenizer=data.tokenizer)
    hub.save(*draft, run_dir / "draft", tokenizer=data.tokenizer)
    print(f"   {run_dir / 'model'}, {run_dir / 'draft'}")
    tell(f"Done: {write_report(run_dir)}")


def make_draft(
    config: DemoConfig, data: Data, full: tuple[Model, Variables], cut: Variables
) -> tuple[tuple[Model, Variables], dict[str, Any]]:
    """Returns the smallest tier as a model of its own, and what the report says about it.

    It learns from the parent's predictions on the server's validation text; no client takes part.
    """
    model, parent = full
    small = decoder(resized(model.config, axis_sizes(cut, model.axes)))
    test = jnp.asarray(subsample(data.test, 256)["tokens"][:, :-1])
    rate = optax.cosine_decay_schedule(2e-3, config.distill_steps)
    variables, losses = distill(
        small, cut, jax.tree_util.Partial(_logits, model.apply, parent), data.task,
        {name: jnp.asarray(leaf) for name, leaf in data.validation.items()},
        steps=config.distill_steps, batch_size=16,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.95)),
        key=jax.random.key(config.seed + 2),
    )  # fmt: skip
    return (small, variables), {
        "parameters": count_parameters(variables.params),
        "parent_parameters": count_parameters(parent.params),
        "losses": np.asarray(losses).tolist(),
        "agreement_before": agreement(model, parent, small, cut, test),
        "agreement_after": agreement(model, parent, small, variables, test),
    }


def agreement(
    model: Model, variables: Variables, other: Model, other_variables: Variables, tokens: jax.Array
) -> float:
    """Returns the share of positions at which two models find the same token most likely."""

    @jax.jit
    def same(a, b, tokens):
        best = [f(v, tokens)[0].argmax(-1) for f, v in ((model.apply, a), (other.apply, b))]
        return (best[0] == best[1]).mean()

    return float(same(variables, other_variables, tokens))


def decode(
    config: DemoConfig,
    data: Data,
    parent: tuple[Model, Variables],
    draft: tuple[Model, Variables],
) -> dict[str, Any]:
    """Completes held-out code with each decoder, in turn for each prompt, and times it."""
    tokenizer = text_tokenizer(data)
    prompts = held_out_prompts(config, data)
    parent = parent[0], decoding_layout(parent[1])  # once, for all three
    decoders = {
        "plain": plain(*parent),
        "speculative": speculative(*parent, model_drafter(*draft), length=config.draft_length),
        "lookup": lookup(*parent, length=config.draft_length),
    }
    settings = {"max_new_tokens": config.new_bytes, "ticks": config.new_bytes}
    for way in decoders.values():
        generate(way, prompts[:1], **settings)  # compiles
    outputs: dict[str, list] = {name: [] for name in decoders}
    seconds = dict.fromkeys(decoders, 0.0)
    for prompt in prompts:
        for name, way in decoders.items():
            begin = time.perf_counter()
            outputs[name].append(generate(way, [prompt], **settings))
            seconds[name] += time.perf_counter() - begin
    rows = []
    for name, made in outputs.items():
        tokens = sum(len(o.tokens[0]) for o in made)
        drafted, accepted = (sum(int(np.sum(getattr(o.stats, n))) for o in made)
                             for n in ("drafted", "accepted"))  # fmt: skip
        rows.append({
            "name": name,
            "tokens_per_s": tokens / seconds[name],
            "speed_up": seconds["plain"] / seconds[name],
            "acceptance": accepted / drafted if drafted else None,
            "tokens_per_pass": tokens / sum(int(o.stats.passes[0]) for o in made),
            "identical": all(np.array_equal(a.tokens[0], b.tokens[0])
                             for a, b in zip(made, outputs["plain"], strict=True)),
        })  # fmt: skip
    note = (
        f"{len(prompts)} prompts of {config.prompt_bytes} bytes, {config.new_bytes} new bytes "
        "each, greedy, one at a time; all decoders complete each prompt in turn."
    )
    # The least repetitive text is shown.
    variety = [len(set(made.tokens[0].tolist())) for made in outputs["plain"]]
    shown = prompts[int(np.argmax(variety))]
    samples = [
        sample(name, decoders[name], shown, config.new_bytes, tokenizer)
        for name in ("speculative", "lookup")
    ]
    return {"decoders": rows, "note": note, "samples": samples}


def text_tokenizer(data: Data) -> Tokenizer:
    """Returns the tokenizer, which text always has."""
    assert data.tokenizer is not None
    return data.tokenizer


def held_out_prompts(config: DemoConfig, data: Data) -> list[list[int]]:
    """Returns the beginnings of rows of the test split, at equal distances; none has padding."""
    rows = data.test["tokens"]
    special = list(text_tokenizer(data).special_ids)
    length = min(config.prompt_bytes, rows.shape[1])
    whole = rows[~np.isin(rows[:, :length], special).any(axis=1)]
    chosen = np.linspace(0, len(whole) - 1, config.num_prompts).astype(int)
    return [whole[i, :length].tolist() for i in chosen]


def sample(
    name: str, way: Decoder, prompt: list[int], new_bytes: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Returns one completion pass by pass: all tokens of a pass but the last were drafted."""
    pieces = []
    for piece in stream(way, [prompt], max_new_tokens=new_bytes, ticks=1):
        ids = piece.tokens[0].tolist()
        pieces += [(tokenizer.decode(ids[:-1]), "accepted"), (tokenizer.decode(ids[-1:]), "")]
    return {"title": f"{name} decoding", "prompt": tokenizer.decode(prompt), "pieces": pieces}


def _logits(apply, variables: Variables, tokens: jax.Array) -> jax.Array:
    return apply(variables, tokens)[0]


def _tell_training(result: TrainedRun) -> None:
    for cost, metrics in zip(result.placement.costs, result.buckets, strict=True):
        print(f"   {cost.parameters:>9,} parameters: {metrics['bits_per_byte']:.3f} bits per byte "
              "of held-out code")  # fmt: skip
    for way in ("up", "down"):
        sent = result.totals[f"bytes_{way}"]
        clients = result.totals["reported" if way == "up" else "selected"]
        full = clients * getattr(result.placement.costs[0], f"bytes_{way}")
        print(f"   {sent / 1e6:.0f} MB {way}; the full model everywhere would take "
              f"{full / 1e6:.0f} MB ({full / sent:.2f}x)")  # fmt: skip


def _tell_decoding(part: dict[str, Any]) -> None:
    print("   decoder       tokens/s  speed-up  acceptance  tokens a pass  same tokens")
    for d in part["decoders"]:
        held = "-" if d["acceptance"] is None else f"{d['acceptance']:.2f}"
        print(f"   {d['name']:<12}{d['tokens_per_s']:>10.0f}{d['speed_up']:>9.2f}x{held:>12}"
              f"{d['tokens_per_pass']:>15.2f}{'yes' if d['identical'] else 'NO':>13}")  # fmt: skip


if __name__ == "__main__":
    configs.run(main, DemoConfig)
