"""A decoder of directives (T2): trained on generated loops, kept in a folder, asked about files.

The folder is one of `jaxfm.hub` (config.json, model.safetensors) with the tokenizer's file and
completer.json beside them, which says how prompts are made and what was measured.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxfm import hub
from jaxfm.launch.hpc.completions import (
    CHUNK,
    Completer,
    Pair,
    encode,
    in_order,
    prompt_ids,
    scores,
    train,
)
from jaxfm.models.families.decoder import DecoderConfig
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.generation import generate
from jaxfm.tasks.hpc import tokenizers
from jaxfm.tasks.hpc.directives import PLACES, prompt
from jaxfm.tasks.hpc.graph import assigned
from jaxfm.tasks.hpc.lexer import rename, restore
from jaxfm.tasks.hpc.pragma_grammar import pragma_grammar
from jaxfm.tasks.hpc.records import Example
from jaxfm.tokenizer import Tokenizer

TASK = "pragma"
FILE = "completer.json"
_ANSWER = 64  # tokens
_BATCH = 16
_ROOM = 512  # tokens of a prompt and its answer


def widths(max_len: int) -> tuple[int, int, int]:
    """The longest rows of the groups that are trained together."""
    return 11 * max_len // 20, 7 * max_len // 10, max_len


def pairs(rows: Sequence[Example], noted: bool) -> list[Pair]:
    """What is read and written of examples of T2, with names by their order."""
    return [in_order(prompt(row.source, noted), str(row.label)) for row in rows]


def fit(
    rows: Sequence[Example],
    validation: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    noted: bool,
    max_len: int,
    shape: Mapping[str, Any],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Completer:
    """Trains a decoder on examples of T2.

    Args:
        rows, validation: Examples; the second ones are scored alone.
        tokenizer: Of prompts and answers.
        noted: Whether prompts have the notes of the dependence graph.
        max_len: Most tokens of a prompt with its answer; longer rows are left out.
        shape: Fields of `DecoderConfig`.
        steps, batch_size, learning_rate, seed: See `completions.train`.
        say: Takes a line a tenth of the way each.

    Returns:
        The decoder, with figures on the validation rows in its facts.

    Raises:
        ValueError: There are no rows that are short enough.
    """
    groups = encode(pairs(rows, noted), tokenizer, widths(max_len))
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, max_len=max(_ROOM, max_len), **shape)
    made = None
    every = max(1, steps // CHUNK // 10) * CHUNK
    for progress in train(config, groups, tokenizer, steps=steps, batch_size=batch_size,
                          learning_rate=learning_rate, seed=seed):  # fmt: skip
        made = progress.completer
        if progress.steps % every == 0:
            say(f"step {progress.steps}: loss {progress.loss:.4f}")
    assert made is not None
    held = encode(pairs(validation, noted), tokenizer, widths(max_len))
    facts: dict[str, Any] = {"steps": steps, "rows": len(rows), "max_len": max_len}
    if any(len(group["tokens"]) for group in held):
        facts["validation"] = scores(made, held)
    return made._replace(noted=noted, facts=facts)


def save(completer: Completer, folder: str | os.PathLike) -> None:
    """Writes a folder, which must not be there or be empty, for `load`."""
    hub.save(completer.model, completer.variables, folder)
    tokenizers.save(completer.tokenizer, pathlib.Path(folder))
    told = {"task": TASK, "noted": completer.noted, "facts": dict(completer.facts)}
    (pathlib.Path(folder) / FILE).write_text(json.dumps(told, indent=2) + "\n")


def load(folder: str | os.PathLike) -> Completer:
    """Opens a folder of `save`.

    Raises:
        FileNotFoundError: The folder holds no decoder of directives.
        ValueError: Its files do not fit together.
    """
    file = pathlib.Path(folder) / FILE
    if not file.exists():
        raise FileNotFoundError(
            2, "The folder holds no decoder of directives; train one with launch.hpc train "
            f"--task={TASK}", str(file),
        )  # fmt: skip
    try:
        told = json.loads(file.read_text())
        task, noted, facts = str(told["task"]), bool(told["noted"]), dict(told["facts"])
        int(facts["max_len"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from None
    if task != TASK:
        raise ValueError(f"{file}: the model answers {task!r}, not {TASK!r}.")
    model, variables = hub.load(folder)
    tokenizer = tokenizers.load(pathlib.Path(folder))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{file}: a tokenizer of {tokenizer.vocab_size} tokens does not fit a model of "
            f"{model.config.vocab_size}."
        )
    return Completer(model, variables, tokenizer, noted, facts)


def guesses(completer: Completer, loops: Sequence[str]) -> list[str | None]:
    """A directive for each loop of C that nothing but its text is known of.

    Clauses name scalars alone that the loop assigns and does not declare. The answer is the greedy
    one, and no proof stands behind it.

    Args:
        completer: Trained on T2.
        loops: Texts of a loop each, without a directive.

    Returns:
        Of each the directive, "none" where the decoder would leave the loop serial, or None where
        its text is longer than what the decoder was trained on.
    """
    texts, names, patterns, places = [], [], [], []
    room = int(completer.facts["max_len"])
    for place, loop in enumerate(loops):
        asked = f"{PLACES['c']}\n{loop}"
        # Notes look at pairs of accesses, so a long loop is left out before they are written.
        if len(prompt_ids(rename(prompt(asked)).text, completer.tokenizer)) >= room:
            continue
        short = rename(prompt(asked, completer.noted))
        if len(prompt_ids(short.text, completer.tokenizer)) >= room:
            continue
        to_short = {name: new for new, name in short.names.items()}
        texts.append(short.text)
        names.append(short.names)
        patterns.append(pragma_grammar([to_short.get(n, n) for n in assigned(loop)]))
        places.append(place)
    found: list[str | None] = [None] * len(loops)
    decoder = plain(completer.model, completer.variables)
    for first in range(0, len(texts), _BATCH):
        part = slice(first, first + _BATCH)
        said = generate(
            decoder, [prompt_ids(text, completer.tokenizer) for text in texts[part]],
            grammar=patterns[part], tokenizer=completer.tokenizer,
            stop_tokens=completer.tokenizer.eos_id, max_new_tokens=_ANSWER,
            temperature=0.0, key=jax.random.key(0),
        ).text  # fmt: skip
        assert said is not None
        for place, text, back in zip(places[part], said, names[part]):
            found[place] = restore(text, back)
    return found
