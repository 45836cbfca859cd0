"""Parameters that are held fixed, in a place of their own.

    freeze(model, is_frozen).apply(freeze_variables(v, is_frozen), x) == model.apply(v, x)

A gradient with respect to `variables.params`, an optimizer state and an upload are trees like
`params`, so none of them has a frozen leaf.

>>> import jax
>>> from jaxfm.testing import tiny_cnn
>>> model = freeze(tiny_cnn(), lambda path: path[0] != "classifier")
>>> variables = model.init(jax.random.key(0))
>>> sorted(variables.params), sorted(variables.frozen)
(['classifier'], ['conv1', 'conv2', 'dense'])
>>> sorted(thaw(variables).params)
['classifier', 'conv1', 'conv2', 'dense']
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxfm.model import Key, Model, Variables
from jaxfm.trees import Path, join_tree, split_tree


def freeze(model: Model, is_frozen: Callable[[Path], bool]) -> Model:
    """Returns the model with some of its parameters in `Variables.frozen`.

    `apply` and `stages` take the new variables; `init` and `axes` follow. Use `freeze_variables`
    for variables that exist already, such as those of `jaxfm.hub.load`.

    Args:
      model: any model, frozen in part or not.
      is_frozen: `(path) -> bool` of a parameter's path, for example ("layers", "mlp", "up",
        "kernel"). Stacked layers have one path.
    Raises:
      ValueError: no parameter is chosen.
    """
    axes = freeze_variables(model.axes, is_frozen)
    stages = model.stages

    def init(key: Key) -> Variables:
        return freeze_variables(model.init(key), is_frozen)

    return model._replace(
        init=init,
        apply=_on_joined(model.apply),
        axes=axes,
        stages=None if stages is None else type(stages)(*map(_on_joined, stages)),
    )


def freeze_variables(variables: Variables, is_frozen: Callable[[Path], bool]) -> Variables:
    """Returns the variables with the parameters that `is_frozen` chooses moved to `frozen`.

    Raises:
      ValueError: no parameter is chosen.
    """
    params, chosen = split_tree(variables.params, is_frozen)
    if not chosen:
        raise ValueError(
            "No parameter is frozen: `is_frozen` holds for no path. The names at the top are "
            f"{sorted(variables.params)}."
        )
    return variables._replace(params=params, frozen=join_tree(variables.frozen, chosen))


def thaw(variables: Variables) -> Variables:
    """Returns the variables with all parameters in `params`; `axes` can be thawed, too."""
    return variables._replace(params=join_tree(variables.params, variables.frozen), frozen={})


def _on_joined(function: Callable) -> Callable:
    """Returns `function` called with variables whose `params` contain the frozen ones, too."""

    def call(variables: Variables, *args: Any, **kwargs: Any) -> Any:
        params = join_tree(variables.params, variables.frozen)
        return function(variables._replace(params=params), *args, **kwargs)

    return call
