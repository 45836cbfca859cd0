"""Columns of numbers of very different sizes, brought to one scale."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxfm.data.source import Source

SCALE_FILE = "columns.json"


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


def save_scale(scale: Scale, folder: str | os.PathLike[str]) -> None:
    """Writes the scale beside a model that was trained on columns that it was applied to."""
    text = json.dumps({name: numbers.tolist() for name, numbers in scale._asdict().items()})
    (Path(folder) / SCALE_FILE).write_text(text)


def load_scale(folder: str | os.PathLike[str]) -> Scale | None:
    """Returns the scale of a model's folder; None where it has none.

    Raises:
      ValueError: the file cannot be read as one.
    """
    file = Path(folder) / SCALE_FILE
    if not file.is_file():
        return None
    try:
        mean, deviation = (
            np.array(json.loads(file.read_text())[name], np.float64) for name in Scale._fields
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not a scale of columns: {error!r}.") from None
    if mean.ndim != 1 or mean.shape != deviation.shape or not np.isfinite([mean, deviation]).all():
        raise ValueError(f"{file} must have as many finite means as deviations.")
    return Scale(mean, deviation)


def standardized(
    splits: Mapping[str, Source], scale: Scale | None = None
) -> tuple[dict[str, Source], Scale]:
    """Returns splits with scaled columns, and the scale.

    Args:
      splits: with the leaf "features" f[N, D].
      scale: that is applied; None: one by which columns have mean 0 and deviation 1 in all training
        rows together, which over clients is a statistic of what they hold.
    Raises:
      ValueError: the rows are no columns of numbers, or not as many as the scale has.
    """
    train = splits["train"].examples
    if "features" not in train:
        raise ValueError(
            f"standardize is for columns of numbers; these rows have {', '.join(sorted(train))}."
        )
    values = train["features"].astype(np.float64)
    if scale is None:
        constant = values.min(0) == values.max(0)
        scale = Scale(values.mean(0), np.where(constant, 0, values.std(0)))
    elif len(scale.mean) != values.shape[1]:
        raise ValueError(
            f"The rows have {values.shape[1]} columns of numbers, where the scale that they should "
            f"be brought to has {len(scale.mean)}."
        )
    scaled = lambda examples: {**examples, "features": scale.apply(examples["features"])}
    return {
        name: source._replace(examples=scaled(source.examples)) for name, source in splits.items()
    }, scale
