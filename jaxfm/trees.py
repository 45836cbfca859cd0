"""Nested dicts split in two by the paths of their leaves, and joined again.

>>> tree = {"stem": {"kernel": 1}, "head": {"bias": 2}}
>>> rest, chosen = split_tree(tree, lambda path: path[0] == "head")
>>> rest, chosen
({'stem': {'kernel': 1}}, {'head': {'bias': 2}})
>>> join_tree(rest, chosen) == tree
True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxfm.model import PyTree

Path = tuple[str, ...]


def split_tree(tree: PyTree, is_chosen: Callable[[Path], bool]) -> tuple[PyTree, PyTree]:
    """Returns (rest, chosen): two trees with the names of `tree`, without empty branches.

    Args:
      tree: nested dicts with string keys; a leaf is what is not a dict.
      is_chosen: `(path of a leaf) -> bool`.
    """

    def part(node: Mapping, path: Path, wanted: bool) -> dict:
        out = {}
        for name, value in node.items():
            here = (*path, name)
            if isinstance(value, Mapping):
                below = part(value, here, wanted)
                if below:
                    out[name] = below
            elif is_chosen(here) == wanted:
                out[name] = value
        return out

    return part(tree, (), False), part(tree, (), True)


def join_tree(first: PyTree, second: PyTree) -> PyTree:
    """Returns one tree with the leaves of both: the inverse of `split_tree`.

    Raises:
      ValueError: both trees have a leaf of the same name, and it is not the same object.
    """

    def join(a: Mapping, b: Mapping, path: Path) -> dict:
        out = dict(a)
        for name, value in b.items():
            here = (*path, name)
            if name not in a:
                out[name] = value
            elif isinstance(value, Mapping) and isinstance(a[name], Mapping):
                out[name] = join(a[name], value, here)
            elif a[name] is not value:
                raise ValueError(f"Both parts have {'.'.join(here)!r}: a leaf has one place.")
        return out

    return join(first, second, ())
