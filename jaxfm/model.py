"""What a model is: a pair of pure functions over nested dicts, with a name for every axis.

Networks are written as Flax NNX modules and split once, here, into pure functions; everything
else in the library sees plain pytrees. A user's own module is converted in the same way:

>>> import jax
>>> from flax import nnx
>>> model = from_nnx(lambda rngs: nnx.Linear(4, 2, rngs=rngs))
>>> variables = model.init(jax.random.key(0))
>>> output, stats = model.apply(variables, jax.numpy.ones((3, 4)))
>>> output.shape
(3, 2)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import bridge

from jaxfm.training_mode import mode_arguments, takes

Array = jax.Array
Key = jax.Array
PyTree = Any

_EMPTY: PyTree = {}  # a tree without leaves; never changed


class Variables(NamedTuple):
    """All arrays of a model, as nested dicts with string keys.

    Attributes:
      params: what is trained.
      stats: what is measured and not trained (running statistics of batch norm).
      live: f32 ones along the normalised axis of each norm; zeros where a channel is masked
        (`jaxfm.subnet.mask`), so that a norm divides by the number of channels that exist.
        Structure rather than state: neither trained nor sent.
      frozen: parameters that are held fixed, such as the backbone under an adapter. They are in
        no gradient, no optimizer state and no upload. See `jaxfm.freeze`.
      masks: channel masks of a network that is run masked. Structure like `live`.
    """

    params: PyTree
    stats: PyTree
    live: PyTree
    frozen: PyTree = _EMPTY
    masks: PyTree = _EMPTY


class Past(NamedTuple):
    """What attention may read besides the tokens it is given: rows of a cache.

    Attributes:
      k: [B, G, S, K] keys; a head's rows lie side by side, as a product with them reads them.
      v: [B, G, S, K] values.
      mask: bool[B, T, S], which rows each of the T queries may see.
    """

    k: Array
    v: Array
    mask: Array


class Stages(NamedTuple):
    """A causal language model opened at its seams, to be cached or cut over a mesh.

    Attributes:
      embed: `(variables, tokens i32[B, T], positions i32[B, T]) -> x [B, T, D]`.
      block: `(layer, x [B, T, D], positions i32[B, T], mask bool[B, T, T], past=None)
        -> (x, (k [B, T, G, K], v [B, T, G, K]))`. `layer` holds the Variables of one layer; the
        new rows of keys and values are returned and never written: the caller owns the cache.
      head: `(variables, x [B, T, D]) -> logits f32[B, T, V]`.
    """

    embed: Callable[..., Array]
    block: Callable[..., tuple[Array, tuple[Array, Array]]]
    head: Callable[..., Array]


class Model(NamedTuple):
    """A network as pure functions.

    Attributes:
      init: `(key) -> Variables`.
      apply: `(variables, inputs, *, train=False, key=None) -> (output, stats)`. All widths are
        read from the shapes of the parameters, so the same `apply` runs every subnet of our own
        families that `jaxfm.subnet.extract` cuts.
      axes: like the Variables; each leaf the tuple of its logical axis names, None for an axis
        without a name.
      config: the frozen dataclass that the model was made from, where there is one.
      stages: the parts of a causal language model; None for other models.
      kernels: by path of the kernel of a linear map, how many of its axes are inputs. `apply`
        takes these in factored form, too (`jaxfm.kernels`).
      adapter: what was put around the model (`jaxfm.adapters`); None: nothing.
    """

    init: Callable[[Key], Variables]
    apply: Callable[..., tuple[Any, PyTree]]
    axes: Variables
    config: Any = None
    stages: Stages | None = None
    kernels: Mapping[tuple[str, ...], int] = _EMPTY
    adapter: Any = None


class Live(nnx.Variable):
    """Marks a module's variable as a mask of existing channels (`Variables.live`)."""


class Frozen(nnx.Variable):
    """Marks a module's variable as a parameter that is held fixed (`Variables.frozen`)."""


_COLLECTIONS = {nnx.Param: "params", nnx.BatchStat: "stats", Live: "live", Frozen: "frozen"}


class Split(NamedTuple):
    """A module as pure functions, before it is given the calling convention of a Model.

    Attributes:
      init: `(key) -> Variables`.
      call: `(variables, *args, train=False, key=None) -> (output, stats)`.
      axes: like the Variables, tuples of names.
      kernels: as `Model.kernels`.
    """

    init: Callable[[Key], Variables]
    call: Callable[..., tuple[Any, PyTree]]
    axes: Variables
    kernels: Mapping[tuple[str, ...], int]


