"""Which networks the search understands: groups found, and masked against sliced random cuts.

    python benchmarks/search_generality.py [--quick]

No network gets code of its own. For each one the channel groups are read from its jaxpr, a random
cut is drawn, and the masked run is compared with the physically sliced one, in float32, relative to
the largest output; the cost of the cut is compared with that of the slice when it is traced again.
`--quick` takes narrow networks of the same families. The last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.cost import count_flops
from jaxfm.models import (
    DecoderConfig,
    EncoderConfig,
    VitConfig,
    build,
    mobilenet_config,
    resnet_config,
    shufflenet_config,
    vgg_config,
)
from jaxfm.search import costs, cut, masked, network, sliced
from jaxfm.search.trace.cost import counts_of
from jaxfm.testing import (
    random_variables,
    tiny_decoder,
    tiny_encoder,
    tiny_mobilenet,
    tiny_resnet,
    tiny_shufflenet,
    tiny_vgg,
    tiny_vit,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    quick: bool = option(False, "narrow networks of the same families")
    seed: int = option(0, "seed of weights and cuts")
    only: tuple[str, ...] = option((), "names of networks; empty: all")

    def __post_init__(self):
        check(self)


Case = tuple[str, Callable[..., Any], Any, Any]


def mixer(rng: np.random.Generator, patches: int = 16, width: int = 24, layers: int = 3) -> Case:
    """An MLP-mixer as a plain function."""
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * shape[0] ** -0.5, jnp.float32)
    params: dict[str, Any] = {"embed": draw(12, width), "head": draw(width, 10)}
    for i in range(layers):
        params[f"block{i}"] = {
            "tokens1": draw(patches, 32), "tokens2": draw(32, patches),
            "channels1": draw(width, 48), "channels2": draw(48, width),
        }  # fmt: skip

    def apply(p, x):
        x = x @ p["embed"]
        for i in range(layers):
            b = p[f"block{i}"]
            mixed = jax.nn.gelu(x.swapaxes(1, 2) @ b["tokens1"]) @ b["tokens2"]
            x = x + mixed.swapaxes(1, 2)
            x = x + jax.nn.gelu(x @ b["channels1"]) @ b["channels2"]
        return x.mean(1) @ p["head"]

    return "mlp_mixer", apply, params, jnp.asarray(rng.normal(size=(2, patches, 12)), jnp.float32)


def unet(rng: np.random.Generator) -> Case:
    """A U-Net as a plain function: two scales, skips by concatenation."""

    def draw(*shape):
        scale = np.prod(shape[:-1]) ** -0.5
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    params = {
        "down1": draw(3, 3, 3, 8), "down2": draw(3, 3, 8, 16), "middle": draw(3, 3, 16, 16),
        "up2": draw(3, 3, 32, 12), "up1": draw(3, 3, 20, 8), "out": draw(1, 1, 8, 2),
    }  # fmt: skip
    numbers = ("NHWC", "HWIO", "NHWC")

    def conv(x, w, stride=1):
        return jax.lax.conv_general_dilated(x, w, (stride,) * 2, "SAME", dimension_numbers=numbers)

    def grow(x):
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)

    def apply(p, x):
        one = jax.nn.relu(conv(x, p["down1"]))
        two = jax.nn.relu(conv(one, p["down2"], 2))
        low = jax.nn.relu(conv(two, p["middle"], 2))
        two = jax.nn.relu(conv(jnp.concatenate([grow(low), two], -1), p["up2"]))
        one = jax.nn.relu(conv(jnp.concatenate([grow(two), one], -1), p["up1"]))
        return conv(one, p["out"])

    return "u_net", apply, params, jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32)


def cases(quick: bool, seed: int) -> Iterator[Case]:
    """(name, function of (params, inputs), params, inputs), made when their turn comes."""
    rng = np.random.default_rng(seed)
    image = lambda side: jnp.asarray(rng.normal(size=(2, side, side, 3)), jnp.float32)
    tokens = lambda vocab, length: jnp.asarray(rng.integers(0, vocab, (2, length)), jnp.int32)
    if quick:
        models = {
            "resnet": (tiny_resnet(), image(8)), "vgg": (tiny_vgg(), image(8)),
            "mobilenet_v1": (tiny_mobilenet(1), image(8)),
            "mobilenet_v2": (tiny_mobilenet(2), image(8)),
            "shufflenet_v1": (tiny_shufflenet(1), image(8)),
            "shufflenet_v2": (tiny_shufflenet(2), image(8)), "vit": (tiny_vit(), image(8)),
            "decoder_gqa": (tiny_decoder(), tokens(64, 8)),
            "encoder": (tiny_encoder(), {"tokens": tokens(64, 8)}),
        }  # fmt: skip
    else:
        small = {"num_classes": 10}
        sizes = {"num_layers": 4, "embed_dim": 128, "num_heads": 8, "mlp_dim": 256}
        models = {
            **{f"resnet{n}": (build(resnet_config(n)), image(32)) for n in (20, 56)},
            **{f"resnet{n}": (build(resnet_config(n)), image(64)) for n in (18, 50)},
            **{f"vgg{n}": (build(vgg_config(n, cifar=True, **small)), image(32)) for n in (11, 16)},
            **{
                f"mobilenet_v{n}": (build(mobilenet_config(n, **small)), image(32)) for n in (1, 2)
            },
            **{
                f"shufflenet_v{n}": (build(shufflenet_config(n, **small)), image(32))
                for n in (1, 2)
            },
            "vit": (build(VitConfig(image_size=32, patch_size=4, **sizes)), image(32)),
            "decoder_gqa": (
                build(DecoderConfig(vocab_size=512, max_len=64, num_kv_heads=2, **sizes)),
                tokens(512, 32),
            ),
            "encoder": (
                build(EncoderConfig(vocab_size=512, max_len=64, **sizes)),
                {"tokens": tokens(512, 32)},
            ),
        }  # fmt: skip
    for name, (model, inputs) in models.items():
        variables = random_variables(model, seed)
        yield name, lambda v, x, m=model: m.apply(v, x)[0], variables, inputs
    yield mixer(rng)
    yield unet(rng)


def draw_cut(net: Any, seed: int) -> tuple[np.ndarray, ...]:
    """A random choice of what is kept of each group, at least a third."""
    rng, kept = np.random.default_rng(seed), []
    for group in net.groups:
        count = int(rng.integers(max(1, group.size // 3), group.size + 1))
        rows = [rng.permutation(group.size) < count for _ in range(group.layers or 1)]
        kept.append(np.stack(rows) if group.layers else rows[0])
    return tuple(kept)


def look(name: str, function: Callable, params: Any, inputs: Any, seed: int) -> dict[str, Any]:
    """What a network's reading took, and how exact a random cut of it is."""
    began = time.perf_counter()
    net = network(function, params, inputs)
    traced = time.perf_counter() - began
    kept = draw_cut(net, seed)
    small = cut(net, params, kept)
    gate = jax.jit(masked(net))(params, tuple(map(jnp.asarray, kept)), inputs)
    real = jax.jit(sliced(net, kept))(small, inputs)
    error = float(jnp.abs(gate - real).max() / jnp.abs(real).max())
    counts = counts_of(net, kept)
    own = costs(net)
    batch = jax.tree.leaves(inputs)[0].shape[0]
    traced_macs = count_flops(sliced(net, kept), small, inputs) / 2 / batch
    return {
        "groups": len(net.groups), "units": int(net.sizes.sum()), "frozen": len(net.frozen),
        "macs": float(own.macs(net.sizes.astype(np.int64))),
        "kept_macs": round(float(own.macs(counts) / own.macs(net.sizes.astype(np.int64))), 4),
        "cost_off": float(abs(own.macs(counts) - traced_macs)),
        "relative_error": error, "trace_seconds": round(traced, 2),
    }  # fmt: skip


def main(config: Config) -> None:
    table = {}
    for name, function, params, inputs in cases(config.quick, config.seed):
        if config.only and name not in config.only:
            continue
        table[name] = look(name, function, params, inputs, config.seed)
        print(f"{name}: {table[name]}", flush=True)
    result = {
        "name": "search_generality",
        "networks": len(table),
        "max_relative_error": max(row["relative_error"] for row in table.values()),
        "max_cost_off": max(row["cost_off"] for row in table.values()),
        "groups": {name: row["groups"] for name, row in table.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    configs.run(main, Config)
