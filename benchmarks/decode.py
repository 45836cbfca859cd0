"""Tokens a second of plain and speculative decoding, against `transformers` on the same weights.

    python benchmarks/decode.py [--quick]

A Llama of random weights in float32 is saved in Hugging Face format and opened by both sides, each
in a process of its own with as many threads as there are cores. They continue the same prompts
one by one, greedily, in turns. The draft is the target's first layers; the other layers are
damped, so that draft and target agree about as often as trained pairs do. So the speculative
figures say what the machinery makes of that acceptance, and not how well a draft guesses text.

The last line is one JSON object:
  vs_transformers       tokens/s plain, over transformers' plain `generate`
  speculative_vs_plain  tokens/s speculative, over our own plain
  bandwidth_share       bytes of weights read a second when decoding plainly, over the bytes a
                        second of summing a large array in the same run
  identical             whether plain, speculative and lookup give transformers' tokens
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

PROMPT, DRAFT_LENGTH = 48, 4
FULL = {"layers": 24, "draft_layers": 1, "damping": 0.15, "prompts": 2, "new": 128, "rounds": 3}
QUICK = {"layers": 8, "draft_layers": 1, "damping": 0.2, "prompts": 1, "new": 56, "rounds": 2}
WIDTHS = {"vocab_size": 4096, "embed_dim": 768, "num_heads": 12, "num_kv_heads": 4,
          "mlp_dim": 2048, "max_len": 512}  # fmt: skip


def peak_mib() -> float:
    """The largest resident size of this program so far. (Of a child, `getrusage` gives the parent's
    where that is larger: it counts from before the exec.)"""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return next(int(x.split()[1]) for x in status.open() if x.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(folder: str) -> None:
    """The transformers side: answers requests on stdin, one JSON line each."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    load = lambda name: transformers.AutoModelForCausalLM.from_pretrained(
        pathlib.Path(folder) / name, dtype=torch.float32
    ).eval()
    target, draft = load("target"), load("draft")
    # The same number of drafts every time, as ours.
    draft.generation_config.num_assistant_tokens = DRAFT_LENGTH
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    for line in sys.stdin:
        request = json.loads(line)
        prompt = torch.tensor([request["prompt"]])
        settings = {"max_new_tokens": request["new"], "do_sample": False, "pad_token_id": 0}
        if request["way"] == "assisted":
            settings["assistant_model"] = draft
        start = time.perf_counter()
        with torch.inference_mode():
            out = target.generate(
                prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, **settings
            )
        seconds = time.perf_counter() - start
        answer = {"tokens": out[0, prompt.shape[1] :].tolist(), "seconds": seconds}
        print(json.dumps(answer | {"peak_mib": peak_mib()}), flush=True)


class Transformers:
    """A child process running `serve`."""

    def __init__(self, folder: str):
        command = [sys.executable, __file__, "--serve", folder]
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipe)
        self.peak = 0.0

    def __call__(self, way: str, prompt: list[int], new: int) -> tuple[list[int], float]:
        request = {"way": way, "prompt": prompt, "new": new}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.peak = answer["peak_mib"]
        return answer["tokens"], answer["seconds"]


def make_pair(sizes: dict, widths: dict = WIDTHS):
    """(model, target variables, draft model, draft variables).

    Args:
      sizes: "layers", "draft_layers" and "damping", by which the other layers' output is scaled.
      widths: the other fields of `DecoderConfig`.
    """
    import jax

    from jaxfm.models.families.decoder import DecoderConfig, decoder, resized
    from jaxfm.parallel.cache import decoding_layout
    from jaxfm.subnet import Subnet, axis_sizes, extract

    model = decoder(DecoderConfig(num_layers=sizes["layers"], **widths))
    variables = model.init(jax.random.key(0))
    first = sizes["draft_layers"]
    scale = np.where(np.arange(sizes["layers"]) < first, 1, sizes["damping"]).astype(np.float32)
    layers = dict(variables.params["layers"])
    damp = lambda leaf: leaf * scale.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)
    for part, name in (("attention", "o"), ("mlp", "down")):
        layers[part] = {**layers[part], name: {"kernel": damp(layers[part][name]["kernel"])}}
    variables = variables._replace(params={**variables.params, "layers": layers})
    kept = extract(variables, model.axes, Subnet({"layer": np.arange(first, dtype=np.int32)}))
    draft = decoder(resized(model.config, axis_sizes(kept, model.axes)))
    # Taken apart once, and shared by all decoders.
    return model, decoding_layout(variables), draft, kept


