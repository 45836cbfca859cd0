"""Sources as arrays: tokens, which of them are there, and the edges of the dependence graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.tasks.classify import classification
from jaxfm.tasks.hpc.graph import RELATIONS, edges
from jaxfm.tasks.hpc.lexer import rename
from jaxfm.tasks.hpc.tokenizers import LexerTokenizer
from jaxfm.tasks.language import cross_entropy
from jaxfm.tasks.task import Task, count_correct, leaf, row_weight, weighted_sum
from jaxfm.tokenizer import Tokenizer, bytes_per_token, frame, padding_id

NUM_RELATIONS = len(RELATIONS)


def encode(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    max_len: int,
    max_edges: int = 0,
) -> dict[str, np.ndarray]:
    """Encodes sources for an encoder.

    Args:
        sources: N texts; what is longer than `max_len` tokens is cut at its end.
        tokenizer: Its own special tokens are put around each text.
        max_len: T, tokens of a row.
        max_edges: E, edges of a row; 0 leaves the graph out.

    Returns:
        "tokens" i32[N, T], "mask" bool[N, T], "start" i32[N, T] (the byte of the source, or of its
        renamed form, at which each token begins) and, with edges, "edges" i32[N, E, 3].
    """
    if max_len < 3:
        raise ValueError(f"max_len must be at least 3, got {max_len}.")
    before, after = frame(tokenizer)
    sizes = bytes_per_token(tokenizer)
    shape = (len(sources), max_len)
    tokens = np.full(shape, padding_id(tokenizer), np.int32)
    mask, start = np.zeros(shape, bool), np.full(shape, -1, np.int32)
    found = np.zeros((len(sources), max_edges, 3), np.int32)
    for row, source in enumerate(sources):
        ids = tokenizer.encode(source)[: max_len - len(before) - len(after)]
        places = np.cumsum([0, *sizes[ids]])[: len(ids)]
        whole = [*before, *ids, *after]
        tokens[row, : len(whole)] = whole
        mask[row, : len(whole)] = True
        start[row, len(before) : len(before) + len(ids)] = places
        if max_edges:
            text = _as_read(source, tokenizer)
            kept = _token_edges(text, places, len(before), max_edges)
            found[row, : len(kept)] = kept
    arrays = {"tokens": tokens, "mask": mask, "start": start}
    return arrays | ({"edges": found} if max_edges else {})


def _as_read(source: str, tokenizer: Tokenizer) -> str:
    """The text whose bytes the tokens are."""
    renames = isinstance(tokenizer, LexerTokenizer) and tokenizer.renames
    return rename(source).text if renames else source


def _token_edges(
    text: str, places: np.ndarray, shift: int, limit: int
) -> list[tuple[int, int, int]]:  # fmt: skip
    """The graph's edges between tokens: those in which a piece begins."""
    if not len(places):
        return []
    end = places[-1]
    token = lambda byte: int(np.searchsorted(places, byte, "right")) - 1 + shift
    inside = (e for e in edges(text) if e.first <= end and e.second <= end)
    return [(token(e.first), token(e.second), e.relation) for e in inside][:limit]


def line_targets(
    sources: Sequence[str], lines: Sequence[Sequence[int]], start: np.ndarray, tokenizer: Tokenizer
) -> np.ndarray:
    """f32[N, T]: 1 at the tokens of the given lines (from 1) of each source."""
    targets = np.zeros(start.shape, np.float32)
    for row, (source, wanted) in enumerate(zip(sources, lines)):
        targets[row] = np.isin(line_of(source, start[row], tokenizer), list(wanted))
    return targets


