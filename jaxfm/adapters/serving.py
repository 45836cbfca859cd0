"""Many clients' adapters over one backbone in one batch.

    model, variables = together(adapted, variables, [params of each adapter])
    decoder = plain(model, for_requests(variables, [0, 2, 2]))
    generate(decoder, three_prompts)

Each row of a batch is multiplied by the low-rank matrices of its own adapter, gathered by number
(Chen et al. 2023, Punica, section 4): one program, whoever asks. New requests change numbers only,
`decoder._replace(variables=for_requests(variables, ids))`. Prompts and prefixes, too, may
differ by row: `prompts_for_requests` chooses among those that `prompts_together` has read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxfm.adapters.adapter import Kind, Site, adapt, adapter_of, fetch, leaf_paths
from jaxfm.adapters.low_rank import LowRankConfig, pairs
from jaxfm.adapters.prompts import num_virtual, read_prompts
from jaxfm.adapters.targets import choose, dotted, rank_at
from jaxfm.kernels import ManyLowRank
from jaxfm.model import Array, Key, Model, PyTree, Variables, is_axes
from jaxfm.trees import join_tree, split_tree
from jaxfm.virtual_tokens import PREFIX

_NAME = "many"
_ROWS = ("layers", PREFIX)  # where the keys and values of a prompt are


def together(
    model: Model, variables: Variables, adapters: Sequence[PyTree]
) -> tuple[Model, Variables]:
    """Returns a model that holds several adapters, and its variables.

    Args:
      model: with a LoRA adapter; its settings are those of all.
      variables: of the model; its backbone is shared, its own adapter is not read.
      adapters: `variables.params` of each. Ranks may differ: the smaller ones are filled up with
        zeros, and the factor alpha / rank is that of the model.
    Raises:
      ValueError: no adapter, another kind of adapter, one with other parameters than low-rank
        matrices, or of another base.
    """
    own = adapter_of(model)
    config = own.config
    if not isinstance(config, LowRankConfig) or config.kind != "lora":
        raise ValueError("Only LoRA adapters are multiplied in one batch; merge others one by one.")
    if not adapters:
        raise ValueError("adapters is empty: give the params of at least one.")
    for number, params in enumerate(adapters):
        _check(number, params, variables.params)
    sites = choose(own.base, config.targets)
    many = adapt(own.base, _kind(config, adapters), sites, lambda path: False)
    return many, adapter_of(many).attach(own.detach(variables), jax.random.key(0))


def for_requests(variables: Variables, ids: Sequence[int]) -> Variables:
    """Returns the variables of `together` for a batch of requests.

    Args:
      variables: of `together`.
      ids: the number of the adapter of each row of the batch.
    Raises:
      ValueError: there is no adapter of a number.
    """
    path = next(path for path in leaf_paths(variables.params) if path[-1] == "ids")
    site = fetch(variables.params, path[:-1])
    count = site["a"].shape[site["ids"].ndim - 1]
    if not len(ids) or min(ids) < 0 or max(ids) >= count:
        raise ValueError(f"ids={list(ids)}: give numbers from 0 to {count - 1}, one a request.")
    row = jnp.asarray(ids, jnp.int32)

    def with_ids(tree: Mapping) -> dict:
        new = lambda old: jnp.broadcast_to(row, (*old.shape[:-1], len(ids)))
        return {
            name: with_ids(x) if isinstance(x, Mapping) else new(x) if name == "ids" else x
            for name, x in tree.items()
        }

    return variables._replace(params=with_ids(variables.params))


def side_by_side(
    adapted: Sequence[tuple[Model, Variables]],
) -> tuple[Model, Variables]:
    """Returns a model whose batches have a row for each adapter, in their order.

    Args:
      adapted: models with a LoRA adapter each, or with a prompt or prefix each, around one base, as
        `hub.load_adapter` gives them, and their variables.
    Raises:
      ValueError: adapters of two kinds, of settings that one program cannot have, or what
        `together` and `prompts_together` refuse.
    """
    (model, variables), params = adapted[0], [own.params for _, own in adapted]
    ids = range(len(adapted))
    if num_virtual(model):
        many, held = prompts_together(model, variables, params)
        return many, prompts_for_requests(held, ids)
    first = _settings(model)
    for number, (other, _) in enumerate(adapted):
        if (own := _settings(other)) != first:
            raise ValueError(
                f"Adapter {number} has {own}, and adapter 0 has {first}: one program holds "
                "adapters of one kind, with the same targets and the same factor on A B. Merge it, "
                "or decode it by itself."
            )
    many, held = together(model, variables, params)
    return many, for_requests(held, ids)


def _settings(model: Model) -> str:
    """What adapters in one batch have in common, in words."""
    adapter = adapter_of(model)
    config = adapter.config
    if not isinstance(config, LowRankConfig):
        return type(config).__name__.removesuffix("Config").lower()
    factors: dict[float, list[str]] = {}
    for site in choose(adapter.base, config.targets):
        factor = config.scale(rank_at(site, config.rank, config.ranks))
        factors.setdefault(factor, []).append(dotted(site.path))
    parts = (f"{factor:g} on {', '.join(names)}" for factor, names in factors.items())
    return f"{config.kind} with factor {' and '.join(parts)}"


def prompts_together(
    model: Model, variables: Variables, prompts: Sequence[PyTree]
) -> tuple[Model, Variables]:
    """Returns a model that holds several prompts, each read once, and its variables.

    Args:
      model: a causal language model with soft prompts or a prefix.
      variables: of the model; its backbone is shared, its own prompt is not read.
      prompts: `variables.params` of each, of as many tokens as the model's own.
    Raises:
      ValueError: no prompt, a model without one, or a prompt of another shape.
    """
    if not prompts:
        raise ValueError("prompts is empty: give the params of at least one.")
    if not num_virtual(model):
        raise ValueError("The model has no prompt; put soft_prompt or prefix_tuning around it.")
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    for number, params in enumerate(prompts):
        same = jax.tree.structure(params) == jax.tree.structure(variables.params)  # type: ignore[operator]
        if not same or shapes(params) != shapes(variables.params):
            raise ValueError(
                f"prompts[{number}] has leaves of {shapes(params)}, and the model's prompt of "
                f"{shapes(variables.params)}: they are prompts of different models."
            )
    rows = [
        fetch(read_prompts(model, variables._replace(params=params))[1].params, _ROWS)
        for params in prompts
    ]
    reader, read = read_prompts(model, variables)
    many = jax.tree.map(lambda *own: jnp.stack(own, axis=1), *rows)
    names = jax.tree.map(
        lambda own: (own[0], None, *own[1:]), fetch(reader.axes.params, _ROWS), is_leaf=is_axes
    )
    put = lambda tree, own: join_tree(split_tree(tree, lambda p: PREFIX in p)[0], _nested(own))
    axes = reader.axes._replace(params=put(reader.axes.params, names))
    return reader._replace(axes=axes), read._replace(params=put(read.params, many))


def prompts_for_requests(variables: Variables, ids: Sequence[int]) -> Variables:
    """Returns the variables of `prompts_together` for a batch of requests.

    Args:
      variables: of `prompts_together`, layers stacked.
      ids: the number of the prompt of each row of the batch.
    Raises:
      ValueError: there is no prompt of a number.
    """
    rows = fetch(variables.params, _ROWS)
    count = next(iter(rows.values())).shape[1]
    if not len(ids) or min(ids) < 0 or max(ids) >= count:
        raise ValueError(f"ids={list(ids)}: give numbers from 0 to {count - 1}, one a request.")
    chosen = {name: x[:, jnp.asarray(ids, jnp.int32)] for name, x in rows.items()}
    others = split_tree(variables.params, lambda path: PREFIX in path)[0]
    return variables._replace(params=join_tree(others, _nested(chosen)))


def _nested(rows: PyTree) -> PyTree:
    return {_ROWS[0]: {_ROWS[1]: rows}}


def _check(number: int, params: PyTree, own: PyTree) -> None:
    """Raises ValueError if parameters are not those of an adapter like the model's own."""
    paths, wanted = set(leaf_paths(params)), set(leaf_paths(own))
    strange = sorted((paths ^ wanted) | {path for path in wanted if path[-2] != "lora"})
    if strange:
        raise ValueError(
            f"adapters[{number}] and the model's own adapter differ in, or train besides their "
            f"matrices, {'.'.join(strange[0])!r}; only the matrices of one and the same kind of "
            "adapter go into one batch."
        )
    for path in sorted(wanted):
        a, b = fetch(params, path), fetch(own, path)
        rank = a.ndim - 1 if path[-1] == "a" else int(path[0] == "layers")
        sizes = [x.shape[:rank] + x.shape[rank + 1 :] for x in (a, b)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"adapters[{number}] has {'.'.join(path)!r} of shape {a.shape}, and the model has "
                f"{b.shape}: they are of different bases."
            )


