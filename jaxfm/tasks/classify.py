"""Classification: which class an example belongs to."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfm.tasks.language import cross_entropy
from jaxfm.tasks.task import Array, Task, count_correct, leaf, row_weight, weighted_sum


def classification(
    num_classes: int,
    *,
    inputs: str = "image",
    label_smoothing: float = 0.0,
    transform: Callable[[Array, Array | None], Array] | None = None,
) -> Task:
    """Predicts "label" i32[B] from one other leaf. Outputs: logits [B, num_classes].

    Metrics: "loss" in nats (never smoothed), "accuracy".

    Args:
      num_classes: checked against the logits.
      inputs: the leaf that the model is given: "image", "tokens", "inputs", ...
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
        values = leaf(batch, inputs)
        if transform is not None:
            values = transform(values, key)
        elif values.dtype == jnp.uint8:
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

    return Task(prepare, loss, metrics)
