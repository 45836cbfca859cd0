"""Columns of numbers of very different sizes, brought to one scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxfm.data.source import Source


class Scale(NamedTuple):
    """What was taken off columns and what they were divided by; f64[D] each.

    Attributes:
      mean: of the training rows.
      deviation: of the training rows; 0 for a constant column.
    """

    mean: np.ndarray
    deviation: np.ndarray

    def apply(self, features: np.ndarray) -> np.ndarray:
        """f32[N, D]: (features - mean) / deviation; 0 where a column is constant in training."""
        varies = self.deviation > 0
        gap = features.astype(np.float64) - self.mean
        return np.where(varies, gap / np.where(varies, self.deviation, 1), 0).astype(np.float32)


def standardized(splits: Mapping[str, Source]) -> tuple[dict[str, Source], Scale]:
    """Returns splits whose columns have mean 0 and deviation 1 in training, and the scale.

    Mean and deviation are those of all training rows together: over clients, a statistic of what
    they hold.

    Raises:
      ValueError: the rows are no columns of numbers.
    """
    train = splits["train"].examples
    if "features" not in train:
        raise ValueError(
            f"standardize is for columns of numbers; these rows have {', '.join(sorted(train))}."
        )
    values = train["features"].astype(np.float64)
    constant = values.min(0) == values.max(0)
    scale = Scale(values.mean(0), np.where(constant, 0, values.std(0)))
    scaled = lambda examples: {**examples, "features": scale.apply(examples["features"])}
    return {
        name: source._replace(examples=scaled(source.examples)) for name, source in splits.items()
    }, scale
