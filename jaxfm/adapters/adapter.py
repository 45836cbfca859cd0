"""What an adapter is: a model around a model, whose backbone is frozen.

    adapted = lora(model, rank=8)
    variables = attach(adapted, variables, key)      # of the model, from a file say
    ...                                              # train `variables.params`, and nothing else
    plain_model, plain_variables = merge(adapted, variables)

An adapter's own parameters stand beside the kernel that they change, in a dict of the adapter's
name: params["layers"]["attention"]["q"]["lora"]["a"], frozen["layers"]["attention"]["q"]["kernel"].
Their axes have the names of the kernel's, so that a `Subnet` cuts both alike. `apply` puts the
parts together, as kernels in factored form (`jaxfm.kernels`); a module that cannot take these (a
convolution, a user's own) gets the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxfm.frozen import freeze_variables, thaw
from jaxfm.kernels import Kernel, whole
from jaxfm.model import Array, Key, Model, PyTree, Stages, Variables
from jaxfm.trees import Path, join_tree, split_tree
from jaxfm.virtual_tokens import prefix_length


class Adapter(NamedTuple):
    """What stands around a model (`Model.adapter`).

    Attributes:
      base: the model that was adapted, which may be adapted itself.
      root: the plain model within all adapters.
      attach: `(variables of base, key) -> variables`, with a fresh adapter.
      detach: `(variables) -> variables of base`, without it.
      join: `(variables, key or None) -> Variables` of the root, with kernels in factored form.
      config: what the adapter is, to be written beside its parameters.
    """

    base: Model
    root: Model
    attach: Callable[[Variables, Key], Variables]
    detach: Callable[[Variables], Variables]
    join: Callable[[Variables, Key | None], Variables]
    config: Any = None


class Site(NamedTuple):
    """A kernel that an adapter changes.

    Attributes:
      path: of the kernel in the parameters, ("layers", "attention", "q", "kernel").
      names: of its axes.
      shape: of the kernel.
      dtype: of the kernel.
      num_inputs: how many of its axes, after that of stacked layers, are inputs.
    """

    path: Path
    names: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: Any
    num_inputs: int

    @property
    def parts(self) -> tuple[tuple[str | None, ...], ...]:
        """Names of its axes in three parts: of layers, of inputs, of outputs."""
        return self._parted(self.names)

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Their sizes."""
        return self._parted(self.shape)

    def _parted(self, along: tuple) -> tuple[tuple, ...]:
        first = int(self.names[0] == "layer")
        last = first + self.num_inputs
        return along[:first], along[first:last], along[last:]


class Kind(NamedTuple):
    """How one kind of adapter changes a kernel.

    Attributes:
      name: of its dict beside the kernel.
      axes: `(site) -> names of axes by parameter`.
      fresh: `(site, kernel or its shape, key) -> parameters`, with which nothing changes.
      node: `(site, kernel, parameters, key or None) -> Kernel`.
    """

    name: str
    axes: Callable[[Site], dict[str, tuple]]
    fresh: Callable[[Site, Any, Key], dict[str, Array]]
    node: Callable[[Site, Any, Mapping[str, Array], Key | None], Kernel]


class Part(NamedTuple):
    """Parameters that an adapter adds to those of a model.

    Attributes:
      axes: names of their axes, in the places that the parameters have in the tree.
      fresh: `(parameters of the base, key) -> parameters`.
      is_own: of the path of a parameter, whether it is one of these.
      join: `(parameters of all, key or None) -> parameters` that the root takes.
    """

    axes: PyTree
    fresh: Callable[[PyTree, Key], PyTree]
    is_own: Callable[[Path], bool]
    join: Callable[[PyTree, Key | None], PyTree]


