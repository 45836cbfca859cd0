"""Small decoders that complete sources: trained on pairs of a prompt and its answer.

Rows of like lengths are trained together, so that little of a batch is padding; each length has a
compiled program of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfm.federated.foundation.central import TrainState, train_steps
from jaxfm.model import Array, Model, Variables
from jaxfm.models.families.decoder import DecoderConfig, decoder
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tasks import causal_lm, completion, evaluate
from jaxfm.tasks.hpc.lexer import rename, restore
from jaxfm.tokenizer import Tokenizer, bytes_per_token, padding_id

CHUNK = 10  # steps of one length in a row


class Pair(NamedTuple):
    """What is read and what is to be written after it."""

    prompt: str
    answer: str


def in_order(prompt: str, answer: str) -> Pair:
    """Both with the names v0, v1, ... that `lexer.rename` gives those of the prompt."""
    given = rename(prompt)
    short = {name: new for new, name in given.names.items()}
    return Pair(given.text, restore(answer, short))


class Completer(NamedTuple):
    """A decoder and the tokenizer of its texts.

    Attributes:
        model, variables: Of the decoder.
        tokenizer: Of prompts and answers.
        noted: Whether it was trained on prompts of directives with notes (`directives.prompt`).
        facts: What was measured; plain numbers and words.
    """

    model: Model
    variables: Variables
    tokenizer: Tokenizer
    noted: bool = False
    facts: Mapping[str, Any] = MappingProxyType({})


class Progress(NamedTuple):
    """What a chunk of training gives: steps so far, the mean loss, the completer so far."""

    steps: int
    loss: float
    completer: Completer


def prompt_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens before an answer."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return begin + tokenizer.encode(prompt)


def encode(
    pairs: Sequence[Pair], tokenizer: Tokenizer, widths: Sequence[int]
) -> list[dict[str, np.ndarray]]:
    """Pairs as rows of `completion`, in groups by length.

    Args:
        pairs: Texts; a pair that is longer than the last width is left out.
        tokenizer: With a token that ends a text.
        widths: Most tokens of a row in each group, rising.

    Returns:
        For each width W: "tokens" i32[N, W + 1], "begin" i32[N].

    Raises:
        ValueError: The tokenizer has no token that ends a text.
    """
    if tokenizer.eos_id is None:
        raise ValueError("Answers end with a token; this tokenizer has none (eos_id is None).")
    groups: list[list[tuple[list[int], int]]] = [[] for _ in widths]
    for pair in pairs:
        before = prompt_ids(pair.prompt, tokenizer)
        whole = [*before, *tokenizer.encode(pair.answer), tokenizer.eos_id]
        group = int(np.searchsorted(widths, len(whole) - 1))
        if group < len(widths):
            groups[group].append((whole, len(before)))
    arrays = []
    for width, rows in zip(widths, groups):
        tokens = np.full((len(rows), width + 1), padding_id(tokenizer), np.int32)
        for row, (whole, _) in zip(tokens, rows):
            row[: len(whole)] = whole
        begin = np.array([begin for _, begin in rows], np.int32)
        arrays.append({"tokens": tokens, "begin": begin})
    return arrays


def train(
    config: DecoderConfig,
    groups: Sequence[dict[str, np.ndarray]],
    tokenizer: Tokenizer,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    prompt_weight: float = 0.0,
    seed: int = 0,
    start: Variables | None = None,
) -> Iterator[Progress]:
    """Trains a decoder on rows of `encode`, a chunk of steps at a time.

    AdamW with a short warm-up and a cosine to zero. A chunk's length is drawn by the number of its
    rows, so that every row is as likely as any other.

    Args:
        config: Of the decoder; its vocabulary is the tokenizer's.
        groups: Of `encode`.
        tokenizer: Of the rows.
        steps: Optimizer steps in all.
        batch_size: Rows of a step.
        learning_rate: The largest one.
        prompt_weight: Of the prompt's tokens in the loss.
        seed: Of parameters, batches and the order of lengths.
        start: Variables to begin with; None: new ones.
    """
    groups = [group for group in groups if len(group["tokens"])]
    if not groups:
        raise ValueError("There is no row to train on.")
    warm = max(1, steps // 20)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm, max(steps, warm + 1))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))
    task = completion(padding_id(tokenizer), prompt_weight)
    model = decoder(config)
    variables = model.init(jax.random.key(seed)) if start is None else start
    state = TrainState(
        variables, optimizer.init(variables.params), jnp.zeros((), jnp.int32),
        jax.random.key(seed + 1),
    )  # fmt: skip
    program = train_steps(model, task, optimizer, batch_size, CHUNK, make_mesh(data=1))
    placed = [jax.device_put(group) for group in groups]
    sizes = np.array([len(group["tokens"]) for group in groups], float)
    rng = np.random.default_rng(seed)
    for done in range(CHUNK, steps + CHUNK, CHUNK):
        examples = placed[rng.choice(len(placed), p=sizes / sizes.sum())]
        state, losses = program(state, examples)
        loss: Array = losses.mean()
        # The next chunk donates the state, so what is handed out is a copy.
        kept = jax.tree.map(jnp.copy, state.variables)
        yield Progress(done, float(loss), Completer(model, kept, tokenizer))


def scores(completer: Completer, groups: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """The metrics of `completion` over all rows: each answer token given those before it."""
    task = completion(padding_id(completer.tokenizer))
    rows = [group for group in groups if len(group["tokens"])]
    found = [
        (
            len(group["tokens"]),
            evaluate(completer.model.apply, completer.variables, task, group, 64),
        )
        for group in rows
    ]
    total = sum(count for count, _ in found)
    return {name: sum(n * m[name] for n, m in found) / total for name in found[0][1]}


def bits_per_byte(completer: Completer, groups: Sequence[dict[str, np.ndarray]]) -> float:
    """Bits spent on all texts of rows without prompts, their ends included, over their bytes."""
    sizes = bytes_per_token(completer.tokenizer)
    task = causal_lm(sizes, padding_id(completer.tokenizer))
    bits = num_bytes = 0.0
    for group in groups:
        if not len(group["tokens"]):
            continue
        own = float(sizes[group["tokens"][:, 1:]].sum())
        rows = {"tokens": group["tokens"]}
        metrics = evaluate(completer.model.apply, completer.variables, task, rows, 64)
        bits, num_bytes = bits + metrics["bits_per_byte"] * own, num_bytes + own
    return bits / num_bytes
