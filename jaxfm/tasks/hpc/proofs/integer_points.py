"""Integer sets from text, by isl, with a limit on the work for each question."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

OPERATIONS = 2_000_000
"""How many steps of isl one question may take."""


class TooLong(Exception):
    """A question takes more steps than it may."""


@contextlib.contextmanager
def sets() -> Iterator[Any]:
    """The module `islpy`, for one question.

    Raises:
        ImportError: It is not installed.
        TooLong: The question takes too many steps.
    """
    try:
        import islpy
    except ImportError as error:
        raise ImportError(
            "The proof by integer sets needs islpy: install it by `pip install jaxfm[hpc]`."
        ) from error
    context = islpy.DEFAULT_CONTEXT
    context.reset_operations()
    context.set_max_operations(OPERATIONS)
    try:
        yield islpy
    except islpy.Error as error:
        raise TooLong from error
    finally:
        context.set_max_operations(0)
        context.reset_operations()