def line_of(source: str, start: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """i32[T]: the line (from 1) on which each token begins; 0 for those that are no text."""
    text = _as_read(source, tokenizer).encode()
    breaks = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
    return np.where(start < 0, 0, np.searchsorted(breaks, start, "left") + 1)


def classify(num_classes: int) -> Task:
    """Predicts "label" i32[B] from tokens, mask and edges; see `jaxfm.tasks.classification`."""
    base = classification(num_classes, inputs=("tokens", "mask"))
    return base._replace(prepare=_with_graph(base.prepare))


def _with_graph(prepare: Callable) -> Callable:
    def read(batch, key=None):
        _, targets, weight = prepare(batch, key)
        return _inputs(batch), targets, weight

    return read


def _inputs(batch) -> dict:
    names = ("tokens", "mask", "edges")
    return {name: batch[name] for name in names if name in batch}


def regress() -> Task:
    """Predicts "value" f32[B] or f32[B, K]; outputs f32[B, K]; the loss is the squared error.

    Of several values it is the mean over them.
    """

    def prepare(batch, key=None):
        targets = leaf(batch, "value")
        rows = targets.reshape(len(targets), -1)[:, 0]
        return _inputs(batch), targets, row_weight(batch, rows)

    def loss(outputs, targets, weight):
        error = jnp.square(outputs - targets.reshape(outputs.shape)).mean(-1)
        return weighted_sum(error, weight), jnp.sum(weight)

    return Task(prepare, loss, lambda *args: {"loss": loss(*args)})


def locate(num_classes: int = 2, line_weight: float = 1.0) -> Task:
    """Predicts "label" i32[B] and the tokens of the racing lines, "where" f32[B, T].

    Outputs are those of the head "locate". The loss adds the cross-entropy of the class and that of
    the distribution over tokens against the uniform one over the tokens of the racing lines.
    """

    def prepare(batch, key=None):
        label = leaf(batch, "label")
        targets = {"label": label, "where": leaf(batch, "where"), "mask": leaf(batch, "mask")}
        return _inputs(batch), targets, row_weight(batch, label)

    def loss(outputs, targets, weight):
        nats, count = cross_entropy(outputs["classes"], targets["label"], weight)
        lowest = jnp.finfo(jnp.float32).min
        scores = jnp.where(targets["mask"], outputs["tokens"], lowest)
        where = targets["where"] * targets["mask"]
        number = where.sum(-1)
        told = jnp.where(number > 0, weight, 0.0)
        chosen = -(jax.nn.log_softmax(scores, -1) * where).sum(-1) / jnp.maximum(number, 1.0)
        return nats + line_weight * weighted_sum(chosen, told), count

    def metrics(outputs, targets, weight):
        correct = count_correct(outputs["classes"], targets["label"], weight)
        return {"loss": loss(outputs, targets, weight), "accuracy": correct}

    return Task(prepare, loss, metrics)


def contrast(temperature: float = 0.1) -> Task:
    """Pulls rows of one "group" i32[B] together; outputs unit vectors f32[B, D].

    The loss of a row is the supervised contrastive one against all other rows of the batch; rows
    without a partner in the batch have no weight. A leading axis of forms, "group" i32[B, F], is
    folded into the rows, so that those drawn together can be partners. Source: Khosla et al. 2020,
    equation 2.
    """

    def prepare(batch, key=None):
        group, inputs = leaf(batch, "group"), _inputs(batch)
        if group.ndim == 2:
            inputs = {name: x.reshape(-1, *x.shape[2:]) for name, x in inputs.items()}
        return inputs, group, row_weight(batch, group)

    def loss(outputs, targets, weight):
        targets, weight = targets.reshape(-1), weight.reshape(-1)
        size = targets.shape[0]
        other = ~jnp.eye(size, dtype=bool) & (weight > 0)[None]
        scores = jnp.where(other, outputs @ outputs.T / temperature, jnp.finfo(jnp.float32).min)
        partner = (targets[:, None] == targets[None]) & other
        number = partner.sum(-1).astype(jnp.float32)
        logs = jnp.where(partner, jax.nn.log_softmax(scores, -1), 0.0)
        weight = jnp.where(number > 0, weight, 0.0)
        return weighted_sum(-logs.sum(-1) / jnp.maximum(number, 1.0), weight), jnp.sum(weight)

    return Task(prepare, loss, lambda *args: {"loss": loss(*args)})