def adapt(
    model: Model,
    kind: Kind | None,
    sites: tuple[Site, ...],
    is_trained: Callable[[Path], bool],
    config: Any = None,
) -> Model:
    """Returns the model with an adapter at each site and all else frozen.

    Args:
      model: plain or adapted.
      kind: of adapter; None: none, only parts of the model itself are trained.
      sites: kernels that are changed.
      is_trained: of the path of a parameter of the model's own, whether it is trained, too.
      config: see `Adapter`.
    """
    if kind is None:
        return surround(model, None, is_trained, config)
    by_path = {site.path: site for site in sites}

    def fresh(params: PyTree, key: Key) -> PyTree:
        own = {
            site.path: kind.fresh(site, fetch(params, site.path), jax.random.fold_in(key, i))
            for i, site in enumerate(sites)
        }
        return beside(own, kind.name)

    part = Part(
        axes=beside({site.path: kind.axes(site) for site in sites}, kind.name),
        fresh=fresh,
        is_own=lambda path: kind.name in path,
        join=lambda params, key: _with_nodes(params, kind, by_path, key),
    )
    return surround(model, part, is_trained, config)


def surround(
    model: Model,
    part: Part | None,
    is_trained: Callable[[Path], bool],
    config: Any = None,
    root: Model | None = None,
) -> Model:
    """Returns the model with more parameters, and all else frozen.

    Args:
      model: plain or adapted.
      part: what is added; None: nothing, only parts of the model itself are trained.
      is_trained, config: as in `adapt`.
      root: what takes the joined parameters in the place of the plain model; None: that itself.
    """
    below = model.adapter
    root = root or root_of(model)
    plain = lambda variables, key: thaw(variables)
    join_below = plain if below is None else below.join
    keep = lambda path: not is_trained(path)

    def attach(variables: Variables, key: Key) -> Variables:
        frozen = freeze_variables(thaw(variables), keep)
        if part is None:
            return frozen
        own = part.fresh(join_below(variables, None).params, key)
        return frozen._replace(params=join_tree(frozen.params, own))

    def detach(variables: Variables) -> Variables:
        params = variables.params
        if part is not None:
            params = split_tree(params, part.is_own)[0]
        joined = thaw(variables._replace(params=params))
        if model.axes.frozen:
            kept = set(leaf_paths(model.axes.frozen))
            joined = freeze_variables(joined, lambda path: path in kept)
        return joined

    def join(variables: Variables, key: Key | None = None) -> Variables:
        joined = join_below(variables, key)
        return joined if part is None else joined._replace(params=part.join(joined.params, key))

    def apply(variables: Variables, inputs, *, train: bool = False, key: Key | None = None):
        joined = join(variables, key if train else None)
        known = joined._replace(params=_known_to(root, joined.params))
        return root.apply(known, inputs, train=train, key=key)

    seams = root.stages
    stages = None if seams is None else Stages(*(on_joined(f, join) for f in seams))
    axes = freeze_variables(thaw(model.axes), keep)
    if part is not None:
        axes = axes._replace(params=join_tree(axes.params, part.axes))
    return model._replace(
        init=lambda key: attach(model.init(key), jax.random.fold_in(key, 1)),
        apply=apply,
        axes=axes,
        stages=stages,
        adapter=Adapter(model, root, attach, detach, join, config),
    )


def on_joined(function: Callable, join: Callable[[Variables], Variables]) -> Callable:
    """Returns `function` called with joined variables."""
    return lambda variables, *args, **kw: function(join(variables), *args, **kw)


def attach(model: Model, variables: Variables, key: Key) -> Variables:
    """Returns the variables of an adapted model: those of its base, frozen, and a fresh adapter.

    Raises:
      ValueError: the model has no adapter, or the variables are not those of its base.
    """
    adapter = adapter_of(model)
    wanted = jax.tree.structure(jax.eval_shape(adapter.base.init, jax.random.key(0)))
    if jax.tree.structure(variables) != wanted:  # type: ignore[operator]
        raise ValueError(
            "These are not the variables of the model under the adapter: "
            f"{_first_difference(variables, adapter.base)}."
        )
    return adapter.attach(variables, key)


