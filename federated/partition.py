"""Which part of the parameter tree is shared, and which never leaves its owner.

A partition is a predicate of paths: `is_personal(("classifier", "bias"))`.

>>> from jaxfm.trees import split_tree
>>> shared, personal = split_tree({"stem": {"kernel": 1}, "head": {"bias": 2}}, head)
>>> shared, personal
({'stem': {'kernel': 1}}, {'head': {'bias': 2}})
"""

from __future__ import annotations

import jax

from jaxfm.federated.algorithm import IsPersonal
from jaxfm.model import Model, Variables
from jaxfm.trees import Path, join_tree, split_tree

_HEADS = ("head", "classifier")


def head(path: Path) -> bool:
    """The last part of our model families: the classifier, or what stands over the last layer."""
    return path[0] in _HEADS


def norms(path: Path) -> bool:
    """Scales, shifts and statistics of normalisation, anywhere (FedBN, Li et al. 2021)."""
    return any(name == "norm" or name.endswith("_norm") for name in path)


def statistics(path: Path) -> bool:
    """Running means and variances of batch norm alone; scales and shifts are shared."""
    return path[-1] in ("mean", "var")


def either(*predicates: IsPersonal) -> IsPersonal:
    """What any of them names: `either(head, statistics)`."""
    return lambda path: any(predicate(path) for predicate in predicates)


def nothing(path: Path) -> bool:
    """No leaf: the partition without a personal part."""
    return False


def under(*names: str) -> IsPersonal:
    """All that stands under one of these names at the top of the tree: `under("dense2")`."""
    return lambda path: path[0] in names


def outside(predicate: IsPersonal) -> IsPersonal:
    """What `predicate` leaves: `outside(head)` is the body."""
    return lambda path: not predicate(path)


def split_variables(variables: Variables, is_personal: IsPersonal) -> tuple[Variables, Variables]:
    """(shared, personal) of parameters and statistics; all else stays with the shared part."""
    params = split_tree(variables.params, is_personal)
    stats = split_tree(variables.stats, is_personal)
    shared = variables._replace(params=params[0], stats=stats[0])
    return shared, Variables(params[1], stats[1], {})


def join_variables(shared: Variables, personal: Variables) -> Variables:
    """The inverse of `split_variables`."""
    return shared._replace(
        params=join_tree(shared.params, personal.params),
        stats=join_tree(shared.stats, personal.stats),
    )


def check_partition(model: Model, is_personal: IsPersonal) -> None:
    """Raises ValueError where a predicate leaves no parameters to share, or nothing personal."""
    variables = jax.eval_shape(model.init, jax.random.key(0))
    shared, personal = split_variables(variables, is_personal)
    names = f"the names at the top are {sorted(variables.params)}; `under(...)` picks by them."
    if not shared.params:
        raise ValueError(f"This partition shares no parameters; {names}")
    if not (personal.params or personal.stats):
        raise ValueError(f"This partition keeps nothing personal; {names}")
