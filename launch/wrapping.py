"""The wrappers of a run, from its config, in the order in which they stand around the algorithm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.wrappers.compression import named_compression
from jaxfm.federated.wrappers.quorum import with_quorum


def wrapped(config: Any, num_clients: int) -> Callable[[Algorithm], Algorithm]:
    """Returns what puts a run's wrappers around its algorithm, the innermost first.

    Args:
      config: of the run.
      num_clients: all that there are.
    """
    del num_clients

    def wrap(algorithm: Algorithm) -> Algorithm:
        algorithm = named_compression(
            algorithm, upload=config.upload, download=config.download, top_share=config.top_k
        )
        return with_quorum(algorithm, config.quorum) if config.quorum else algorithm

    return wrap
