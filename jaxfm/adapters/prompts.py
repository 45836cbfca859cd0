"""Trained prompts before the tokens of a frozen transformer: soft prompts and prefixes.

    soft prompt:  layers([P; embed(x)]), P [num_tokens, D] trained (Lester et al. 2021, section 2)
    prefix:       softmax(Q [P_k; K]^T) [P_v; V] in every layer, P_k and P_v trained (Li and Liang
                  2021, section 4.2)

A prefix may be the output of a small network in training, which makes it less sensitive to the
learning rate (section 4.3): P[i] = W_2 tanh(W_1 E[i]). `settled` puts its output in its place.
Prompts come before padding and class tokens, positions are counted after them, and a model gives no
output at their places; see `jaxfm.virtual_tokens`. In a causal model the keys and values of a soft
prompt depend on nothing that follows: `read_prompts` computes them once, for decoders.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from jaxfm.adapters.adapter import Adapter, Part, fetch, root_of, surround
from jaxfm.adapters.targets import is_trained_by
from jaxfm.frozen import thaw
from jaxfm.kernels import at_least_float32, whole
from jaxfm.layers import causal_mask
from jaxfm.model import (
    Array,
    Key,
    Model,
    PyTree,
    Variables,
    fold_layers,
    is_stacked,
    layers_of,
    num_layers,
)
from jaxfm.trees import Path, join_tree, split_tree
from jaxfm.virtual_tokens import PREFIX, VIRTUAL, length_of, virtual_vectors

_TABLE = ("embed", "tokens", "table")
_KEYS = ("layers", "attention", "k", "kernel")
_VALUES = ("layers", "attention", "v", "kernel")
_NETWORK = "prefix_network"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """A soft prompt, as it is written beside its parameters.

    Attributes:
      kind: "prompt".
      num_tokens: vectors before each example.
      init: what they start from, see `soft_prompt`.
      name: under which the parameters have them.
      trained: patterns of the model's own parameters that are trained, too.
    """

    kind: str = "prompt"
    num_tokens: int
    init: str | tuple[int, ...] = "normal"
    name: str = "prompt"
    trained: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """A prefix, as it is written beside its parameters.

    Attributes:
      kind: "prefix".
      num_tokens: rows before each example, in every layer.
      hidden: width of the network that makes them in training; 0: they are trained themselves.
      trained: patterns of the model's own parameters that are trained, too.
    """

    kind: str = "prefix"
    num_tokens: int
    hidden: int = 0
    trained: tuple[str, ...] = ()


def soft_prompt(
    model: Model,
    num_tokens: int = 20,
    *,
    init: str | Sequence[int] = "vocab",
    name: str = "prompt",
    trained: str | Sequence[str] = (),
) -> Model:
    """Returns the model with trained vectors before the embedded tokens, and all else frozen.

    Args:
      model: a decoder, encoder or ViT, plain or adapted. Of several soft prompts the outermost
        comes first.
      num_tokens: P.
      init: "normal", with deviation 0.02; "vocab", embeddings of tokens drawn at random; or ids of
        tokens whose embeddings are taken in turn, those of the label words, say. A model of images
        has "normal" in the place of "vocab".
      name: at the top of the parameters; a second prompt needs another.
      trained: patterns of the model's own parameters that are trained, too, such as "head".
    Raises:
      ValueError: settings out of range, or a model without a place for prompts.
    """
    shapes = check_room(model, num_tokens)
    if name in thaw(model.axes).params:
        raise ValueError(f"name={name!r} is taken in the parameters of the model; give another.")
    has_table = not isinstance(_fetched(shapes, _TABLE), dict)
    if init == "vocab" and not has_table:
        init = "normal"
    init = init if isinstance(init, str) else tuple(int(token) for token in init)
    _check_init(init, shapes, has_table)
    width, dtype = stream_of(shapes)

    def fresh(params: PyTree, key: Key) -> PyTree:
        if init == "normal":
            vectors = 0.02 * jax.random.normal(key, (num_tokens, width))
        else:
            table = whole(fetch(params, _TABLE))
            drawn = jax.random.choice(key, table.shape[0], (num_tokens,))
            given = jnp.resize(
                jnp.asarray(init if init != "vocab" else 0, jnp.int32), (num_tokens,)
            )
            vectors = jnp.take(table, drawn if init == "vocab" else given, axis=0)
        return {name: {"vectors": vectors.astype(at_least_float32(dtype))}}

    def join(params: PyTree, key: Key | None) -> PyTree:
        if name not in params:  # it was read, or these are the parameters of a single layer
            return params
        rest = {part: value for part, value in params.items() if part != name}
        return with_virtual(rest, params[name]["vectors"])

    trained = (trained,) if isinstance(trained, str) else tuple(trained)
    part = Part(
        axes={name: {"vectors": (name, "embed")}},
        fresh=fresh,
        is_own=lambda path: path[0] == name,
        join=join,
    )
    config = PromptConfig(num_tokens=num_tokens, init=init, name=name, trained=trained)
    return surround(model, part, is_trained_by(model, trained), config)


def with_virtual(params: PyTree, vectors: Array) -> PyTree:
    """Returns the parameters with vectors [P, D] or [B, P, D] before those that they have."""
    if VIRTUAL in params:
        others = params[VIRTUAL]["vectors"]
        lead = max(vectors.shape[:-2], others.shape[:-2])
        wide = lambda x: jnp.broadcast_to(x, (*lead, *x.shape[-2:]))
        vectors = jnp.concatenate([wide(vectors), wide(others)], axis=-2)
    return {**params, VIRTUAL: {"vectors": vectors}}


def prefix_tuning(
    model: Model,
    num_tokens: int = 20,
    *,
    hidden: int = 0,
    trained: str | Sequence[str] = (),
) -> Model:
    """Returns the model with trained keys and values before the tokens, in every layer.

    They are drawn at random with deviation 0.02. All else is frozen.

    Args:
      model: a decoder, encoder or ViT, plain or adapted, with equal layers.
      num_tokens: P.
      hidden: width of a network that makes the prefix in training; 0: none.
      trained: as in `soft_prompt`.
    Raises:
      ValueError: settings out of range, or a model without a place for a prefix.
    """
    shapes = check_room(model, num_tokens)
    if hidden < 0:
        raise ValueError(f"hidden={hidden}: give a width, or 0 for no network.")
    tops = thaw(model.axes).params
    if PREFIX in tops["layers"] or _NETWORK in tops:
        raise ValueError("The model has a prefix already; give that one more tokens.")
    width, dtype = stream_of(shapes)
    dtype = at_least_float32(dtype)
    sizes = {name: _rows_shape(shapes, path) for name, path in _ROWS.items()}
    plain = thaw(root_of(model).axes).params
    names = {name: _rows_names(plain, path) for name, path in _ROWS.items()}

    def fresh(params: PyTree, key: Key) -> PyTree:
        keys = jax.random.split(key, 3)
        if hidden:
            fan_out = sum(math.prod(size) for size in sizes.values())
            draw = lambda key, rows, columns: jax.random.normal(key, (rows, columns), dtype)
            network = {
                "table": draw(keys[0], num_tokens, width),
                "inner": {"kernel": draw(keys[1], width, hidden) * width**-0.5,
                          "bias": jnp.zeros((hidden,), dtype)},
                "outer": {"kernel": draw(keys[2], hidden, fan_out) * hidden**-0.5,
                          "bias": jnp.zeros((fan_out,), dtype)},
            }  # fmt: skip
            return {_NETWORK: network}
        shape = lambda size: (size[0], num_tokens, *size[1:])
        rows = {
            name: 0.02 * jax.random.normal(own, shape(size), dtype)
            for own, (name, size) in zip(keys, sizes.items())
        }
        return {"layers": {PREFIX: rows}}

    def join(params: PyTree, key: Key | None) -> PyTree:
        if _NETWORK not in params:
            return params
        rest = {part: value for part, value in params.items() if part != _NETWORK}
        return {**rest, "layers": {**rest["layers"], PREFIX: _made(params[_NETWORK], sizes)}}

    bias = {"kernel": (None, None), "bias": (None,)}
    network = {"table": (PREFIX, None), "inner": bias, "outer": bias}
    trained = (trained,) if isinstance(trained, str) else tuple(trained)
    part = Part(
        axes={_NETWORK: network} if hidden else {"layers": {PREFIX: names}},
        fresh=fresh,
        is_own=lambda path: PREFIX in path or path[0] == _NETWORK,
        join=join,
    )
    config = PrefixConfig(num_tokens=num_tokens, hidden=hidden, trained=trained)
    return surround(model, part, is_trained_by(model, trained), config)


_ROWS = {"k": _KEYS, "v": _VALUES}


def _made(network: PyTree, sizes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """The rows [L, P, G, K] that a network makes of its table."""
    affine = lambda x, part: x @ part["kernel"] + part["bias"][None]
    flat = affine(jnp.tanh(affine(network["table"], network["inner"])), network["outer"])
    rows, begin = {}, 0
    for name, size in sizes.items():
        own = flat[:, begin : begin + math.prod(size)].reshape(-1, *size)
        rows[name] = jnp.moveaxis(own, 0, 1)
        begin += math.prod(size)
    return rows


def settled(model: Model, variables: Variables) -> tuple[Model, Variables]:
    """Returns a model and variables whose prefix is what its network made of it.

    That is the end of training: the network is no longer needed (Li and Liang 2021, section 4.3).

    Raises:
      ValueError: the outermost adapter is no prefix with a network.
    """
    adapter = model.adapter
    config = None if adapter is None else adapter.config
    if not isinstance(config, PrefixConfig) or not config.hidden:
        raise ValueError("The outermost adapter of the model is no prefix that a network makes.")
    rows = adapter.join(variables, None).params["layers"][PREFIX]
    params = split_tree(variables.params, lambda path: path[0] == _NETWORK)[0]
    plain = prefix_tuning(adapter.base, config.num_tokens, trained=config.trained)
    return plain, variables._replace(params=join_tree(params, {"layers": {PREFIX: rows}}))


def read_prompts(model: Model, variables: Variables) -> tuple[Model, Variables]:
    """Returns a causal language model whose prompts are all a prefix, as decoders need it.

    What a soft prompt's keys and values are does not depend on the text: they are computed here,
    once, and stand in every layer. A model without prompts is returned as it is.

    Args:
      model: with stages, adapted or not.
      variables: its own; layers stacked or apart.
    """
    own = {*_prompt_names(model), _NETWORK} & thaw(variables).params.keys()
    if model.stages is None or not own:
        return model, variables
    root, joined = model.adapter.root, model.adapter.join(variables, None)

    def replaced(old: Variables, rows: PyTree) -> Variables:
        is_prompt = lambda path: path[0] in own or PREFIX in path
        params, frozen = (split_tree(part, is_prompt)[0] for part in (old.params, old.frozen))
        return old._replace(params=join_tree(params, {"layers": rows}), frozen=frozen)

    tops = thaw(root.axes).params
    names = {name: _rows_names(tops, path) for name, path in _ROWS.items()}
    axes = replaced(model.axes, {PREFIX: names})
    return model._replace(axes=axes), replaced(variables, _read(root, joined))


def num_virtual(model: Model) -> int:
    """Returns how many positions the prompts around a model take."""
    configs = (adapter.config for adapter in _adapters(model))
    return sum(getattr(config, "num_tokens", 0) for config in configs)


def _prompt_names(model: Model) -> set[str]:
    """The names at the top of the parameters that are those of soft prompts."""
    configs = (adapter.config for adapter in _adapters(model))
    return {config.name for config in configs if isinstance(config, PromptConfig)}


def _adapters(model: Model) -> Iterator[Adapter]:
    """All adapters of a model, the outermost first."""
    while model.adapter is not None:
        yield model.adapter
        model = model.adapter.base


def _read(root: Model, joined: Variables) -> PyTree:
    """The rows of all virtual tokens of a causal model, as the part of its layers that they are."""
    layers, stages = layers_of(joined), root.stages
    assert stages is not None
    stacked = is_stacked(layers)
    vectors = virtual_vectors(joined, 1)
    if vectors is None:
        rows = lambda part: {PREFIX: part[PREFIX]}
        if stacked:
            return rows(layers.params)
        return {name: rows(part) for name, part in layers.params.items()}
    positions = jnp.arange(length_of(vectors), dtype=jnp.int32)[None]
    mask = causal_mask(positions, positions, root.config.sliding_window)
    none = jnp.zeros((1, 0), jnp.int32)

    def step(x: Array, layer: Variables, _):
        x, new = stages.block(layer, x, positions, mask)
        rows = dict(zip("kv", (row[0] for row in new), strict=True))
        if PREFIX in layer.params:
            old = layer.params[PREFIX]
            rows = {name: jnp.concatenate([old[name].astype(x.dtype), rows[name]]) for name in rows}
        return x, rows

    x = stages.embed(joined, none, positions, vectors)
    _, rows = fold_layers(step, x, layers)
    if stacked:
        return {PREFIX: rows}
    own = lambda i: jax.tree.map(lambda x: x[i], rows) if isinstance(rows, dict) else rows[i]
    return {str(i): {PREFIX: own(i)} for i in range(num_layers(layers))}


def check_room(model: Model, num_tokens: int) -> PyTree:
    """The shapes of a model's parameters, which is one that has a place for prompts."""
    shapes = thaw(jax.eval_shape(root_of(model).init, jax.random.key(0))).params
    if isinstance(_fetched(shapes, _KEYS), dict) or model.config is None:
        raise ValueError(
            "This model has no place for prompts; decoders, encoders and vision transformers of "
            "jaxfm have one, if their layers are equal."
        )
    room = getattr(model.config, "max_len", None)
    room = None if room is None else room - num_virtual(model)
    if num_tokens < 1 or (room is not None and num_tokens >= room):
        most = "" if room is None else f", and fewer than the model's {room} positions"
        raise ValueError(f"num_tokens={num_tokens}: give at least 1{most}.")
    return shapes


