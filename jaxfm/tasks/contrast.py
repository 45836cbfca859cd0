"""Images and their captions: which text of a batch belongs to which image."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxfm.tasks.task import Array, Task, check_weights, leaf, row_weight, weighted_sum

_NEVER = -1e30  # the logit of a row that only fills the batch


def contrastive() -> Task:
    """Matches images with texts inside a batch, as CLIP does; for the outputs of `clip`.

        loss = (KL(m || softmax_j s_ij) + KL(m || softmax_i s_ij)) / 2,   s = scale image text^T

    with m spread evenly over the texts of the batch that are equal to the row's own: with texts
    that are all different it is CLIP's cross-entropy, and 0 is always reachable. Rows are compared
    within a batch of one client: a microbatch compares fewer, and a batch of one row nothing, so
    that gradients private by example do not exist.

    Leaves: "image" [B, H, W, C] (u8 is scaled to 0..1) and "tokens" i32[B, T]. Metrics: "loss" in
    nats, "accuracy": the share of images whose likeliest text in the batch is theirs.
    Source: Radford et al. 2021, figure 3.
    """

    def prepare(batch, key=None):
        images, tokens = leaf(batch, "image"), leaf(batch, "tokens")
        if len(tokens) < 2:
            raise ValueError(
                "A contrastive loss compares the rows of a batch, and this one has a single row; "
                "give batch_size and microbatch at least 2, and no privacy by example."
            )
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 255
        return {"image": images, "tokens": tokens}, tokens, row_weight(batch, tokens[:, 0])

    def loss(outputs, targets, weight):
        logits, same = _compared(outputs, targets, weight)
        rows = (_divergence(logits, same) + _divergence(_compared_texts(logits, weight), same)) / 2
        return weighted_sum(rows, weight), jnp.sum(weight)

    def metrics(outputs, targets, weight):
        logits, same = _compared(outputs, targets, weight)
        chosen = jnp.argmax(logits, axis=1)
        right = jnp.take_along_axis(same, chosen[:, None], axis=1)[:, 0]
        return {
            "loss": loss(outputs, targets, weight),
            "accuracy": (weighted_sum(right, weight), jnp.sum(weight)),
        }

    def check(examples):
        check_weights(examples)
        for name in ("image", "tokens"):
            if name not in examples:
                raise ValueError(
                    f"Captioned images have the leaves 'image' and 'tokens'; these rows have "
                    f"{sorted(examples)}."
                )

    return Task(prepare, loss, metrics, check)


def _compared(outputs: Any, tokens: Array, weight: Array) -> tuple[Array, Array]:
    """Logits f32[B, B] of images by texts, those of filling texts excluded, and equal texts."""
    real = weight > 0
    logits = outputs["scale"] * outputs["image"] @ outputs["text"].T
    same = (tokens[:, None] == tokens[None]).all(-1) & real[None]
    return jnp.where(real[None], logits, _NEVER), same


def _compared_texts(logits: Array, weight: Array) -> Array:
    """The same of texts by images."""
    return jnp.where((weight > 0)[None], logits.T, _NEVER)


def _divergence(logits: Array, same: Array) -> Array:
    """f32[B], KL of an even spread over `same` from the softmax of each row."""
    number = jnp.maximum(same.sum(1), 1).astype(jnp.float32)
    likely = jnp.where(same, jax.nn.log_softmax(logits, axis=1), 0.0).sum(1)
    return -likely / number - jnp.log(number)
