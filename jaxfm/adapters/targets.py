"""Which kernels of a model an adapter changes: patterns of their names."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence

import jax

from jaxfm.adapters.adapter import Site, fetch, leaf_paths
from jaxfm.frozen import thaw
from jaxfm.model import Model
from jaxfm.trees import Path

# Patterns by the names that are in use for them.
PRESETS = {
    "attention": ("attention.q", "attention.k", "attention.v", "attention.o"),
    "qv": ("attention.q", "attention.v"),
    "mlp": ("layers.mlp.*",),
    "linear": ("layers.*",),
    "all-linear": ("layers.*",),
    "q_proj": ("attention.q",), "k_proj": ("attention.k",), "v_proj": ("attention.v",),
    "o_proj": ("attention.o",), "query": ("attention.q",), "key": ("attention.k",),
    "value": ("attention.v",), "gate_proj": ("mlp.gate",), "up_proj": ("mlp.up",),
    "down_proj": ("mlp.down",),
}  # fmt: skip


def sites_of(model: Model) -> dict[str, Site]:
    """Returns every kernel of a model that an adapter may change, by its dotted name.

    That is every leaf "kernel" of two axes or more, ("layers", "attention", "q", "kernel") under
    the name "layers.attention.q". Where a model does not say which axes are inputs, the last one is
    the output.
    """
    root = model if model.adapter is None else model.adapter.root
    axes = thaw(root.axes).params
    shapes = thaw(jax.eval_shape(root.init, jax.random.key(0))).params
    sites = {}
    for path in leaf_paths(axes):
        names = fetch(axes, path)
        stacked = names[:1] == ("layer",)
        if path[-1] != "kernel" or len(names) - stacked < 2:
            continue
        leaf = fetch(shapes, path)
        inputs = root.kernels.get(path, len(names) - stacked - 1)
        sites[".".join(path[:-1])] = Site(path, names, leaf.shape, leaf.dtype, inputs)
    return sites


def choose(model: Model, targets: str | Sequence[str]) -> tuple[Site, ...]:
    """Returns the sites that any of the patterns matches.

    Args:
      model: whose kernels they are.
      targets: names or patterns, or one text with commas. "q" and "attention.q" are ends of names;
        "layers.mlp.*" is a pattern; "attention", "mlp", "linear" and the others of `PRESETS` stand
        for several.
    Raises:
      ValueError: a pattern matches nothing; the message suggests what would.
    """
    given = targets.split(",") if isinstance(targets, str) else list(targets)
    sites = sites_of(model)
    chosen: set[str] = set()
    for text in given:
        own = {name for name in sites for p in PRESETS.get(text, (text,)) if matches(name, p)}
        if not own:
            ends = [".".join(name.split(".")[-2:]) for name in sites]
            close = difflib.get_close_matches(text, [*PRESETS, *ends, *sites], 1, 0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"targets={text!r} matches no kernel of the model; {hint}It has {', '.join(sites)}."
            )
        chosen |= own
    return tuple(site for name, site in sites.items() if name in chosen)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is a dotted name, or the end of one."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def is_trained_by(model: Model, patterns: Sequence[str]) -> Callable[[Path], bool]:
    """Returns which of a model's own parameters any of the patterns matches, by path.

    Raises:
      ValueError: a pattern matches none.
    """
    names = {path: ".".join(path) for path in leaf_paths(thaw(model.axes).params)}
    chosen: set[Path] = set()
    for pattern in patterns:
        own = {path for path, name in names.items() if fnmatch.fnmatchcase(name, pattern)}
        own |= {path for path, name in names.items() if name.startswith(f"{pattern}.")}
        if not own:
            tops = sorted({path[0] for path in names})
            raise ValueError(
                f"trained={pattern!r} matches no parameter of the model; give the beginning of a "
                f"name, or a pattern. The names at the top are {', '.join(tops)}."
            )
        chosen |= own
    return lambda path: path in chosen


def rank_at(site: Site, rank: int, ranks: Mapping[str, int]) -> int:
    """The rank at a site: that of the first pattern that matches it, else `rank`."""
    for pattern, own in ranks.items():
        if matches(dotted(site.path), pattern):
            return own
    return rank


def dotted(path: Path) -> str:
    """The name of the linear map that a kernel belongs to."""
    return ".".join(path[:-1])
