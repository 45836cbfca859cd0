"""When the data have changed: a test of a sequence of losses.

    m_t = m_{t-1} + x_t - mean(x_1..t) - tolerance;   alarm where m_t - min m > threshold

A loss that rises is an alarm, a loss that falls is none. After an alarm the test begins anew.
Source: Page 1954, section 2, with the running mean of Hinkley 1971.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.model import Array


class Drift(NamedTuple):
    """What the test remembers; start from `no_drift()`.

    Attributes:
      count: i32[], numbers since the last alarm.
      mean: f32[], theirs.
      sum: f32[], m_t.
      least: f32[], the smallest m so far.
    """

    count: Array  # type: ignore[assignment]  # hides a method of tuple
    mean: Array
    sum: Array
    least: Array


def no_drift() -> Drift:
    """The state before the first number."""
    zero = jnp.zeros(())
    return Drift(jnp.zeros((), jnp.int32), zero, zero, zero)


def watch(
    state: Drift, x: Array, *, threshold: float, tolerance: float = 0.05, at_least: int = 5
) -> tuple[Drift, Array]:
    """Takes in one number.

    Args:
      state: so far.
      x: f32[], such as the clients' mean loss of a round; what is not finite is left out.
      threshold: how far the sum may rise above its smallest value.
      tolerance: by how much a number may lie above the mean.
      at_least: numbers before the first alarm.
    Returns:
      The new state, and bool[], whether the numbers have changed.
    """
    count = state.count + 1
    mean = state.mean + (x - state.mean) / count.astype(jnp.float32)
    total = state.sum + x - mean - tolerance
    least = jnp.minimum(state.least, total)
    alarm = (total - least > threshold) & (count >= at_least)
    new = Drift(count, mean, total, least)
    chosen = jax.tree.map(lambda fresh, x: jnp.where(alarm, fresh, x), no_drift(), new)
    known = jnp.isfinite(x)
    kept = jax.tree.map(lambda old, x: jnp.where(known, x, old), state, chosen)
    return kept, alarm & known