def split(make_module: Callable[[nnx.Rngs], nnx.Module]) -> Split:
    """Splits the module that `make_module(rngs)` returns into pure functions.

    Trained leaves are `nnx.Param`, statistics `nnx.BatchStat`, fixed parameters `Frozen`; random
    streams (dropout) are fed from the `key` of each call and hold no state. Logical axes are
    Flax's `out_sharding` metadata (`nnx.with_partitioning`). Training is switched on and off in
    every way that Flax has: by attributes of layers, and by an argument of the module's call named
    train, training, is_training, deterministic or use_running_average; one named rngs is given
    random streams.

    Raises:
      ValueError: the module holds another kind of variable.
    """

    def make(key: Key | int) -> nnx.Module:
        # Axes have logical names, which no mesh at hand needs to have.
        with nnx.use_eager_sharding(False):
            return make_module(nnx.Rngs(key))

    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(0)))
    leaves = dict(nnx.to_flat_state(abstract))
    randoms = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, nnx.RngState)}
    homes = {
        path: (_collection(path, leaf), *map(str, path))
        for path, leaf in leaves.items()
        if path not in randoms
    }

    def gather(flat: Mapping[tuple, Any]) -> Variables:
        tree: dict[str, dict] = {name: {} for name in Variables._fields}
        for path, value in flat.items():
            *parents, name = homes[path]
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = value
        return Variables(**tree)

    def values(state: nnx.State) -> Variables:
        flat = nnx.to_flat_state(state)
        return gather({path: leaf.get_value() for path, leaf in flat if path in homes})

    def init(key: Key) -> Variables:
        return values(nnx.state(make(key)))

    def call(variables, *args, train: bool = False, key: Key | None = None):
        if randoms and train and key is None:
            raise ValueError("This module draws random numbers in training; pass `key`.")
        tree = variables._asdict()
        flat = {path: _fetch(tree, home) for path, home in homes.items()}
        for i, (path, leaf) in enumerate(randoms.items()):
            seed = jax.random.key(0) if key is None else key
            flat[path] = (
                jax.random.fold_in(seed, i)
                if isinstance(leaf, nnx.RngKey)
                else jnp.zeros(leaf.shape, leaf.dtype)
            )
        module = nnx.merge(graphdef, nnx.from_flat_state(list(flat.items())))
        module.set_attributes(
            use_running_average=not train, deterministic=not train, raise_if_not_found=False
        )
        output = module(*args, **_call_arguments(module, train, key))
        if not variables.stats:
            return output, variables.stats
        return output, values(nnx.state(module)).stats

    names = {path: _axis_names(leaf) for path, leaf in leaves.items() if path in homes}
    inputs = {path: leaf.get_metadata().get("num_inputs") for path, leaf in leaves.items()}
    kernels = {homes[path][1:]: n for path, n in inputs.items() if n is not None}
    return Split(init, call, gather(names), kernels)


def _collection(path: tuple, leaf: Any) -> str:
    """The field of `Variables` that a variable of a module belongs to."""
    for kind, name in _COLLECTIONS.items():
        if isinstance(leaf, kind):
            return name
    raise ValueError(
        f"The variable {'.'.join(map(str, path))!r} is a {type(leaf).__name__}; a model may hold "
        "nnx.Param (trained), nnx.BatchStat (statistics), jaxfm.Frozen (held fixed) and random "
        "streams."
    )


def _call_arguments(module: nnx.Module, train: bool, key: Key | None) -> dict[str, Any]:
    """Returns what a module's call is told of training, in the words of its own signature."""
    told: dict[str, Any]
    if isinstance(module, bridge.ToNNX):  # a Linen module, which returns statistics if it is asked
        told = mode_arguments(module.to_nnx__module.__call__, train)
        return told | ({"mutable": ["batch_stats"]} if train else {})
    told = mode_arguments(module.__call__, train)
    if takes(module.__call__, "rngs"):
        told["rngs"] = nnx.Rngs(0 if key is None else key)
    return told


