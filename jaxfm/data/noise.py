"""Images of noise, to distill on where there are no public data."""

import jax
import numpy as np


def smooth_noise(
    num: int,
    shape: tuple[int, int, int],
    *,
    dtype: np.dtype | type = np.float32,
    high: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Returns random blobs on zeros: coarse uniform noise, enlarged linearly, cut at one half.

    They show nothing, but have edges and areas as images do, so that an ensemble's predictions
    differ from one to the next, which distillation needs.

    Args:
      num: images.
      shape: height, width (at least 2) and channels.
      dtype, high: of the values, which are 0 or between high / 2 and high.
    Returns:
      dtype[num, *shape].
    Raises:
      ValueError: num below 1, or a shape too small.
    """
    height, width, channels = shape
    if num < 1 or min(height, width) < 2 or channels < 1:
        raise ValueError(f"smooth_noise makes at least one image of 2x2, not {num} of {shape}.")
    rng = np.random.default_rng(seed)
    coarse = rng.random((num, height // 2, width // 2, channels), np.float32)
    image = np.asarray(jax.image.resize(coarse, (num, *shape), "linear"))
    return (image * (image > 0.5) * high).astype(dtype)
