"""Trained models behind one call: `pipeline("race-detection")(source)`.

    from jaxfm.tasks import hpc

    races = hpc.pipeline("race-detection")
    races("#pragma omp parallel for\\nfor (int i = 1; i < n; i++)\\n  a[i] = a[i - 1];")

An answer is a model's opinion. It is never a proof: `tasks.hpc.frontend` and the verifiers have
those.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from jaxfm.plain_types import suggest
from jaxfm.tasks.hpc import reader as readers
from jaxfm.tasks.hpc.reader import Reader

SHIPPED = pathlib.Path(__file__).parent / "trained"
"""Where the models are that come with the package, one folder for each task."""


class RaceAnswer(NamedTuple):
    """What a model says of a loop with its directive.

    Attributes:
        verdict: "race" where that is the likelier, "race-free" where the probability is so low that
            few such answers were wrong on validation rows (`facts["safe_precision"]`); else
            "cannot tell", also of a source that is longer than what is read.
        probability: Of a race.
    """

    verdict: Literal["race", "race-free", "cannot tell"]
    probability: float


class RacePipeline:
    """Says of loops whether they race under the directive that they have."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def __call__(self, source: str | Sequence[str]) -> Any:
        """The `RaceAnswer` for a source, or a list of them for several, which are read together.

        Args:
            source: A loop of C or Fortran with an OpenMP directive, as text.

        Raises:
            ValueError: It is no text, or empty.
        """
        sources = [source] if isinstance(source, str) else list(source)
        for text in sources:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"Give the text of a loop, not {text!r:.40}.")
        if not sources:
            return []
        chances = readers.probabilities(self.reader.outputs(sources))
        answers = [self._answer(text, float(p)) for text, p in zip(sources, chances)]
        return answers[0] if isinstance(source, str) else answers

    def _answer(self, text: str, probability: float) -> RaceAnswer:
        if self.reader.cut(text):
            return RaceAnswer("cannot tell", probability)
        if probability > 0.5:
            return RaceAnswer("race", probability)
        safe = probability <= self.reader.facts.get("safe_below", 0.0)
        return RaceAnswer("race-free" if safe else "cannot tell", probability)


PIPELINES: dict[str, Callable[[Reader], Callable]] = {"race-detection": RacePipeline}


def pipeline(task: str, model: str | os.PathLike | Reader | None = None) -> Callable:
    """A callable that answers a task for source text.

    Args:
        task: One of `PIPELINES`.
        model: A reader, or the folder of one; None: the one that comes with the package.

    Raises:
        ValueError: There is no such pipeline, or the model is one for another task.
        FileNotFoundError: The folder holds no model, or none comes with the package.
    """
    if task not in PIPELINES:
        raise ValueError(f"There is no pipeline {task!r}. {suggest(task, PIPELINES)}")
    reader = model if isinstance(model, Reader) else _opened(str(model or SHIPPED / task))
    if reader.task != task:
        raise ValueError(f"The model answers {reader.task!r}, not {task!r}.")
    return PIPELINES[task](reader)


@functools.lru_cache(maxsize=4)
def _opened(folder: str) -> Reader:
    return readers.load(folder)