def bandwidth() -> float:
    """Bytes a second of summing an array that no cache holds."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones((2**27,), jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        total(array).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return array.nbytes / best


def main(sizes: dict) -> dict:
    import jax

    from jaxfm import hub
    from jaxfm.parallel.decoders.lookup import lookup
    from jaxfm.parallel.decoders.plain import plain
    from jaxfm.parallel.decoders.speculative import speculative
    from jaxfm.parallel.drafters.model import model_drafter
    from jaxfm.parallel.generation import generate

    model, variables, draft, draft_variables = make_pair(sizes)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables.params))
    random = np.random.default_rng(0)
    prompts = random.integers(0, WIDTHS["vocab_size"], (sizes["prompts"], PROMPT)).tolist()
    new, cells = sizes["new"], PROMPT + sizes["new"]
    with tempfile.TemporaryDirectory() as folder:
        hub.save(model, variables, pathlib.Path(folder, "target"))
        hub.save(draft, draft_variables, pathlib.Path(folder, "draft"))
        theirs = Transformers(folder)
        decoders = {
            "plain": plain(model, variables),
            "speculative": speculative(
                model, variables, model_drafter(draft, draft_variables), length=DRAFT_LENGTH
            ),
            "lookup": lookup(model, variables, length=DRAFT_LENGTH),
        }
        del variables
        accepted = {}

        def ours(way: str, prompt: list[int], new: int) -> tuple[list[int], float]:
            start = time.perf_counter()
            result = generate(decoders[way], [prompt], max_new_tokens=new, cells=cells, ticks=new)
            seconds = time.perf_counter() - start
            drafted = int(result.stats.drafted.sum())
            accepted[way] = int(result.stats.accepted.sum()) / max(drafted, 1)
            return result.tokens[0].tolist(), seconds

        ways = {f"ours {way}": (ours, way) for way in decoders}
        ways |= {"transformers plain": (theirs, "plain")}
        ways |= {"transformers assisted": (theirs, "assisted")}
        for run, way in ways.values():  # compile, warm up
            run(way, prompts[0], 8)
        ours_peak = peak_mib()
        best = {name: [float("inf")] * len(prompts) for name in ways}
        short = float("inf")
        tokens: dict[str, list] = {name: [[]] * len(prompts) for name in ways}
        speed = 0.0
        for _ in range(sizes["rounds"]):
            for i, prompt in enumerate(prompts):
                for name, (run, way) in ways.items():
                    tokens[name][i], seconds = run(way, prompt, new)
                    best[name][i] = min(best[name][i], seconds)
            short = min(short, ours("plain", prompts[0], 8)[1])
            speed = max(speed, bandwidth())
        theirs.process.stdin.close()
        theirs.process.wait()

    rate = {name: len(prompts) * new / sum(seconds) for name, seconds in best.items()}
    token_seconds = (best["ours plain"][0] - short) / (new - 8)
    print(f"{weights / 1e6:.0f} MB of float32 weights, {len(prompts)} prompts of {PROMPT} tokens, "
          f"{new} new ones; memory reads {speed / 1e9:.1f} GB/s")  # fmt: skip
    for name, value in rate.items():
        share = accepted.get(name.removeprefix("ours ")) if name != "ours plain" else None
        note = "" if share is None else f"  accepted {share:.0%}"
        print(f"{name:24s} {value:7.1f} tokens/s{note}")
    reference = tokens["transformers plain"]
    return {
        "name": "decode",
        "vs_transformers": rate["ours plain"] / rate["transformers plain"],
        "speculative_vs_plain": rate["ours speculative"] / rate["ours plain"],
        "bandwidth_share": weights / token_seconds / speed,
        "identical": all(tokens[name] == reference for name in ways if name.startswith("ours")),
        "speculative_vs_assisted": rate["ours speculative"] / rate["transformers assisted"],
        "assisted_vs_plain": rate["transformers assisted"] / rate["transformers plain"],
        "lookup_vs_plain": rate["ours lookup"] / rate["ours plain"],
        "acceptance": accepted["speculative"],
        "peak_mib": ours_peak,
        "transformers_peak_mib": theirs.peak,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a small case, under 45 s")
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        serve(flags.serve)
    else:
        result = main(QUICK if flags.quick else FULL)
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}
        print(json.dumps(rounded))
