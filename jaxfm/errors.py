"""What a user is told of an error: one sentence, and an exit status.

with reported():
    main(config)  # a ValueError of the library becomes "error: ..." and exit status 2
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """Puts a name, as of a file, before the message of each ValueError that lacks it."""
    try:
        yield
    except ValueError as error:
        if str(what) in str(error):
            raise
        raise ValueError(f"{what}: {error}") from error


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """Names the file in each OSError of a write, which does not say where a disk was full."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def reported(traceback: bool = False) -> Iterator[None]:
    """Ends the program with one sentence on standard error where an error is raised within.

    Args:
      traceback: let errors through as they are.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(141)  # as of a program that SIGPIPE ends
        if traceback:
            raise
        sentence, status = explain(error)
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(status)


def _nobody_reads() -> bool:
    """Whether what reads the standard output, as `head` does, has ended; the rest is dropped."""
    try:
        out = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # it is no file
        return False
    found = select.poll()
    found.register(out, 0)
    if not any(event & select.POLLERR for _, event in found.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return True


def explain(error: Exception) -> tuple[str, int]:
    """Returns what a user is told of an error, and the exit status.

    What this library raised itself is said in its own words; what a library below it raised is
    named with its type. The status is the error's own `exit_status`, 2 where the
    user's input was refused, else 1.
    """
    if isinstance(error, MemoryError):
        return f"There is not enough memory: {_first_line(error)}.", 1
    refused = (ValueError, TypeError, OSError, ImportError)
    status = getattr(error, "exit_status", 2 if isinstance(error, refused) else 1)
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f": {error.filename}"
        return f"{error.strerror}{where}.", status
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = "" if frame is None else frame.tb_frame.f_globals.get("__name__", "")
    # Python raises its own errors in our frames, too; they are no sentences.
    if module.partition(".")[0] in ("jaxfm", "__main__") and str(error).endswith((".", "?")):
        return str(error), status
    return f"{type(error).__name__}: {_first_line(error)}\n--traceback shows where.", status


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:400]
