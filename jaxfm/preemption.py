"""A request to stop (SIGTERM), which a run answers at the end of its step, after saving.

    with stop_requests() as asked:
        for step in ...:
            ...
            if asked():
                checkpoints.save(step, state)
                raise Preempted(step, folder)

In a job of several processes they agree on the step, whichever of them was asked.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on


class Preempted(RuntimeError):
    """A run that was asked to stop, and has saved; `exit_status` is that of its program."""

    exit_status = EXIT_STATUS

    def __init__(self, step: int, folder: object, unit: str = "round"):
        super().__init__(
            f"Stopped after {unit} {step} as SIGTERM asked; the same command goes on from {folder}."
        )


# Of this process: its runs may follow each other, and JAX's service wants each number once, as the
# processes agree on the one after which they stop.
_questions = itertools.count(1)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields `() -> bool`, whether to stop after this step; SIGTERM does nothing else within.

    All processes of a job call it after each step. JAX's own service hears their SIGTERM, and says
    the same step to all. Outside of the main thread, signals are left alone.
    """
    if jax.process_count() > 1:
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_questions))
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
