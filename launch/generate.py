"""Continues a prompt with a model in Hugging Face format.

    python -m jaxfm.launch.generate --model=runs/demo/model --prompt='def test_'
    python -m jaxfm.launch.generate --model=runs/demo/model --decoder=speculative \\
        --draft=runs/demo/draft --prompt='import ' --max_new_tokens=200
    python -m jaxfm.launch.generate --model=runs/demo/model --decoder=pipeinfer \\
        --pipeinfer.stages=2 --pipeinfer.width=2 --draft=runs/demo/draft --prompt='import ' \\
        --report=runs/timeline.html

    python -m jaxfm.launch.generate --model=FOLDER --adapter=FOLDER --prompt='def test_'
    python -m jaxfm.launch.generate --model=FOLDER --adapter=A --adapter=B --prompt='def test_'
    python -m jaxfm.launch.generate --model=FOLDER --chat --prompt='Why is the sky blue?'

The text ends where the folder's files say that the model ends it, or after --max_new_tokens. It
appears as it is decoded, once everything is compiled. The line after it says how fast, and how many
drafts were accepted.
The same seed gives the same text, however fast the decoder is.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from jaxfm import config as configs
from jaxfm.config import check, check_whole, option
from jaxfm.launch.cores import use_cores
from jaxfm.options import chosen_options, options_config, with_options
from jaxfm.parallel.generation import Generation, TextPiece, stream
from jaxfm.parallel.grammars.automaton import regular
from jaxfm.parallel.loading import DECODERS, check_adapters, check_draft, load_decoder
from jaxfm.parallel.pipe.timeline import write_timeline
from jaxfm.prompts import read_chat, read_prompt
from jaxfm.tokenizer import HuggingFaceTokenizer

_OPTIONS = {
    name: options_config(make, name=name, skip=("record",) if name == "pipeinfer" else ())
    for name, make in DECODERS.items()
}
_PIPE = ("stages", "tensor", "adapt", "own_slot", "width", "levels", "window", "accept", "recovery",
         "decay")  # fmt: skip


@with_options("decoder", _OPTIONS)
@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What to continue, and how."""

    retired: ClassVar = {
        **{name: f"pipeinfer.{name}" for name in _PIPE},
        "split": "pipeinfer.layers",
        "split_cutoff": "pipeinfer.branch",
        "draft_length": ("speculative.length", "lookup.length"),
    }

    model: str = option("runs/demo/model", "folder or hub name of a causal language model")
    decoder: str = option("plain", "how tokens are found")
    draft: str = option(
        "",
        "what drafts for speculative and pipeinfer: folder or hub name of a model, exit:N (the "
        "model's own first N layers) or lookup; for pipeinfer also lookup+exit:N, lookup+FOLDER "
        "or none",
    )
    adapter: tuple[str, ...] = option(
        (), "folder of an adapter of the model, PEFT's or our own; several: one a prompt, in order",
        repeat=True,
    )  # fmt: skip
    prompt: tuple[str, ...] = option((), "a text to continue", repeat=True)
    prompt_file: tuple[str, ...] = option(
        (), "file with a text to continue, instead of --prompt", repeat=True
    )
    chat: bool = option(False, "put the prompt into the chat template of the model's folder")
    system: str = option("", "what the chat template is told before the prompt")
    special: bool = option(True, "read names of special tokens in the prompt, as in <|im_end|>")
    ignore_end: bool = option(False, "go on where the model ends the text")
    max_new_tokens: int = option(128, "tokens generated, at most")
    temperature: float = option(0.0, "0: always the most likely token")
    top_k: int | None = option(None, "draw among the k most likely tokens")
    top_p: float | None = option(
        None, "draw among the most likely tokens of this total probability"
    )
    min_p: float | None = option(
        None, "draw among tokens of at least this share of the largest probability"
    )
    repetition_penalty: float = option(
        1.0, "divide the logits of tokens that the text has, prompt included, by this"
    )
    presence_penalty: float = option(0.0, "take this from the logits of tokens generated before")
    frequency_penalty: float = option(0.0, "take this from them for each time")
    logit_bias: tuple[str, ...] = option(
        (), "ID:NUMBER, several with commas: added to the logits of these tokens; -inf: never"
    )
    grammar: str = option("", "a regular expression that the whole new text must match")
    stop: tuple[str, ...] = option((), "a string that ends the text", repeat=True)
    report: str = option("", "file for a picture of what each stage of a pipe did in each tick")
    ticks: int = option(16, "passes between two pieces of output")
    seed: int = option(0, "seed of the random draws")

    def __post_init__(self):
        check(self)
        check_whole(self, {"max_new_tokens": 1, "ticks": 1, "temperature": 0, "seed": 0})
        for name in ("top_k", "top_p", "min_p"):
            if (value := getattr(self, name)) is not None and not self.temperature:
                raise ValueError(
                    f"{name}={value} changes nothing at temperature=0, where the most likely token "
                    "is taken; give --temperature, too."
                )
        if self.report and pathlib.Path(self.report).is_dir():
            raise ValueError(f"report={self.report} is a folder; give the name of a file.")
        if bool(self.prompt) == bool(self.prompt_file):
            raise ValueError("Give the text to continue: either --prompt or --prompt_file.")
        if not all((*self.prompt, *self.prompt_file, *self.adapter)):
            raise ValueError("An empty --prompt, --prompt_file or --adapter names nothing.")
        texts, folders = len(self.prompt) + len(self.prompt_file), len(self.adapter)
        if folders > 1 and texts not in (1, folders):
            raise ValueError(
                f"{folders} adapters and {texts} prompts: give one prompt, or one for each adapter."
            )
        if self.system and not self.chat:
            raise ValueError("--system requires --chat: it is a part of the chat template.")
        biases(self.logit_bias)
        if self.grammar:
            regular(self.grammar)
        check_draft(self.decoder, self.draft)
        check_adapters(self.decoder, len(self.adapter))
        if self.report and self.decoder != "pipeinfer":
            raise ValueError("--report requires --decoder=pipeinfer: it shows a pipe's stages.")
        if chosen_options(self, "decoder").get("adapt") and self.draft in ("", "none"):
            raise ValueError("--pipeinfer.adapt requires --draft: it chooses how much to draft.")