def _kind(config: LowRankConfig, adapters: Sequence[PyTree]) -> Kind:
    found = [pairs(params) for params in adapters]

    def axes(site: Site) -> dict[str, tuple]:
        layers, inputs, outputs = site.parts
        return {
            "a": (*layers, None, *inputs, None),
            "b": (*layers, None, None, *outputs),
            "ids": (*layers, None),
        }

    def fresh(site: Site, kernel: Any, key: Key) -> dict[str, Array]:
        layers = site.sizes[0]
        own = [one[(*site.path[:-1], "lora")] for one in found]
        most = max(a.shape[-1] for a, _ in own)
        a = [_filled(a, a.ndim - 1, most) for a, _ in own]
        b = [_filled(b, len(layers), most) for _, b in own]
        ids = jnp.zeros((*layers, 1), jnp.int32)
        return {"a": jnp.stack(a, len(layers)), "b": jnp.stack(b, len(layers)), "ids": ids}

    def node(site: Site, kernel: Any, parts: Mapping[str, Array], key: Key | None) -> ManyLowRank:
        scale = config.scale(rank_at(site, config.rank, config.ranks))
        return ManyLowRank(kernel, parts["a"], parts["b"], parts["ids"], scale=scale)

    return Kind(_NAME, axes, fresh, node)


def _filled(x: Array, axis: int, size: int) -> Array:
    """x with zeros at the end of an axis."""
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])
