"""Rotary positions: angular frequencies, their stretching to longer contexts, and the rotation."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How a rotary model was stretched to longer contexts.

    Attributes:
      kind: "linear", "llama3" or "yarn".
      factor: context after over context before.
      original_max_len: tokens of context before stretching.
      low_freq_factor, high_freq_factor: "llama3" only.
      beta_fast, beta_slow, attention_factor, truncate: "yarn" only; attention_factor None means
        0.1 ln(factor) + 1.
    """

    kind: str
    factor: float
    original_max_len: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, float]:
    """Returns angular frequencies f64[K / 2] (radians a token) and the factor on cos and sin.

    Source: Su et al. 2021 (RoFormer), equation 15; Peng et al. 2023 (YaRN), equations 22-25;
    Llama 3.1 for "llama3".
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_len * frequencies / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (smooth + (1 - smooth) / scaling.factor), 1.0
    if scaling.kind == "yarn":
        # The dimension that makes this many turns over the original context.
        dim = lambda turns: (
            head_dim
            * math.log(scaling.original_max_len / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )
        first, last = dim(scaling.beta_fast), dim(scaling.beta_slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0, 1)
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
        return frequencies * (1 - ramp + ramp / scaling.factor), factor
    raise ValueError(f"Rope scaling {scaling.kind!r} is unknown; known are linear, llama3, yarn.")


def rotate(x: Array, positions: Array, frequencies: np.ndarray, factor: float) -> Array:
    """Rotates x [B, T, ..., K] by its `positions` i32[B, T]; pairs are (j, j + K/2)."""
    angles = (
        positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    )
    angles = lax.expand_dims(angles, tuple(range(2, x.ndim - 1)))
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
