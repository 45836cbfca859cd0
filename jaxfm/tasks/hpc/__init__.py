"""Language models for code of high-performance computing: programs, proofs, tasks."""

from __future__ import annotations

from typing import Any

__all__ = ["pipeline"]


def __getattr__(name: str) -> Any:
    if name == "pipeline":  # imported late: processes that only generate need no network
        from jaxfm.tasks.hpc.pipelines import pipeline

        return pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
