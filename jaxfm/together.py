"""How the processes of a job act as one program: one of them speaks, and all end together.

    with ends_with_others():
        job = join_from(...)
        with as_one():
            main(config)

A process that leaves a job makes the others wait: in a collective, or at JAX's own barrier at the
end. So whoever fails says why and leaves within seconds, and those that it leaves behind say so.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator

import jax

LEAVE_S = 5  # for the others to reach the same end; more than one late step of a crowded machine
_LOST = re.compile(  # of Gloo, NCCL and JAX's coordination service
    r"Gloo \w+ failed|Connection (reset|closed) by peer|Connection refused|NCCL|"
    r"coordination.?service|heartbeat|Barrier (failed|timed out)|unhealthy",
    re.IGNORECASE,
)


class ProcessLost(RuntimeError):
    """A process that this one computes with does not answer."""


def is_joined() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


@contextlib.contextmanager
def as_one() -> Iterator[None]:
    """Silences the standard output of all processes but the first, and names the loss of one.

    Raises:
      ProcessLost: a collective failed as another process has ended.
    """
    if not is_joined():
        yield
        return
    with contextlib.ExitStack() as stack:
        if jax.process_index() != 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            if _LOST.search(str(error)) is None:
                raise
            first = str(error).splitlines()[0][:160]
            raise ProcessLost(
                f"Another process of this job has ended or cannot be reached, so process "
                f"{jax.process_index()} of {jax.process_count()} ends, too ({first}); its own "
                "output says why; the same command goes on from the last checkpoint."
            ) from error


@contextlib.contextmanager
def ends_with_others() -> Iterator[None]:
    """Ends a process that fails within `LEAVE_S`, whether or not the others end.

    JAX would wait at exit until all have come. In a process that is alone nothing is changed.
    """
    try:
        yield
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        if not status or not jax.distributed.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stderr.flush()
        if not isinstance(error.__context__, ProcessLost):  # else nobody would come
            leaving = threading.Thread(target=_leave, daemon=True)
            leaving.start()
            leaving.join(LEAVE_S)
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1)


def _leave() -> None:
    with contextlib.suppress(Exception):  # the sentence has been said
        jax.distributed.shutdown()
