"""A trained encoder of source code together with how it reads: what pipelines and scripts open.

Its folder is one of `jaxfm.hub` (config.json, model.safetensors) with the tokenizer's file and
reader.json beside them, which names the task, the lengths, and what was measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxfm import hub
from jaxfm.model import Model, Variables
from jaxfm.tasks.hpc import tokenizers
from jaxfm.tasks.hpc.encoding import encode
from jaxfm.tasks.hpc.lexer import compact
from jaxfm.tokenizer import Tokenizer

FILE = "reader.json"
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Reading:
    """How source becomes arrays.

    Attributes:
        tokenizer: Of the compact form of a source; see `lexer.compact`.
        max_len: T, tokens of a row; the rest of a longer source is not read.
        max_edges: E, edges of the dependence graph of a row; 0 reads no graph.
    """

    tokenizer: Tokenizer
    max_len: int = 160
    max_edges: int = 160

    def arrays(self, sources: Sequence[str]) -> dict[str, np.ndarray]:
        """See `encoding.encode`; lines keep their numbers unless a source has comments."""
        texts = [compact(source) for source in sources]
        return encode(texts, self.tokenizer, max_len=self.max_len, max_edges=self.max_edges)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A trained encoder.

    Attributes:
        task: The record that it was trained for, for example "race-detection".
        model, variables: The network.
        reading: How it reads.
        facts: What was measured, and thresholds; plain numbers and words.
    """

    task: str
    model: Model
    variables: Variables
    reading: Reading
    facts: dict[str, Any]

    def outputs(self, sources: Sequence[str]) -> Any:
        """What the head says of each source, as NumPy arrays f32[N, ...]."""
        arrays = self.reading.arrays(sources)
        return forward(self.model, self.variables, arrays)

    def cut(self, source: str) -> bool:
        """Whether a source is longer than what is read of it."""
        room = self.reading.max_len
        text = compact(source)
        return len(text) > room and len(self.reading.tokenizer.encode(text)) + 2 > room


def forward(model: Model, variables: Variables, arrays: dict[str, np.ndarray]) -> Any:
    """The outputs f32[N, ...] of a network on arrays of `encode`, in batches of one shape."""
    inputs = {name: arrays[name] for name in ("tokens", "mask", "edges") if name in arrays}
    size = len(inputs["tokens"])
    batch = min(_BATCH, 1 << max(size - 1, 0).bit_length())
    parts = []
    for first in range(0, size, batch):
        rows = np.minimum(np.arange(first, first + batch), size - 1)
        part = {name: leaf[rows] for name, leaf in inputs.items()}
        parts.append(jax.device_get(_forward(model.apply, variables, part)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:size], *parts)


@jax.jit(static_argnums=0)
def _forward(apply, variables: Variables, inputs):
    return apply(variables, inputs)[0]


def probabilities(outputs: Any) -> np.ndarray:
    """f32[N]: the probability of class 1, of the outputs of a head with two classes."""
    logits = outputs["classes"] if isinstance(outputs, dict) else outputs
    return np.asarray(1 / (1 + np.exp(logits[:, 0] - logits[:, 1])), np.float32)


def save(reader: Reader, folder: str | os.PathLike) -> None:
    """Writes a folder, which must not be there or be empty, for `load`."""
    hub.save(reader.model, reader.variables, folder)
    tokenizers.save(reader.reading.tokenizer, pathlib.Path(folder))
    told = {
        "task": reader.task, "max_len": reader.reading.max_len,
        "max_edges": reader.reading.max_edges, "facts": reader.facts,
    }  # fmt: skip
    (pathlib.Path(folder) / FILE).write_text(json.dumps(told, indent=2) + "\n")


def load(folder: str | os.PathLike) -> Reader:
    """Opens a folder of `save`.

    Raises:
        FileNotFoundError: The folder holds no reader.
        ValueError: Its files do not fit together.
    """
    file = pathlib.Path(folder) / FILE
    if not file.exists():
        raise FileNotFoundError(
            2, "The folder holds no trained reader of code; train one with launch.hpc train",
            str(file),
        )  # fmt: skip
    try:
        told = json.loads(file.read_text())
        task, facts = str(told["task"]), dict(told["facts"])
        max_len, max_edges = int(told["max_len"]), int(told["max_edges"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from None
    model, variables = hub.load(folder)
    tokenizer = tokenizers.load(pathlib.Path(folder))
    room = model.config.max_len, model.config.vocab_size
    if max_len > room[0] or tokenizer.vocab_size > room[1]:
        raise ValueError(
            f"{file}: texts of {max_len} tokens of {tokenizer.vocab_size} do not fit a model of "
            f"{room[0]} tokens of {room[1]}."
        )
    return Reader(task, model, variables, Reading(tokenizer, max_len, max_edges), facts)