def _check_init(init: str | tuple[int, ...], shapes: PyTree, has_table: bool) -> None:
    if isinstance(init, str):
        if init not in ("normal", "vocab"):
            raise ValueError(f"init={init!r}: give 'normal', 'vocab' or ids of tokens.")
        return
    if not has_table:
        raise ValueError(f"init={init}: this model has no tokens; give 'normal'.")
    size = fetch(shapes, _TABLE).shape[0]
    if not init or not all(0 <= token < size for token in init):
        raise ValueError(f"init={init}: give ids of tokens from 0 to {size - 1}.")


def stream_of(shapes: PyTree) -> tuple[int, jnp.dtype]:
    """The width of the residual stream, and its dtype."""
    kernel = fetch(shapes, _KEYS)
    return kernel.shape[1], kernel.dtype


def _rows_shape(shapes: PyTree, path: Path) -> tuple[int, ...]:
    """[L, G, K] of the keys or values of one token."""
    layers, _, *rest = fetch(shapes, path).shape
    return (layers, *rest)


def _rows_names(axes: PyTree, path: Path) -> tuple[str | None, ...]:
    layers, _, *rest = fetch(axes, path)
    return (layers, PREFIX, *rest)


def _fetched(tree: PyTree, path: Path):
    """The leaf at a path, or an empty dict where there is none."""
    for name in path:
        tree = tree.get(name, {}) if isinstance(tree, dict) else {}
    return tree