def detach(model: Model, variables: Variables) -> tuple[Model, Variables]:
    """Returns the model under an adapter and its variables, as they were when it was attached.

    Parameters of the model that were trained beside the adapter stay as trained.
    """
    adapter = adapter_of(model)
    return adapter.base, adapter.detach(variables)


def merge(model: Model, variables: Variables) -> tuple[Model, Variables]:
    """Returns the plain model and variables that compute what the adapted ones do.

    Raises:
      ValueError: the adapter is not linear, or the model has none.
    """
    adapter = adapter_of(model)
    joined = adapter.join(variables, None)
    if joined.params.keys() - thaw(adapter.root.axes).params.keys() or prefix_length(joined):
        raise ValueError(
            "Prompts are no part of a plain model and cannot be merged into it: evaluate, decode "
            "or save the adapted one."
        )
    is_kernel = lambda x: isinstance(x, Kernel)
    params = jax.tree.map(whole, joined.params, is_leaf=is_kernel)
    return adapter.root, joined._replace(params=params)


def root_of(model: Model) -> Model:
    """Returns the model within all adapters."""
    return model if model.adapter is None else model.adapter.root


def adapter_of(model: Model) -> Adapter:
    """Returns `model.adapter`.

    Raises:
      ValueError: the model has none.
    """
    if model.adapter is None:
        raise ValueError("This model has no adapter; put one around it, such as `lora(model)`.")
    return model.adapter


def fetch(tree: PyTree, path: Path) -> Any:
    """Returns the leaf or branch of nested dicts at a path."""
    for name in path:
        tree = tree[name]
    return tree


def leaf_paths(tree: PyTree, path: Path = ()) -> Iterator[Path]:
    """Yields the paths of all leaves of nested dicts; a leaf is what is not a dict."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaf_paths(value, (*path, name))
        else:
            yield (*path, name)


def beside(own: Mapping[Path, Any], name: str) -> PyTree:
    """Returns nested dicts with each value in the place of a kernel, under `name`."""
    tree: dict[str, Any] = {}
    for path, value in own.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[name] = value
    return tree


def _with_nodes(
    tree: Mapping, kind: Kind, sites: Mapping[Path, Site], key: Key | None, path: Path = ()
) -> dict:
    """The tree with every kernel that has an adapter beside it in factored form."""
    out: dict[str, Any] = {}
    for number, (name, value) in enumerate(sorted(tree.items())):
        own, here = None if key is None else jax.random.fold_in(key, number), (*path, name)
        if not isinstance(value, Mapping):
            out[name] = value
        elif kind.name in value:
            rest = {part: x for part, x in value.items() if part != kind.name}
            site = find(sites, (*here, "kernel"))
            node = kind.node(site, rest["kernel"], value[kind.name], own)
            out[name] = rest | {"kernel": node}
        else:
            out[name] = _with_nodes(value, kind, sites, own, here)
    return out


def _known_to(model: Model, params: PyTree) -> PyTree:
    """The parameters with products in the place of kernels that the model cannot take factored."""

    def walk(tree: Mapping, path: Path) -> dict:
        out: dict[str, Any] = {}
        for name, value in tree.items():
            here = (*path, name)
            if isinstance(value, Mapping):
                out[name] = walk(value, here)
            else:
                is_known = find(model.kernels, here) is not None
                out[name] = value if is_known else whole(value)
        return out

    return walk(params, ())


def find(by_path: Mapping[Path, Any], path: Path) -> Any:
    """The value at a path, which may be one within a single layer, or of unequal layers."""
    for place in (path, ("layers", *path), ("layers", *path[2:])):
        if place in by_path:
            return by_path[place]
    return None


def _first_difference(variables: Variables, model: Model) -> str:
    own = set(leaf_paths(variables._asdict()))
    wanted = set(leaf_paths(jax.eval_shape(model.init, jax.random.key(0))._asdict()))
    for what, paths in (("they lack", wanted - own), ("they hold", own - wanted)):
        if paths:
            return f"{what} {'.'.join(min(paths))!r}"
    return "their trees differ"
