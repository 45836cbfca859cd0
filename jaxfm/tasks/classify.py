"""Classification: which class an example belongs to."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.tasks.language import cross_entropy
from jaxfm.tasks.task import (
    Array,
    Task,
    check_weights,
    count_correct,
    leaf,
    row_weight,
    weighted_sum,
)


def classification(
    num_classes: int,
    *,
    inputs: str | Sequence[str] = "image",
    label_smoothing: float = 0.0,
    transform: Callable[[Array, Array | None], Array] | None = None,
) -> Task:
    """Predicts "label" i32[B] from the other leaves. Outputs: logits [B, num_classes].

    Metrics: "loss" in nats (never smoothed), "accuracy".

    Args:
      num_classes: checked against the logits.
      inputs: the leaf that the model is given: "image", "features", "tokens", ...; or several, of
        which it is given a dict: ("tokens", "mask") for encoders.
      label_smoothing: share of the target spread over all classes, in the training loss only.
      transform: (inputs, key) -> inputs, for scaling and augmentation on device
        (`jaxfm.data.augment.image_transform`); key is None in evaluation. By default u8 images
        are scaled to 0..1 and anything else is left as it is.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2; got {num_classes}.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1); got {label_smoothing}.")

    def prepare(batch, key=None):
        values: Any
        if not isinstance(inputs, str):
            values = {name: leaf(batch, name) for name in inputs}
        else:
            values = leaf(batch, inputs)
        if transform is not None:
            values = transform(values, key)
        elif not isinstance(values, dict) and values.dtype == jnp.uint8:
            values = values.astype(jnp.float32) / 255
        targets = leaf(batch, "label")
        return values, targets, row_weight(batch, targets)

    def loss(outputs, targets, weight):
        nats, count = _checked(outputs, targets, weight)
        if label_smoothing:
            spread = -jnp.mean(jax.nn.log_softmax(outputs.astype(jnp.float32)), axis=-1)
            nats = (1 - label_smoothing) * nats + label_smoothing * weighted_sum(spread, weight)
        return nats, count

    def metrics(outputs, targets, weight):
        return {
            "loss": _checked(outputs, targets, weight),
            "accuracy": count_correct(outputs, targets, weight),
        }

    def _checked(outputs, targets, weight):
        if outputs.shape[-1] != num_classes:
            raise ValueError(
                f"The model gives {outputs.shape[-1]} logits; the task has {num_classes} classes."
            )
        return cross_entropy(outputs, targets, weight)

    def check(examples):
        check_weights(examples)
        _check_labels(examples.get("label"), num_classes)

    return Task(prepare, loss, metrics, check)


def _check_labels(label: object, num_classes: int) -> None:
    """Refuses labels that are not whole numbers [N] in 0..num_classes - 1."""
    if not isinstance(label, np.ndarray):
        return
    if label.ndim != 1 or label.dtype.kind not in "iu":
        raise ValueError(
            f"The leaf 'label' must hold whole numbers [N], one for each row; got {label.dtype} of "
            f"shape {label.shape}. jaxfm.data.load converts names and other numbers."
        )
    wrong = (label < 0) | (label >= num_classes)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"The label of row {row} is {label[row]}; labels of {num_classes} classes are in "
            f"0..{num_classes - 1}."
        )
