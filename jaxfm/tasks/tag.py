"""Tagging: which class each word of a row belongs to."""

import jax.numpy as jnp
import numpy as np

from jaxfm.data.tags import IGNORED
from jaxfm.tasks.language import cross_entropy
from jaxfm.tasks.task import Task, check_weights, count_correct, leaf, row_weight


def tagging(num_classes: int) -> Task:
    """Predicts "tags" i32[B, T] from "tokens" and "mask". Outputs: logits [B, T, num_classes].

    Tokens with the tag `IGNORED` (-100) count nowhere: special ones, padding, and all but the first
    token of a word. Metrics: "loss" in nats a word, "accuracy" over words.

    Args:
      num_classes: how many tags there are.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2; got {num_classes}.")

    def prepare(batch, key=None):
        tags = leaf(batch, "tags")
        known = tags != IGNORED
        weight = jnp.where(known, row_weight(batch, tags), 0.0)
        inputs = {name: leaf(batch, name) for name in ("tokens", "mask")}
        return inputs, jnp.where(known, tags, 0), weight

    def loss(outputs, targets, weight):
        if outputs.shape[-1] != num_classes:
            raise ValueError(
                f"The model gives {outputs.shape[-1]} logits; the task has {num_classes} tags."
            )
        return cross_entropy(outputs, targets, weight)

    def metrics(outputs, targets, weight):
        return {
            "loss": loss(outputs, targets, weight),
            "accuracy": count_correct(outputs, targets, weight),
        }

    def check(examples):
        check_weights(examples)
        tags = examples.get("tags")
        if not isinstance(tags, np.ndarray):
            return
        wrong = (tags != IGNORED) & ((tags < 0) | (tags >= num_classes))
        if wrong.any():
            raise ValueError(
                f"A tag of row {int(np.argmax(wrong.any(1)))} is {tags[wrong][0]}; tags are in "
                f"0..{num_classes - 1}, or {IGNORED} where there is none."
            )

    return Task(prepare, loss, metrics, check)
