"""Two clocks at once: the wall's, and that of the processor time of this process's threads.

Where others work on the same cores, only the second says what a program takes; what it waits for,
such as the network, is in the first alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Seconds = dict[str, float]  # by clock
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def timed(run: Callable[[], Any]) -> tuple[Any, Seconds]:
    """The result of a call, which is waited for, and its seconds by each clock."""
    began = {name: clock() for name, clock in CLOCKS.items()}
    result = jax.block_until_ready(run())
    return result, {name: clock() - began[name] for name, clock in CLOCKS.items()}


def median(many: list[Seconds]) -> Seconds:
    """The median by each clock."""
    return {name: float(np.median([seconds[name] for seconds in many])) for name in CLOCKS}


def chained(step: Callable[[Any], Any], x: Any, calls: int) -> Seconds:
    """The median seconds of `x = step(x)` over calls, after two to warm up."""
    x = jax.block_until_ready(step(step(x)))
    taken = []
    for _ in range(calls):
        x, seconds = timed(lambda x=x: step(x))
        taken.append(seconds)
    return median(taken)
