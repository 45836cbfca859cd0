"""Part 1: plain and speculative decoding of random weights, from 100 M to 1 B parameters.

At batch 1 a token reads all weights once, so bytes of weights over bandwidth is the least time that
it can take. The draft is the target's own first layers with its head (an early exit); the other
layers are damped, so that the two agree sometimes. How often is measured and stands in the line:
the speed-up is what the machinery makes of that acceptance, not how well a draft guesses text.
"""

from __future__ import annotations

import time
from typing import Any

import decode
import jax
import numpy as np

from accelerator_parts.ceilings import memory_bandwidth
from accelerator_parts.frame import Case, Figures, Part, Setting, digits
from accelerator_parts.launches import kernels, launched, profiled
from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.model import model_drafter
from jaxfm.parallel.generation import generate
from jaxfm.parallel.simulation.xla_copy_probe import tick_program

PROMPT, SHORT = 16, 8  # tokens of the prompt, and of the generation that is subtracted
DRAFTS = {"lengths": (3, 6), "dampings": (0.05, 0.2)}
FEW_DRAFTS = {"lengths": (3,), "dampings": (0.1,)}  # of a dry run
SIZES: dict[str, dict[str, int]] = {
    "100m": {"num_layers": 12, "embed_dim": 768, "num_heads": 12, "mlp_dim": 3072},
    "300m": {"num_layers": 24, "embed_dim": 1024, "num_heads": 16, "mlp_dim": 2816},
    "1b": {"num_layers": 22, "embed_dim": 2048, "num_heads": 32, "mlp_dim": 5632},
}
TINY = {"tiny": {"num_layers": 2, "embed_dim": 64, "num_heads": 4, "mlp_dim": 128}}
DTYPES = ("bfloat16", "float32")


def pair(size: dict[str, int], dtype: str, damping: float, vocab_size: int) -> tuple:
    """(model, variables, draft model, draft variables), the draft being the first layer."""
    layers = {"layers": size["num_layers"], "draft_layers": 1, "damping": damping}
    widths: dict[str, Any] = {k: v for k, v in size.items() if k != "num_layers"}
    widths |= {"num_kv_heads": 4, "vocab_size": vocab_size, "max_len": 1024, "dtype": dtype}
    return decode.make_pair(layers, widths)


class Timed:
    """One decoder on one prompt."""

    def __init__(self, decoder: Decoder, prompt: list[int], new: int, repeats: int):
        self.decoder, self.prompt, self.new, self.repeats = decoder, prompt, new, repeats
        self.cells = PROMPT + new
        self.generate(SHORT)  # compiles

    def generate(self, new: int):
        return generate(
            self.decoder, [self.prompt], max_new_tokens=new, cells=self.cells, ticks=self.new
        )

    def seconds(self, new: int) -> float:
        """Seconds of the fastest call."""
        taken = []
        for _ in range(self.repeats):
            began = time.perf_counter()
            self.result = self.generate(new)
            taken.append(time.perf_counter() - began)
        return min(taken)

    def measure(self) -> tuple[float, float]:
        """Seconds a token: with the prompt and the call, and without them."""
        short, long = self.seconds(SHORT), self.seconds(self.new)
        whole = long / self.new
        steady = (long - short) / (self.new - SHORT)
        return whole, steady if steady > 0 else whole  # noise, where a token takes next to nothing

    @property
    def tokens(self) -> np.ndarray:
        return self.result.tokens[0]


