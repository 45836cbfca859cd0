"""What the server takes from a client, and why it refuses the rest.

Whatever a client sends, the round goes on: a reply that is malformed, too large, of other shapes or
types, not finite, beyond what its client can have trained on, a repetition, or not an answer to the
order of this round counts for nothing, and its reason is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfm.federated.algorithm import Info
from jaxfm.federated.remote.standalone import Leaf, Refusal, not_finite, unpack
from jaxfm.model import PyTree


class Reply(NamedTuple):
    """What came from a client's process.

    Attributes:
      client: whose order it answers.
      config: plain values by name.
      wires: arrays by name, as `standalone.Wire`.
      failure: why there is nothing; empty where there is.
    """

    client: int
    config: Mapping[str, Any]
    wires: Mapping[str, Any]
    failure: str = ""


class Refused(NamedTuple):
    """A client whose reply did not count: who, and one sentence."""

    client: int
    reason: str


class Expected(NamedTuple):
    """What a reply to an order must look like.

    Attributes:
      config: run, round, client and nonce, which come back as they were sent.
      upload, info: leaves by name.
      most_examples: that the client may have trained on; infinity where nobody knows.
      most_steps: that its machine has time for.
      largest: magnitude of an entry.
      says: texts that a reply also has: its fault, and a message of masks.
    """

    config: Mapping[str, Any]
    upload: Mapping[str, Leaf]
    info: Mapping[str, Leaf]
    most_examples: float = math.inf
    most_steps: float = math.inf
    largest: float = 1e30
    says: tuple[str, ...] = ("fault",)


class Taken(NamedTuple):
    """A reply that is in order: lists of leaves; `fault` says what the client found itself."""

    upload: list[np.ndarray]
    info: list[np.ndarray]
    fault: str


def check_reply(reply: Reply, expected: Expected) -> Taken:
    """Takes a reply apart.

    Raises:
      Refusal: the reason, one sentence.
    """
    if reply.failure:
        raise Refusal(f"It failed: {reply.failure[:300]}")
    _check_config(reply.config, expected.config, expected.says)
    fault = reply.config["fault"]
    parts = expected.info if fault else {**expected.upload, **expected.info}
    arrays = unpack(reply.wires, parts)
    if sentence := not_finite(arrays):
        raise Refusal(sentence)
    for name, array in arrays.items():
        if array.size and np.dtype(array.dtype).kind not in "biu":
            most = float(np.abs(np.asarray(array, np.float64)).max())
            if most > expected.largest:
                raise Refusal(
                    f"{name} has an entry of magnitude {most:.3g}, where at most "
                    f"{expected.largest:.3g} is expected."
                )
    listed = lambda leaves: [arrays[name] for name in leaves if name in arrays]
    return Taken(listed(expected.upload), listed(expected.info), str(fault))


def _check_config(
    config: Mapping[str, Any], wanted: Mapping[str, Any], says: tuple[str, ...]
) -> None:
    """The names and numbers of an answer, which are those of the order."""
    allowed = {*wanted, *says}
    if missing := sorted(allowed - set(config)):
        raise Refusal(f"It does not say its {missing[0]}.")
    if more := sorted(map(str, set(config) - allowed)):
        raise Refusal(f"It says {more[0][:80]!r}, which is not asked for.")
    for name, value in wanted.items():
        given = config[name]
        if type(given) is not type(value) or given != value:
            raise Refusal(f"Its {name} is {str(given)[:80]!r}, where {value!r} was asked for.")
    if not isinstance(config["fault"], str) or len(config["fault"]) > 1000:
        raise Refusal("Its fault is no short text.")
    if not isinstance(config.get("message", ""), str):
        raise Refusal("Its message is no text.")


def check_info(info: Info, expected: Expected) -> None:
    """Checks the figures by which a client counts.

    Raises:
      Refusal: negative counts, or more examples or steps than the client can have trained on.
    """
    figures = {"examples": info.examples, "steps": info.spent.steps, "targets": info.loss_count}
    for name, value in figures.items():
        if float(value) < 0:
            raise Refusal(f"It reports {float(value):.3g} {name}.")
    limits = {"examples": expected.most_examples, "steps": expected.most_steps}
    for name, most in limits.items():
        if float(figures[name]) > most * (1 + 1e-5):
            raise Refusal(
                f"It reports {float(figures[name]):.6g} {name}, where it has at most {most:.6g}."
            )


def as_tree(shapes: PyTree, leaves: list[np.ndarray]) -> PyTree:
    """The tree of these shapes."""
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
