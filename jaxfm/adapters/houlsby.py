"""Bottleneck adapters: a small network beside a linear map.

    x W + gelu(x U + c) V

with U [inputs, size] drawn at random and V [size, outputs] zero. Source: Houlsby et al. 2019 for
the network, He et al. 2022 (A Unified View of Parameter-Efficient Transfer Learning), section 3.3,
for its place in parallel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxfm.adapters.adapter import Kind, Site, adapt
from jaxfm.adapters.targets import choose, dotted, is_trained_by
from jaxfm.kernels import Bottleneck, at_least_float32
from jaxfm.model import Array, Key, Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """Bottleneck adapters, as they are written beside their parameters.

    Attributes:
      kind: "bottleneck".
      size: of the layer between.
      targets: dotted names of the linear maps beside which they stand.
      trained: patterns of the model's own parameters that are trained, too.
    """

    kind: str = "bottleneck"
    size: int
    targets: tuple[str, ...]
    trained: tuple[str, ...] = ()


def bottleneck(
    model: Model,
    size: int = 16,
    *,
    targets: str | Sequence[str] = "mlp.down",
    trained: str | Sequence[str] = (),
) -> Model:
    """Returns the model with a bottleneck adapter beside some linear maps, and all else frozen.

    Args:
      model: of our own families: other modules have no place for it.
      size: of the layer between.
      targets: which linear maps, see `jaxfm.adapters.choose`.
      trained: as in `lora`.
    Raises:
      ValueError: settings out of range, patterns without a match, or a kernel that is no linear
        map of our own.
    """
    if size < 1:
        raise ValueError(f"size={size}: give at least 1.")
    sites = choose(model, targets)
    foreign = [dotted(site.path) for site in sites if site.path not in model.kernels]
    if foreign:
        raise ValueError(
            f"targets has {foreign[0]}, which is no linear map of jaxfm's own layers; a bottleneck "
            "adapter cannot stand beside it. Use `lora`, or other targets."
        )
    trained = (trained,) if isinstance(trained, str) else tuple(trained)
    names = tuple(dotted(site.path) for site in sites)
    config = BottleneckConfig(size=size, targets=names, trained=trained)
    return adapt(model, _kind(size), sites, is_trained_by(model, trained), config)


def _kind(size: int) -> Kind:
    def axes(site: Site) -> dict[str, tuple]:
        layers, inputs, outputs = site.parts
        return {
            "down": (*layers, *inputs, "bottleneck"),
            "down_bias": (*layers, "bottleneck"),
            "up": (*layers, "bottleneck", *outputs),
        }

    def fresh(site: Site, kernel: Any, key: Key) -> dict[str, Array]:
        layers, inputs, outputs = site.sizes
        dtype = at_least_float32(site.dtype)
        down = jax.random.normal(key, (*layers, *inputs, size), dtype)
        return {
            "down": down * math.prod(inputs) ** -0.5,
            "down_bias": jnp.zeros((*layers, size), dtype),
            "up": jnp.zeros((*layers, size, *outputs), dtype),
        }

    def node(site: Site, kernel: Any, parts: Mapping[str, Array], key: Key | None) -> Bottleneck:
        return Bottleneck(kernel, parts["down"], parts["down_bias"], parts["up"])

    return Kind("bottleneck", axes, fresh, node)