def plain_figures(model, variables, prompt: list[int], setting: Setting, bandwidth: float):
    """The figures of plain decoding, its `Timed`, and its seconds a token."""
    new, repeats = (24, 2) if setting.dry else (256, 5)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables.params))
    timed = Timed(plain(model, variables), prompt, new, repeats)
    whole_s, token_s = timed.measure()
    program, _ = tick_program(timed.decoder, cells=timed.cells)
    figures: Figures = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables.params)),
        "weights_gb": digits(weights / 1e9),
        "plain_tokens_per_s": digits(1 / whole_s),
        "plain_ms_a_token": digits(1e3 * token_s),
        "least_ms_a_token": digits(1e3 * weights / bandwidth),
        "bandwidth_share": digits(weights / token_s / bandwidth),
        "kernels_a_token": launched(program),
        "kernels_by_kind": kernels(program),
    }
    if measured := profiled(lambda: timed.generate(new).tokens):
        figures["profiled_kernels_a_token"] = digits(measured["kernels"] / new)
        figures["profiled_busy_ms_a_token"] = digits(1e3 * measured["busy_s"] / new)
    return figures, timed, whole_s


def speculative_figures(pair, dense: Timed, plain_s: float, length: int) -> Figures:
    """One draft length, against plain decoding of the same weights."""
    model, variables, *draft = pair
    decoder = speculative(model, variables, model_drafter(*draft), length=length)
    timed = Timed(decoder, dense.prompt, dense.new, dense.repeats)
    own_s, _ = timed.measure()
    drafted, accepted = (int(np.sum(x)) for x in (timed.result.stats.drafted,
                                                  timed.result.stats.accepted))  # fmt: skip
    same = np.asarray(timed.tokens) == np.asarray(dense.tokens)
    program, _ = tick_program(timed.decoder, cells=timed.cells)
    return {
        "accepted": digits(accepted / max(drafted, 1)),
        "tokens_per_s": digits(1 / own_s),
        "vs_plain": digits(plain_s / own_s),
        # Sums in another order may turn a near tie, after which two texts differ.
        "tokens_before_first_difference": len(same) if same.all() else int(np.argmin(same)),
        "tokens": len(same),
        "kernels_a_pass": launched(program),
    }


def measure(size: dict[str, int], dtype: str, setting: Setting, note) -> Figures:
    """One size in one dtype: plain, then drafts of some lengths for some dampings."""
    vocab_size = 256 if setting.dry else 32_000
    prompt = np.random.default_rng(setting.seed).integers(0, vocab_size, PROMPT).tolist()
    bandwidth = memory_bandwidth(2**22 if setting.dry else 2**30)
    figures: Figures = {"bandwidth_gb_per_s": digits(bandwidth / 1e9)}
    drafts: dict[str, Figures] = {}
    wanted = FEW_DRAFTS if setting.dry else DRAFTS
    dense, whole_s = None, 0.0
    for damping in wanted["dampings"]:
        both = pair(size, dtype, damping, vocab_size)
        if dense is not None:
            dense = Timed(plain(*both[:2]), prompt, dense.new, dense.repeats)
            whole_s, _ = dense.measure()
        else:
            own, dense, whole_s = plain_figures(*both[:2], prompt, setting, bandwidth)
            figures |= own
        for length in wanted["lengths"]:
            setting.clock.check(0.0)
            name = f"damping_{damping}_length_{length}"
            drafts[name] = speculative_figures(both, dense, whole_s, length)
            figures["speculative"] = drafts
            note(figures)
    best = max(drafts.values(), key=lambda found: found["vs_plain"])
    return figures | {"speculative_vs_plain": best["vs_plain"], "accepted": best["accepted"]}


def cases(setting: Setting) -> dict[str, Case]:
    sizes, dtypes = (TINY, DTYPES[:1]) if setting.dry else (SIZES, DTYPES)
    table = {f"{name}_{dtype}": (size, dtype) for name, size in sizes.items() for dtype in dtypes}
    return {
        name: Case(lambda done, note, w=what: measure(*w, setting, note), 45)
        for name, what in table.items()
    }


def ratio(figures: dict[str, Figures]) -> float | None:
    """Of the largest network in bfloat16 that is done."""
    done = [f for n, f in figures.items() if n.endswith("bfloat16") and "accepted" in f]
    return done[-1]["speculative_vs_plain"] if done else None


PART = Part(
    "part1_decoding", cases, ratio,
    "speculative tokens a second over plain, of the largest network in bfloat16",
)  # fmt: skip
