"""Flax Linen modules as models.

>>> import jax
>>> from flax import linen
>>> model = from_linen(linen.Dense(2), jax.numpy.ones((1, 4)))
>>> variables = model.init(jax.random.key(0))
>>> model.apply(variables, jax.numpy.ones((3, 4)))[0].shape
(3, 2)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import meta, unfreeze
from flax.errors import InvalidRngError

from jaxfm.model import Key, Model, PyTree, Variables
from jaxfm.training_mode import MODE_NAMES, mode_arguments, mode_value

_COLLECTIONS = {"params": "params", "batch_stats": "stats"}


def from_linen(module: linen.Module, inputs: PyTree) -> Model:
    """Turns a Linen module into a `Model`, with its batch statistics, dropout and axis names.

    "params" are trained and "batch_stats" are `Variables.stats`, which training returns anew.
    Random numbers of training come from the `key` of each call, as the stream "dropout"; other
    streams fall back to one called "params", as always in Linen. Training is switched on and off by
    an argument of the module's call, or else by a field of the module, named train, training,
    is_training, deterministic or use_running_average. Logical axes are the names of
    `linen.with_partitioning` and `linen.with_logical_partitioning`.

    Args:
      module: not bound; its call takes the inputs as its one argument besides that.
      inputs: an example of them, arrays or `jax.ShapeDtypeStruct`s, for the shapes of parameters.
    Raises:
      ValueError: the module holds collections besides these two.
    """
    forward = type(module).__call__
    in_call = mode_arguments(forward, train=False)
    fields = {field.name for field in dataclasses.fields(module)} - set(in_call)
    in_fields = [name for name in MODE_NAMES if name in fields]

    def switched(train: bool) -> tuple[linen.Module, dict[str, bool]]:
        changes = {name: mode_value(name, train) for name in in_fields}
        return module.clone(**changes) if changes else module, mode_arguments(forward, train)

    def boxed(key: Key) -> dict[str, PyTree]:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
        resting, told = switched(False)
        return unfreeze(resting.init(_streams(key), zeros, **told))

    shapes = jax.eval_shape(boxed, jax.random.key(0))
    if unknown := sorted(shapes.keys() - _COLLECTIONS.keys()):
        raise ValueError(
            f"The module has variables in {unknown[0]!r}; a model may have 'params' (trained) and "
            "'batch_stats' (statistics)."
        )

    def gather(collections: dict[str, PyTree]) -> Variables:
        parts = {own: collections.get(name, {}) for name, own in _COLLECTIONS.items()}
        return Variables(**parts, live={})

    def init(key: Key) -> Variables:
        return gather(meta.unbox(boxed(key)))

    def run(variables: Variables, inputs: PyTree, train: bool, key: Key | None):
        collections = {"params": variables.params}
        collections |= {"batch_stats": variables.stats} if variables.stats else {}
        own, told = switched(train)
        rngs = _streams(key) if train and key is not None else None
        if not train:
            return own.apply(collections, inputs, rngs=rngs, **told), variables.stats
        output, new = own.apply(collections, inputs, rngs=rngs, mutable=["batch_stats"], **told)
        return output, unfreeze(new).get("batch_stats", variables.stats)

    def apply(variables: Variables, inputs: PyTree, *, train: bool = False, key: Key | None = None):
        try:
            return run(variables, inputs, train, key)
        except InvalidRngError:
            if not train or key is not None:
                raise
            raise ValueError("This module draws random numbers in training; pass `key`.") from None

    return Model(init, apply, gather(jax.tree.map(_names, shapes, is_leaf=_is_box)))


def _streams(key: Key) -> dict[str, Key]:
    """Returns the random streams of a call; Linen takes "params" where another one is missing."""
    return {"params": key, "dropout": jax.random.fold_in(key, 1)}


def _is_box(x: Any) -> bool:
    return isinstance(x, meta.AxisMetadata)


def _names(leaf: Any) -> tuple[str | None, ...]:
    """Returns the axis names of a leaf, boxed or not."""
    names = getattr(leaf, "names", None) if _is_box(leaf) else None
    return tuple(names) if names else (None,) * len(meta.unbox(leaf).shape)
