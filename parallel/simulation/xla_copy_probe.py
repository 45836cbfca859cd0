"""A probe of whether XLA copies the cache: the compiled program of a tick, and its copies."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.generation import advance, start
from jaxfm.parallel.pipe.state import State
from jaxfm.parallel.sampling import Sampling
from jaxfm.parallel.verification import Rules, Stats, Text


def cache_copies(decoder: Decoder, *, cells: int = 128) -> int:
    """The number of copies of a stage's keys or values in the optimised program of a tick.

    It should be 0: a copy makes every tick slower. Whether XLA makes one depends on its version.

    Args:
      decoder: of `pipeinfer`.
      cells: tokens of the text.
    """
    return count_copies(*tick_program(decoder, cells=cells))


def count_copies(program: str, state: State) -> int:
    """The number of copies of keys or values in what `tick_program` returned."""
    leaves = jax.tree.leaves(state.rows)
    sizes = {math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves}
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy(?:-start)?\(", program)
    return sum(math.prod(map(int, shape.split(","))) in sizes for shape in copied)


def tick_program(decoder: Decoder, *, cells: int = 128) -> tuple[str, Any]:
    """The optimised program of a piece of one text, as XLA prints it, and its first state.

    Args:
      decoder: any.
      cells: tokens of the text.
    """
    length, limit = jnp.full((1,), 2, jnp.int32), jnp.full((1,), cells, jnp.int32)
    tokens, zero = jnp.zeros((1, cells), jnp.int32), jnp.zeros((1,), jnp.int32)
    drafts = jnp.zeros((1, decoder.draft_length), jnp.int32)
    stats = Stats(zero, drafts, drafts)
    text = Text(tokens, length, limit, zero > 0, zero, stats, zero > 0)
    rules = Rules(Sampling(jax.random.key(0), zero), jnp.zeros((0,), jnp.int32))
    state = start(decoder.functions, decoder.variables, tokens, length, 16, None)
    program = advance.lower(decoder.functions, decoder.variables, state, text, rules, 4).compile()
    return program.as_text() or "", state


def count_operations(program: str) -> int:
    """The number of operations that one tick starts, loops inside it counted once.

    On small models a tick takes about as long as its operations are many, whatever they compute.

    Args:
      program: of `tick_program`.
    """
    bodies = dict(re.findall(r"^%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", program, re.M | re.S))
    entry = re.search(r"^ENTRY [^\n]*\{\n(.*?)^\}", program, re.M | re.S)
    free = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while"}

    def inside(body: str) -> int:
        loops = re.findall(r" while\(.*body=%?([\w.-]+)", body)
        kinds = re.findall(r"^ .*? = (?:\(.*?\)|\S+) ([\w-]+)\(", body, re.M)
        own = sum(kind not in free for kind in kinds)
        return own + sum(inside(bodies[loop]) for loop in loops)

    assert entry is not None
    ticks = re.findall(r" while\(.*body=%?([\w.-]+)", entry.group(1))
    return sum(inside(bodies[loop]) for loop in ticks)
