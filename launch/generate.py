"""Continues a prompt with a model in Hugging Face format.

    python -m jaxfm.launch.generate --model=runs/demo/model --prompt='def '
    python -m jaxfm.launch.generate --model=runs/demo/model --decoder=speculative \\
        --draft=runs/demo/draft --prompt='import ' --max_new_tokens=200

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
from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.generate import Generated, stream
from jaxfm.parallel.lookup import lookup
from jaxfm.parallel.plain import plain
from jaxfm.parallel.speculative import speculative
from jaxfm.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What to continue, and how."""

    model: str = option("runs/demo/model", "folder or hub name of a causal language model")
    draft: str = option("", "folder or hub name of the drafting model (speculative)")
    decoder: Literal["plain", "speculative", "lookup"] = option("plain", "how tokens are found")
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
    ticks: int = option(16, "passes between two pieces of output")
    seed: int = option(0, "of the draws")

    def __post_init__(self):
        check(self)
        if bool(self.prompt) == bool(self.prompt_file):
            raise ValueError("Give the text to continue: either --prompt or --prompt_file.")
        if (self.decoder == "speculative") != bool(self.draft):
            raise ValueError("--decoder=speculative and --draft go together.")


def make_decoder(config: GenerateConfig) -> tuple[Decoder, Tokenizer, Tokenizer | None]:
    """The decoder, the model's tokenizer and the draft's."""
    model, variables = hub.load(config.model)
    tokenizer = load_tokenizer(config.model)
    if config.decoder == "plain":
        return plain(model, variables), tokenizer, None
    if config.decoder == "lookup":
        return lookup(model, variables, length=config.draft_length), tokenizer, None
    draft, draft_variables = hub.load(config.draft)
    decoder = speculative(model, variables, draft, draft_variables, length=config.draft_length)
    return decoder, tokenizer, load_tokenizer(config.draft)


def main(config: GenerateConfig) -> None:
    """Decodes to standard output, and says on standard error how it went."""
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