def from_nnx(make_module: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Turns any NNX module into a `Model`; `inputs` is the module's one argument.

    What `split` says of training, of random streams and of axes holds here. `jaxfm.from_linen` does
    the same for a Linen module.

    Args:
      make_module: `(rngs) -> module`.
    Raises:
      ValueError: the module holds variables other than parameters (trained or frozen), batch
        statistics and random streams.
    """
    init, call, axes, kernels = split(make_module)

    def apply(variables: Variables, inputs, *, train: bool = False, key: Key | None = None):
        return call(variables, inputs, train=train, key=key)

    return Model(init, apply, axes, kernels=kernels)


def _fetch(tree, home: tuple[str, ...]):
    for i, name in enumerate(home):
        if not isinstance(tree, Mapping) or name not in tree:
            raise ValueError(f"The variables lack {'.'.join(home[: i + 1])!r}.")
        tree = tree[name]
    return tree


def _axis_names(leaf) -> tuple[str | None, ...]:
    names = leaf.get_metadata().get("out_sharding") or (None,) * len(leaf.shape)
    if len(names) != len(leaf.shape):
        raise ValueError(f"Axis names {names} given for a leaf of shape {leaf.shape}.")
    return tuple(names)


def is_axes(x: Any) -> bool:
    """Returns whether `x` is one leaf of `Model.axes`: a plain tuple of names."""
    return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)


def count_parameters(tree: PyTree) -> int:
    """Returns the number of values in a tree of arrays (or of their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Equal layers are stacked on axis 0; unequal ones (of a pruned network) are a dict "0", "1", ...


def is_stacked(layers: Variables) -> bool:
    """Returns True if layers are stacked on axis 0, False if they are a dict of unequal layers."""
    names = layers.params or layers.frozen
    return not (names and all(name.isdigit() for name in names))


def layers_of(variables: Variables) -> Variables:
    """Returns the "layers" part of each collection."""
    return Variables(*(part.get("layers", {}) for part in variables))


def with_layers(variables: Variables, layers: Variables) -> Variables:
    """Returns `variables` with its layers replaced."""
    pairs = zip(variables, layers, strict=True)
    return Variables(*({**part, "layers": new} if new else part for part, new in pairs))


def num_layers(layers: Variables) -> int:
    """Returns how many layers there are, in either form."""
    parameters = layers.params or layers.frozen
    return jax.tree.leaves(parameters)[0].shape[0] if is_stacked(layers) else len(parameters)


def unstack(layers: Variables) -> Variables:
    """Returns stacked layers as a dict: a larger program, but no slice of a stack at run time."""
    if not is_stacked(layers):
        return layers
    row = lambda part, i: jax.tree.map(lambda x: x[i], part)
    rows = range(num_layers(layers))
    return Variables(*({str(i): row(part, i) for i in rows} if part else {} for part in layers))


def layer_at(layers: Variables, i: int) -> Variables:
    """Returns layer `i` of unstacked layers."""
    return Variables(*(part[str(i)] if part else {} for part in layers))


def fold_layers(step: Callable, carry: PyTree, layers: Variables, xs: PyTree = None):
    """Runs `carry, y = step(carry, layer, x)` over the layers; returns (carry, stacked ys).

    One `lax.scan` over stacked layers, a Python loop over unequal ones. `xs` has a leading axis of
    layers. The ys of the loop are stacked, too, so callers need not know which form it was.
    """
    if is_stacked(layers):
        return jax.lax.scan(lambda c, lx: step(c, *lx), carry, (layers, xs))
    ys = []
    for i in range(num_layers(layers)):
        carry, y = step(carry, layer_at(layers, i), jax.tree.map(lambda x, i=i: x[i], xs))
        ys.append(y)
    same = len({str(jax.tree.map(jnp.shape, y)) for y in ys}) == 1
    return carry, (jax.tree.map(lambda *y: jnp.stack(y), *ys) if same else tuple(ys))


# Transformers of every family are an embedding, layers and a head, under these three names.


def part_of(variables: Variables, name: str) -> Variables:
    """Returns one part ("embed", "head") of each collection; empty where a collection has none."""
    return Variables(*(collection.get(name, {}) for collection in variables))


def assemble(
    embed: Split, block: Split, head: Split, num_layers: int
) -> tuple[Callable[[Key], Variables], Variables, dict[tuple[str, ...], int]]:
    """Returns `init`, `axes` and `kernels` of an embedding, equal layers and a head."""

    def join(*parts: Variables) -> Variables:
        named = list(zip(("embed", "layers", "head"), parts, strict=True))
        collect = lambda kind: {
            name: getattr(part, kind) for name, part in named if getattr(part, kind)
        }
        return Variables(*map(collect, Variables._fields))

    def draw(key: Key) -> Variables:
        keys = jax.random.split(key, 3)
        layers = jax.vmap(block.init)(jax.random.split(keys[1], num_layers))
        return join(embed.init(keys[0]), layers, head.init(keys[2]))

    @functools.cache
    def alone() -> Callable[[Key], Variables]:
        # On a CPU, what draws random numbers takes seconds to optimise and milliseconds to run.
        quick = {"xla_backend_optimization_level": "1"} if jax.default_backend() == "cpu" else None
        return jax.jit(draw, compiler_options=quick)

    def init(key: Key) -> Variables:
        # Only a program of its own may have options of the compiler.
        return draw(key) if isinstance(key, jax.core.Tracer) else alone()(key)

    stacked = jax.tree.map(lambda names: ("layer", *names), block.axes, is_leaf=is_axes)
    named = {"embed": embed, "layers": block, "head": head}
    kernels = {(name, *path): n for name, part in named.items() for path, n in part.kernels.items()}
    return init, join(embed.axes, stacked, head.axes), kernels
