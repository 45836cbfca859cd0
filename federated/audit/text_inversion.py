"""Gradient inversion of texts: the tokens of a small batch, from the gradient uploaded for it.

In two steps. The rows of the token table whose gradient is not zero are the words of the batch
(Melis et al. 2019, section 4.1). Which word stands where is then found by matching the rest of the
gradient, with a mixture of these words at every place:

    W* = argmin over W of  1 - cos(grad L(softmax(W) E, y), g)

by Adam, from random mixtures, as in Deng et al. 2021 (TAG), equation 2, with cosines as in
Balunovic et al. 2022 (LAMP) and the search kept to words of the batch. Each place takes its
likeliest word; then the best of all single words put elsewhere and of all swaps is taken, as often
as it brings the gradients closer (LAMP, section 4.2, without its language model).
Noise gives every row a gradient, so that the words are lost before their order is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from scipy.optimize import linear_sum_assignment

from jaxfm.federated.audit.inversion import cosine, gradient_by
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.optimizer import update
from jaxfm.tasks import Task

TABLE = ("embed", "tokens", "table")  # of this library's decoders and encoders


class InvertedText(NamedTuple):
    """What was recovered.

    Attributes:
      tokens: i32[B, T], rows in no order among those of one label.
      mismatch: f32[], 1 - cos of their gradient and the one that was given; 0 is a perfect match.
    """

    tokens: Array
    mismatch: Array


def words_of(gradient: Array, number: int) -> tuple[Array, Array]:
    """The tokens whose rows have the largest gradient, i32[K], and whether it is not 0, bool[K].

    Args:
      gradient: of the table, f[V, D].
      number: K, or V where that is less.
    """
    norms = jnp.linalg.norm(gradient.astype(jnp.float32), axis=1)
    largest, tokens = lax.top_k(norms, min(number, len(norms)))
    return tokens, largest > 0


def invert_text(
    model: Model,
    variables: Variables,
    task: Task,
    gradient: PyTree,
    labels: Array,
    length: int,
    key: Key,
    *,
    leaf: str = "tokens",
    table: Sequence[str] = TABLE,
    steps: int = 100,
    restarts: int = 4,
    learning_rate: float = 0.3,
) -> InvertedText:
    """Texts whose gradient points where a given one does; the best of some random starts.

    Args:
      model, variables, task: that the gradient was taken with; a model whose token table is used
        for its inputs alone (a classifier: tied logits give every row a gradient).
      gradient: like `variables.params`; an upload's movement, less its sign.
      labels: i32[B], which an attacker knows or reads off the last layer's gradient.
      length: T, of every text; there is no padding.
      key: of the starts.
      leaf: of the batch that holds tokens; a leaf "mask" of ones goes with it.
      table: path of the token table in the parameters.
      steps: of Adam.
      restarts: starts, side by side.
      learning_rate: of Adam.
    Raises:
      ValueError: steps, restarts or length below 1, or no table at that path.
    """
    if min(steps, restarts, length) < 1:
        raise ValueError(
            f"steps={steps}, restarts={restarts} and length={length} must be at least 1."
        )
    _at(variables.params, table)
    words = words_of(_at(gradient, table), len(labels) * length)
    how = _How(model.apply, task, leaf, tuple(table), length, steps, learning_rate)
    keys = jax.random.split(key, restarts)
    tries = _search(how, variables, gradient, jnp.asarray(labels), words, keys)
    return jax.tree.map(lambda x: x[jnp.argmin(tries.mismatch)], tries)


class _How(NamedTuple):
    """What of a search is compiled in; see `invert_text`."""

    apply: Callable
    task: Task
    leaf: str
    table: tuple[str, ...]
    length: int
    steps: int
    learning_rate: float


@functools.partial(jax.jit, static_argnames="how")
def _search(
    how: _How, variables: Variables, gradient: PyTree, labels: Array,
    words: tuple[Array, Array], keys: Array,
) -> InvertedText:  # fmt: skip
    """All tries, one after another."""
    (tokens, there), size = words, (len(labels), how.length)
    num = size[0] * size[1]
    rows = _at(variables.params, how.table)
    # Each place has a row of its own behind the table, which no number of a real token is.
    places = jnp.arange(num, dtype=jnp.int32)
    batch = {
        how.leaf: rows.shape[0] + places.reshape(size),
        "mask": jnp.ones(size, bool),
        "label": labels,
    }
    without = lambda tree: _with(tree, how.table, jnp.zeros(()))
    adam = optax.adam(how.learning_rate)

    def mismatch(vectors: Array) -> Array:
        table = jnp.concatenate([rows, vectors.reshape(-1, rows.shape[1]).astype(rows.dtype)])
        params = _with(variables.params, how.table, table)
        own = gradient_by(how.apply, variables._replace(params=params), how.task, batch)
        return 1 - cosine(without(own), without(gradient))

    def of_mixture(weights: Array) -> Array:
        shares = jax.nn.softmax(jnp.where(there, weights, -jnp.inf), axis=-1)
        return mismatch(jnp.einsum("nk,kd->nd", shares, rows[tokens].astype(jnp.float32)))

    def of_words(chosen: Array) -> Array:
        words = mismatch(rows[tokens[chosen]])
        return jnp.where(there[chosen].all(), words, jnp.inf)

    def step(carry, _):
        weights, state = carry
        updates, state = update(adam, jax.grad(of_mixture)(weights), state, weights)
        return (weights + updates, state), None

    def exchange(carry):
        chosen, least, _ = carry
        moved = jax.vmap(lambda place, word: chosen.at[place].set(word))(*_every(num, len(tokens)))
        swapped = jax.vmap(lambda i, j: chosen.at[i].set(chosen[j]).at[j].set(chosen[i]))
        others = jnp.concatenate([moved, swapped(*_every(num, num))])
        costs = lax.map(of_words, others)
        best = jnp.argmin(costs)
        better = costs[best] < least
        return jnp.where(better, others[best], chosen), jnp.minimum(costs[best], least), better

    def one(key: Key) -> InvertedText:
        start = jax.random.normal(key, (num, len(tokens)))
        (weights, _), _ = lax.scan(step, (start, adam.init(start)), length=how.steps)
        chosen = jnp.argmax(jnp.where(there, weights, -jnp.inf), axis=-1).astype(jnp.int32)
        first = chosen, jnp.float32(jnp.inf), jnp.bool_(True)
        chosen, least, _ = lax.while_loop(lambda carry: carry[2], exchange, first)
        return InvertedText(tokens[chosen].astype(jnp.int32).reshape(size), least)

    return lax.map(one, keys)


def _every(one: int, other: int) -> tuple[Array, Array]:
    """All pairs of two numbers below these, as i32[one * other] each."""
    first, second = np.indices((one, other), np.int32).reshape(2, -1)
    return jnp.asarray(first), jnp.asarray(second)


def recovered_tokens(true: Array, found: Array) -> float:
    """The share of places whose token was found, texts paired so that it is largest.

    Args:
      true, found: i32[B, T].
    """
    texts, others = np.asarray(true), np.asarray(found)
    right = (texts[:, None] == others[None]).mean(-1)
    rows, columns = linear_sum_assignment(-right)
    return float(right[rows, columns].mean())


def _at(tree: PyTree, path: Sequence[str]) -> Array:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            raise ValueError(f"There is no token table at {'/'.join(path)} in the parameters.")
        tree = tree[name]
    return tree


def _with(tree: PyTree, path: Sequence[str], leaf: Array) -> PyTree:
    """The tree with another leaf at this path."""
    first, *rest = path
    return tree | {first: _with(tree[first], rest, leaf) if rest else leaf}
