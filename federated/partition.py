"""Which part of the parameter tree is shared, and which never leaves its owner.

A partition is a predicate of paths: `is_personal(("classifier", "bias"))`. The two parts of a tree
are trees with the same names and without each other's branches; `join_tree` puts them together.

>>> shared, personal = split_tree({"stem": {"kernel": 1}, "head": {"bias": 2}}, head)
>>> shared, personal
({'stem': {'kernel': 1}}, {'head': {'bias': 2}})
>>> join_tree(shared, personal) == {"stem": {"kernel": 1}, "head": {"bias": 2}}
True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from jaxfm.model import Model, PyTree, Variables

Path = tuple[str, ...]
IsPersonal = Callable[[Path], bool]

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


def under(*names: str) -> IsPersonal:
    """All that stands under one of these names at the top of the tree: `under("dense2")`."""
    return lambda path: path[0] in names


def outside(predicate: IsPersonal) -> IsPersonal:
    """What `predicate` leaves: `outside(head)` is the body."""
    return lambda path: not predicate(path)


def split_tree(tree: PyTree, is_personal: IsPersonal) -> tuple[PyTree, PyTree]:
    """(shared, personal): the leaves of nested dicts by their paths, empty branches left out.

    Args:
      tree: nested dicts with string keys; a leaf is what is not a dict.
      is_personal: of the path of a leaf.
    """

    def part(node: Mapping, path: Path, wanted: bool) -> dict:
        out = {}
        for name, value in node.items():
            here = (*path, name)
            if isinstance(value, Mapping):
                below = part(value, here, wanted)
                if below:
                    out[name] = below
            elif is_personal(here) == wanted:
                out[name] = value
        return out

    return part(tree, (), False), part(tree, (), True)


def join_tree(shared: PyTree, personal: PyTree) -> PyTree:
    """The inverse of `split_tree`.

    Raises:
      ValueError: both parts have the same leaf.
    """

    def join(a: Mapping, b: Mapping, path: Path) -> dict:
        out = dict(a)
        for name, value in b.items():
            here = (*path, name)
            if name not in a:
                out[name] = value
            elif isinstance(value, Mapping) and isinstance(a[name], Mapping):
                out[name] = join(a[name], value, here)
            else:
                raise ValueError(f"Both parts have {'.'.join(here)!r}: a leaf has one place.")
        return out

    return join(shared, personal, ())


def split_variables(variables: Variables, is_personal: IsPersonal) -> tuple[Variables, Variables]:
    """(shared, personal) of parameters and statistics; `live`, structure, stays with shared."""
    params = split_tree(variables.params, is_personal)
    stats = split_tree(variables.stats, is_personal)
    return Variables(params[0], stats[0], variables.live), Variables(params[1], stats[1], {})


def join_variables(shared: Variables, personal: Variables) -> Variables:
    """The inverse of `split_variables`."""
    return Variables(
        join_tree(shared.params, personal.params),
        join_tree(shared.stats, personal.stats),
        shared.live,
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