def biases(pairs: tuple[str, ...]) -> dict[int, float]:
    """What is added to the logits of tokens, of texts such as "72:-2.5"; ValueError for others."""
    found: dict[int, float] = {}
    for pair in pairs:
        token, _, number = pair.partition(":")
        try:
            id, bias = int(token), float(number)
        except ValueError:
            raise ValueError(
                f"logit_bias={pair!r}: write the number of a token, a colon and what is added to "
                "its logit, as 72:-2.5."
            ) from None
        if id in found:
            raise ValueError(f"logit_bias={pair!r}: token {id} has {found[id]} already.")
        found[id] = bias
    return found


_RECORDED = 512  # ticks that a report shows


def main(config: GenerateConfig) -> None:
    """Decodes to standard output, and reports on standard error how it went."""
    options = chosen_options(config, "decoder")
    if config.decoder == "pipeinfer":
        use_cores(options["stages"] + options["own_slot"])
    if jax.distributed.is_initialized():
        _check_job(config.decoder, options)
    if config.decoder == "pipeinfer":
        options["record"] = _RECORDED if config.report else 0
    prompts = config.prompt or tuple(_read(path) for path in config.prompt_file)
    if len(config.adapter) > 1 and len(prompts) == 1:
        prompts *= len(config.adapter)
    loaded = load_decoder(
        config.model, config.decoder, draft=config.draft, adapter=config.adapter, **options
    )
    ids = [_prompt_ids(config, prompt, loaded.tokenizer) for prompt in prompts]
    pieces = lambda ticks: stream(
        loaded.decoder, ids,
        tokenizer=loaded.tokenizer, draft_tokenizer=loaded.draft_tokenizer,
        max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        top_k=config.top_k, top_p=config.top_p, min_p=config.min_p,
        repetition_penalty=config.repetition_penalty, presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty, logit_bias=biases(config.logit_bias),
        grammar=config.grammar or None,
        key=jax.random.key(config.seed), stop_strings=config.stop, ticks=ticks,
        stop_tokens=() if config.ignore_end else loaded.stop_tokens,
    )  # fmt: skip
    start = time.monotonic()
    next(pieces(1))  # compiles all that the text needs, so that its time is that of decoding
    warm = time.monotonic()
    result = _show(prompts, pieces(config.ticks))
    if jax.process_index() != 0:
        return
    print(describe(result, warm - start, time.monotonic() - warm), file=sys.stderr)
    if config.report:
        write_timeline(result.counters, config.report)
        print(f"report: {config.report}", file=sys.stderr)


def _check_job(decoder: str, options: dict[str, Any]) -> None:
    """Raises ValueError for a job of several processes some of which would have nothing to do."""
    devices, processes = len(jax.devices()), jax.process_count()
    if decoder != "pipeinfer":
        raise ValueError(
            f"decoder={decoder} runs in one process, and this job has {processes}; give "
            "--decoder=pipeinfer, whose stages they share."
        )
    stages, own_slot, tensor = (options[name] for name in ("stages", "own_slot", "tensor"))
    if (needed := (stages + own_slot) * tensor) != devices:
        raise ValueError(
            f"pipeinfer.stages={stages} needs {needed} devices in all, and the {processes} "
            f"processes of this job have {devices}; give as many stages as use all."
        )


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text at byte {error.start}.") from None


def _prompt_ids(config: GenerateConfig, prompt: str, tokenizer: HuggingFaceTokenizer) -> list[int]:
    """The prompt's tokens, as the flags say."""
    if not config.chat:
        return read_prompt(tokenizer, prompt, special=config.special)
    system = [{"role": "system", "content": config.system}] if config.system else []
    return read_chat(tokenizer, [*system, {"role": "user", "content": prompt}])


def _show(prompts: Sequence[str], pieces: Iterator[TextPiece]) -> Generation:
    """Writes a prompt and each piece as it comes; of several, each text when all have ended."""
    one = len(prompts) == 1
    texts = list(prompts)
    if one:
        sys.stdout.write(texts[0])
    while True:
        try:
            piece = next(pieces)
        except StopIteration as stop:
            print("" if one else "\n\n".join(texts))
            return stop.value
        new = piece.text or [""] * len(texts)
        texts = [text + more for text, more in zip(texts, new)]
        if one:
            sys.stdout.write(new[0])
            sys.stdout.flush()


def describe(result: Generation, compile_s: float, total_s: float) -> str:
    """One line on speed and drafts."""
    tokens, passes = sum(map(len, result.tokens)), int(np.sum(result.stats.passes))
    drafted, accepted = int(np.sum(result.stats.drafted)), int(np.sum(result.stats.accepted))
    ends = ", ".join(dict.fromkeys(result.finish))
    line = (
        f"[{tokens} tokens ({ends}) in {total_s:.2f} s, {tokens / total_s:.0f} a "
        f"second, after {compile_s:.1f} s of compiling; {tokens / max(passes, 1):.2f} tokens a pass"
    )
    return line + (f"; {accepted} of {drafted} drafts accepted]" if drafted else "]")


if __name__ == "__main__":
    configs.run(main, GenerateConfig, joins=True, saves=False)
