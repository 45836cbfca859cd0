"""Continues a prompt with a model in Hugging Face format.

    python -m jaxfm.launch.generate --model=runs/demo/model --prompt='def '
    python -m jaxfm.launch.generate --model=runs/demo/model --decoder=speculative \\
        --draft=runs/demo/draft --prompt='import ' --max_new_tokens=200
    python -m jaxfm.launch.generate --model=runs/demo/model --decoder=pipeinfer --stages=2 \\
        --draft=runs/demo/draft --width=2 --prompt='import ' --report=runs/timeline.html

Text appears as it is decoded; the line after it says how fast, and how many drafts held. The same
seed gives the same text, whatever the decoder's speed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import Literal

import jax
import numpy as np

from jaxfm import config as configs
from jaxfm import hub
from jaxfm.config import check, option
from jaxfm.launch.setup import use_cores
from jaxfm.model import Model, Variables
from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.generation import Generated, stream
from jaxfm.parallel.mesh import make_mesh
from jaxfm.parallel.pipe.adapt import adapt
from jaxfm.parallel.pipe.draft import Source, composite, early_exit, lookup_source, model_source
from jaxfm.parallel.pipe.pipeinfer import pipeinfer
from jaxfm.parallel.pipe.scheduler import limits
from jaxfm.parallel.pipe.state import CANCELLED, DRAFTED, IDLE, LIVE, PREFILL, Counters
from jaxfm.report import Card, Report, cards, grid_plot, heading, write
from jaxfm.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What to continue, and how."""

    model: str = option("runs/demo/model", "folder or hub name of a causal language model")
    draft: str = option(
        "",
        "speculative: folder or hub name of the drafting model; pipeinfer also: exit:N (the "
        "model's own first N layers), lookup, lookup+exit:N, lookup+FOLDER, or none",
    )
    decoder: Literal["plain", "speculative", "lookup", "pipeinfer"] = option(
        "plain", "how tokens are found"
    )
    prompt: str = option("", "the text to continue")
    prompt_file: str = option("", "file with the text to continue, instead of --prompt")
    max_new_tokens: int = option(128, "tokens generated")
    temperature: float = option(0.0, "0: always the most likely token")
    top_k: int | None = option(None, "draw among the k most likely tokens")
    top_p: float | None = option(
        None, "draw among the most likely tokens of this total probability"
    )
    min_p: float | None = option(None, "draw among tokens of this share of the largest probability")
    stop: tuple[str, ...] = option((), "strings that end the text")
    draft_length: int = option(4, "tokens drafted a pass")
    stages: int = option(1, "pipeinfer: stages that the model is cut over")
    tensor: int = option(1, "pipeinfer: devices of each stage")
    adapt: bool = option(
        False, "pipeinfer: drafts, branches and window follow what is measured, up to the flags"
    )
    split: tuple[int, ...] = option((), "pipeinfer: layers of each stage; default: evenly")
    own_slot: bool = option(False, "pipeinfer: one device more, for the draft alone")
    width: int = option(1, "pipeinfer: candidates alive at each depth")
    levels: int = option(1, "pipeinfer: tokens of a path drafted a tick")
    window: int = option(0, "pipeinfer: most packets in flight; 0: as many as there are")
    accept: float = option(0.0, "pipeinfer: least probability of a drafted token")
    split_cutoff: float = option(0.0, "pipeinfer: least probability of a second candidate")
    recovery: float = option(0.0, "pipeinfer: added to both for each packet in flight")
    decay: float = option(0.0, "pipeinfer: taken from both for each draft of nothing")
    report: str = option("", "pipeinfer: file for a picture of what each stage did in each tick")
    ticks: int = option(16, "passes between two pieces of output")
    seed: int = option(0, "of the draws")

    def __post_init__(self):
        check(self)
        if bool(self.prompt) == bool(self.prompt_file):
            raise ValueError("Give the text to continue: either --prompt or --prompt_file.")
        if self.decoder == "speculative" and not self.draft:
            raise ValueError("--decoder=speculative and --draft go together.")
        if self.draft and self.decoder not in ("speculative", "pipeinfer"):
            raise ValueError(f"--draft is of no use to --decoder={self.decoder}.")
        if self.report and self.decoder != "pipeinfer":
            raise ValueError("--report shows a pipe: it goes with --decoder=pipeinfer.")
        for name in ("stages", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1.")
        if self.adapt and (self.decoder != "pipeinfer" or self.draft in ("", "none")):
            raise ValueError("--adapt sets a pipe's drafts: give --decoder=pipeinfer and --draft.")


_RECORDED = 512  # ticks that a report shows


def make_decoder(config: GenerateConfig) -> tuple[Decoder, Tokenizer, Tokenizer | None]:
    """The decoder, the model's tokenizer and the draft's."""
    model, variables = hub.load(config.model)
    tokenizer = load_tokenizer(config.model)
    if config.decoder == "plain":
        return plain(model, variables), tokenizer, None
    if config.decoder == "lookup":
        return lookup(model, variables, length=config.draft_length), tokenizer, None
    if config.decoder == "pipeinfer":
        return make_pipe(config, model, variables), tokenizer, _draft_tokenizer(config.draft)
    draft, draft_variables = hub.load(config.draft)
    decoder = speculative(model, variables, draft, draft_variables, length=config.draft_length)
    return decoder, tokenizer, load_tokenizer(config.draft)


def make_pipe(config: GenerateConfig, model: Model, variables: Variables) -> Decoder:
    """The pipe of stages that the flags describe."""
    settings = limits(
        width=config.width if config.draft not in ("", "none") else 0, levels=config.levels,
        window=config.window or 1 << 30, accept=config.accept, split=config.split_cutoff,
        recovery=config.recovery, decay=config.decay,
    )  # fmt: skip
    stages = config.stages + config.own_slot
    decoder = pipeinfer(
        model, variables, make_source(config.draft, model, variables),
        mesh=make_mesh(stage=stages, tensor=config.tensor), split=config.split or None,
        width=config.width, levels=config.levels, own_slot=config.own_slot, limits=settings,
        record=_RECORDED if config.report else 0,
    )  # fmt: skip
    return adapt(decoder) if config.adapt else decoder


def make_source(name: str, model: Model, variables: Variables) -> Source | None:
    """Where proposals come from: see `GenerateConfig.draft`."""
    if name in ("", "none"):
        return None
    if name == "lookup":
        return lookup_source()
    if name.startswith("lookup+"):
        second = make_source(name.removeprefix("lookup+"), model, variables)
        if second is None:
            raise ValueError(f"draft={name!r}: name a second source after lookup+.")
        return composite(lookup_source(), second)
    if name.startswith("exit:"):
        layers = name.removeprefix("exit:")
        if not layers.isdigit():
            raise ValueError(f"draft={name!r}: give a number of layers, as in exit:2.")
        return early_exit(model, variables, int(layers))
    return model_source(*hub.load(name))


def _draft_tokenizer(name: str) -> Tokenizer | None:
    folder = name.removeprefix("lookup+")
    own = folder in ("", "none", "lookup") or folder.startswith("exit:")
    return None if own else load_tokenizer(folder)


def write_timeline(counters: Counters, path: pathlib.Path) -> None:
    """A page with what each stage and the draft did in each tick."""
    ticks = min(int(counters.ticks), len(counters.timeline))
    names = [f"stage {i}" for i in range(len(counters.executed))]
    prefill = np.full((int(counters.prefill), len(names) + 1), PREFILL, np.uint8)
    prefill[:, -1] = IDLE
    rows = np.concatenate([prefill, counters.timeline[:ticks]]).T
    rows[-1] *= DRAFTED
    total = max(int(counters.ticks), 1)
    figures = [
        Card("ticks", total, "after the prompt was read"),
        Card("stage time in use", f"{counters.executed.sum() / (total * len(names)):.0%}", ""),
        Card("packets launched", int(counters.launched[0]), "of these some were cancelled"),
        Card("corrections", int(counters.corrections.sum()), "tokens that nothing foresaw"),
    ]
    kinds = {
        LIVE: "computes",
        CANCELLED: "cancelled",
        PREFILL: "reads the prompt",
        DRAFTED: "drafts",
    }
    picture = grid_plot(
        dict(zip([*names, "draft"], rows.tolist())), kinds, x_label="tick", title="The pipe"
    )
    parts = (cards(figures), heading("Timeline", "White: nothing to do."), picture)
    write(Report("A pipe at work", f"{len(names)} stages", parts), path)


def main(config: GenerateConfig) -> None:
    """Decodes to standard output, and says on standard error how it went."""
    if config.decoder == "pipeinfer":
        use_cores(config.stages + config.own_slot)
    prompt = config.prompt or pathlib.Path(config.prompt_file).read_text()
    decoder, tokenizer, draft_tokenizer = make_decoder(config)
    pieces = stream(
        decoder, [prompt],
        tokenizer=tokenizer, draft_tokenizer=draft_tokenizer,
        max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        top_k=config.top_k, top_p=config.top_p, min_p=config.min_p,
        key=jax.random.key(config.seed), stop_strings=config.stop, ticks=config.ticks,
    )  # fmt: skip
    start = first = time.monotonic()
    sys.stdout.write(prompt)
    while True:
        try:
            piece = next(pieces)
        except StopIteration as stop:
            result: Generated = stop.value
            break
        first = time.monotonic() if first == start else first
        sys.stdout.write((piece.text or [""])[0])
        sys.stdout.flush()
    print()
    print(describe(result, first - start, time.monotonic() - start), file=sys.stderr)
    if config.report:
        write_timeline(result.counters, pathlib.Path(config.report))
        print(f"report: {config.report}", file=sys.stderr)


def describe(result: Generated, first_s: float, total_s: float) -> str:
    """One line on speed and drafts."""
    tokens, passes = len(result.tokens[0]), int(result.stats.passes[0])
    drafted, accepted = int(np.sum(result.stats.drafted)), int(np.sum(result.stats.accepted))
    line = (
        f"[{tokens} tokens ({result.finish[0]}) in {total_s:.2f} s, the first piece after "
        f"{first_s:.2f} s with compilation; {tokens / max(passes, 1):.2f} tokens a pass"
    )
    return line + (f"; {accepted} of {drafted} drafts held]" if drafted else "]")


if __name__ == "__main__":
    configs.run(main, GenerateConfig)
