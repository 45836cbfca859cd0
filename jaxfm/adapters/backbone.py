"""Backbones of 4 or 8 bits: what a weak client can hold while it trains an adapter.

    x = step * level[code]        step = max |x| / max |level| in groups of inputs

Levels of "int8" and "int4" are equally far apart; those of "nf4" are quantiles of a normal
distribution, one of them zero. Weights alone are rounded: a product multiplies by the kernel that
they stand for, one layer at a time. Source: Dettmers et al. 2023 (QLoRA), section 3 and appendix E.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.adapters.adapter import Adapter, Site, beside, fetch, find, on_joined
from jaxfm.adapters.targets import choose, dotted
from jaxfm.frozen import thaw
from jaxfm.kernels import Quantized
from jaxfm.model import Array, Key, Model, Stages, Variables
from jaxfm.trees import split_tree

Format = Literal["int8", "int4", "nf4"]
_NAME = "quantized"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedConfig:
    """A quantized backbone.

    Attributes:
      kind: "quantized".
      format: of the numbers.
      group: inputs that share a step.
      targets: dotted names of the linear maps whose kernels are rounded.
    """

    kind: str = "quantized"
    format: Format
    group: int
    targets: tuple[str, ...]


def levels(format: Format) -> np.ndarray | None:
    """Returns f32[16], what the codes of a format of 4 bits stand for; None for "int8"."""
    if format == "int8":
        return None
    if format == "int4":
        return np.arange(-8, 8, dtype=np.float32) / 7
    quantile = np.vectorize(statistics.NormalDist().inv_cdf)
    most = 0.9677083  # between the last two quantiles of either half, appendix E
    positive, negative = (quantile(np.linspace(most, 0.5, n)[:-1]) for n in (9, 8))
    values = np.sort(np.concatenate([positive, [0.0], -negative]))
    return (values / np.abs(values).max()).astype(np.float32)


def quantized(
    model: Model,
    format: Format = "nf4",
    *,
    targets: str | Sequence[str] = "linear",
    group: int = 64,
) -> Model:
    """Returns the model with some of its kernels held in 4 or 8 bits a number, and frozen.

    `attach(quantized(model), variables, key)` rounds the variables of the model; put an adapter
    around the result, `lora(quantized(model))`, to train it.

    Args:
      model: of our own families.
      format: "int8", "int4" or "nf4".
      targets: which kernels, see `jaxfm.adapters.choose`.
      group: inputs that share a step; even.
    Raises:
      ValueError: an unknown format, an odd or small group, or a kernel that is no linear map of our
        own.
    """
    if format not in ("int8", "int4", "nf4"):
        raise ValueError(f"format={format!r}: give 'int8', 'int4' or 'nf4'.")
    if group < 2 or group % 2:
        raise ValueError(f"group={group}: give an even number of inputs, 2 or more.")
    if model.adapter is not None:
        raise ValueError("This model has an adapter already; quantize the model under it.")
    sites = {site.path: site for site in choose(model, targets)}
    foreign = [dotted(path) for path in sites if path not in model.kernels]
    if foreign:
        raise ValueError(
            f"targets has {foreign[0]}, which is no linear map of jaxfm's own layers; its kernel "
            "cannot be held in few bits."
        )
    names = tuple(map(dotted, sites))
    return _around(model, sites, QuantizedConfig(format=format, group=group, targets=names))


def packed(kernel: Array, num_inputs: int, format: Format, group: int) -> dict[str, Array]:
    """Returns {"codes", "steps"} of a kernel [*inputs, *outputs], see `jaxfm.kernels.Quantized`."""
    fan_out = int(np.prod(kernel.shape[num_inputs:]))
    flat = kernel.reshape(-1, fan_out).astype(jnp.float32)
    rows = jnp.pad(flat, ((0, -flat.shape[0] % group), (0, 0))).reshape(-1, group, fan_out)
    steps = jnp.abs(rows).max(1)
    table = levels(format)
    steps = steps / 127 if table is None else steps  # the largest level is 1
    scaled = (rows / jnp.where(steps > 0, steps, 1)[:, None]).reshape(-1, fan_out)
    if table is None:
        return {"codes": (jnp.round(scaled) + 128).astype(jnp.uint8), "steps": steps}
    middles = jnp.asarray((table[1:] + table[:-1]) / 2)
    codes = jnp.searchsorted(middles, scaled.reshape(-1)).astype(jnp.uint8).reshape(-1, 2, fan_out)
    return {"codes": codes[:, 0] | (codes[:, 1] << 4), "steps": steps}


def _around(model: Model, sites: Mapping, config: QuantizedConfig) -> Model:
    table = levels(config.format)
    is_rounded = lambda path: path in sites

    def attach(variables: Variables, key: Key | None = None) -> Variables:
        params, _ = split_tree(thaw(variables).params, is_rounded)
        kernels = thaw(variables).params
        held = {path: _held(site, fetch(kernels, path), config) for path, site in sites.items()}
        return variables._replace(params=params, frozen=beside(held, _NAME))

    def with_nodes(tree: Mapping, path: tuple = ()) -> dict:
        out: dict[str, Any] = {}
        for name, value in tree.items():
            here = (*path, name)
            if not isinstance(value, Mapping):
                out[name] = value
            elif _NAME in value:
                site = find(sites, (*here, "kernel"))
                rest = {part: x for part, x in value.items() if part != _NAME}
                out[name] = rest | {"kernel": _node(site, value[_NAME], table)}
            else:
                out[name] = with_nodes(value, here)
        return out

    def join(variables: Variables, key: Key | None = None) -> Variables:
        joined = thaw(variables)
        return joined._replace(params=with_nodes(joined.params))

    def detach(variables: Variables) -> Variables:
        joined = join(variables)
        is_node = lambda x: isinstance(x, Quantized)
        restore = lambda x: x.whole() if is_node(x) else x
        return joined._replace(params=jax.tree.map(restore, joined.params, is_leaf=is_node))

    params, _ = split_tree(model.axes.params, is_rounded)
    own = {path: dict.fromkeys(("codes", "steps"), (*site.parts[0], None, None))
           for path, site in sites.items()}  # fmt: skip
    axes = model.axes._replace(params=params, frozen=beside(own, _NAME))
    stages = model.stages
    return model._replace(
        init=lambda key: attach(model.init(key)),
        apply=on_joined(model.apply, join),
        axes=axes,
        stages=None if stages is None else Stages(*(on_joined(f, join) for f in stages)),
        adapter=Adapter(model, model, attach, detach, join, config),
    )


def _held(site: Site, kernel: Array, config: QuantizedConfig) -> dict[str, Array]:
    one = lambda kernel: packed(kernel, site.num_inputs, config.format, config.group)
    return jax.vmap(one)(kernel) if site.parts[0] else one(kernel)


def _node(site: Site, held: Mapping[str, Array], table: np.ndarray | None) -> Quantized:
    values = None if table is None else jnp.asarray(table)
    _, inputs, outputs = site.sizes
    if values is not None and held["codes"].ndim == 3:  # one for each of stacked layers
        values = jnp.broadcast_to(values, (held["codes"].shape[0], len(values)))
    return Quantized(
        held["codes"], held["steps"], values, sizes=(*inputs, *outputs), number=site.dtype
    )
