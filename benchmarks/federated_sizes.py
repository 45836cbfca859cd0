"""Bytes and speed of the federated algorithms, without any training.

    python benchmarks/federated_sizes.py

The last line is one JSON object:

- raffm_step_speedup: the time of a training step of the two-layer CNN over that of its half-width
  tier;
- adp_latency_speedup: the latency of this CNN over that of a slice of half of its multiply-adds, at
  batch size 32;
- spatl_vgg11_latency_speedup: the same for VGG-11 and 60.3 % of its multiply-adds;
- published_megabytes: what one client sends and receives in a round, for the papers' networks and
  each algorithm, from shapes; and how much FedKEMF's knowledge network saves.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.data.federation import federate
from jaxfm.federated import (
    Local,
    Population,
    channel_gates,
    client_costs,
    fed_avg,
    fed_nova,
    head,
    profiles,
    quantised,
    saliency,
    scaffold,
    spatl,
    top_k,
    wire_bytes,
    with_compression,
)
from jaxfm.federated.accounting.ledger import client_shapes
from jaxfm.federated.algorithms.adp import AdpState, calibrated, extracted
from jaxfm.model import Variables
from jaxfm.models.families.cnn import CnnConfig, cnn
from jaxfm.models.families.resnet import resnet, resnet_config
from jaxfm.models.families.vgg import vgg, vgg_config
from jaxfm.search import model_network, pruned
from jaxfm.subnet import axis_sizes, extract, width
from jaxfm.tasks import classification

TASK = classification(10)
HALF = 0.5  # width of RaFFM's smallest tier; share of multiply-adds that ADP keeps
VGG_KEEP = 0.603  # share of multiply-adds that SPATL is said to leave of VGG-11


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    quick: bool = option(False, "changes nothing: the whole takes a minute")

    def __post_init__(self):
        check(self)


def seconds(function: Callable, *args, repeats: int = 7) -> float:
    """The least seconds of several calls of a compiled function, without its compilation."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - began)
    return min(times)


def speeds() -> dict[str, float]:
    """The speed-ups of a tier's training step and of a slice, for a CNN of practical width."""
    model = cnn(CnnConfig())
    variables = model.init(jax.random.key(0))
    sizes = axis_sizes(variables, model.axes)
    images = jax.random.normal(jax.random.key(1), (32, 28, 28, 1))
    labels = jnp.arange(32) % 10

    def step(variables: Variables) -> Any:
        def loss(params):
            logits = model.apply(variables._replace(params=params), images)[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(variables.params)

    smallest = extract(
        variables, model.axes, width(sizes, dict.fromkeys(("conv1", "conv2", "dense"), HALF))
    )
    network = model_network(model, variables, images)
    gates = channel_gates(network, TASK, batch_size=20, target=HALF, rounds=1)
    server = AdpState(variables, scores=(), round=jnp.int32(1))
    scores = calibrated(gates, server, {"image": images, "label": labels})
    small = extracted(gates, server, scores)
    dense = lambda v, x: model.apply(v, x)[0]
    return {
        "raffm_step_speedup": round(seconds(step, variables) / seconds(step, smallest), 2),
        "adp_latency_speedup": round(
            seconds(dense, variables, images) / seconds(small.apply, small.params, images), 2
        ),
    }


def vgg_speed() -> float:
    """The latency of VGG-11 over that of the channels that SPATL selects, at batch size 32."""
    model = vgg(vgg_config(11, cifar=True))
    variables = model.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (32, 32, 32, 3))
    network = model_network(model, variables, images)
    select = saliency(network, {"macs": VGG_KEEP})
    masks, _ = jax.jit(lambda v: select.choose((), v, None, None))(variables)
    small = pruned(network, variables, jax.device_get(masks))
    whole = seconds(lambda v, x: model.apply(v, x)[0], variables, images)
    return round(whole / seconds(small.apply, small.params, images), 2)


def published_bytes() -> dict[str, Any]:
    """The megabytes of one client's round, both ways, for the papers' networks, from shapes.

    SPATL's channels are those of freshly drawn weights; FedKEMF's knowledge network is ResNet-20.
    """
    out: dict[str, Any] = {}
    local = Local(optax.sgd(0.01, momentum=0.9), 64)
    rows = {"image": np.zeros((8, 32, 32, 3), np.float32), "label": np.zeros(8, np.int32)}
    people = Population(federate(rows, [np.arange(8)]), profiles(1), np.zeros(1, int))
    models = {
        "resnet20": resnet(resnet_config(20)), "resnet32": resnet(resnet_config(32)),
        "vgg11": vgg(vgg_config(11, cifar=True)),
    }  # fmt: skip
    both: dict[tuple[str, str], int] = {}
    for name, model in models.items():
        variables = model.init(jax.random.key(0))
        select = saliency(model_network(model, variables, jnp.zeros((1, 32, 32, 3))), {"macs": 0.6})
        made = {
            "fed_avg": fed_avg(model, TASK, local),
            "fed_avg_4bit": with_compression(fed_avg(model, TASK, local), quantised(4, block=256)),
            "fed_avg_4bit_both": with_compression(
                fed_avg(model, TASK, local), quantised(4, block=256), down=4
            ),
            "fed_nova": fed_nova(model, TASK, local),
            "scaffold": scaffold(model, TASK, local, total_examples=80),
            "spatl": spatl(
                model,
                TASK,
                local,
                select,
                num_clients=10,
                total_examples=80,
                is_personal=head,
            ),
        }
        made["spatl_topk8"] = with_compression(made["spatl"], top_k(0.05, bits=8))
        made["spatl_narrow"] = with_compression(made["spatl"], quantised(8, block=256), down=8)
        row = {}
        for other, algorithm in made.items():
            (cost,) = client_costs(algorithm, people, variables)
            up = cost.bytes_up
            if algorithm.buckets[0].travels is not None:
                up = _salient_bytes(algorithm, select, people, variables)
            both[name, other] = up + cost.bytes_down
            row[other] = round(both[name, other] / 1e6, 3)
        out[name] = row
    for client in ("vgg11", "resnet32"):
        for how in ("", "_4bit", "_4bit_both"):
            ratio = both[client, "fed_avg"] / both["resnet20", f"fed_avg{how}"]
            out[f"fedkemf{how}_over_{client}"] = round(ratio, 1)
    return out


def _salient_bytes(algorithm: Any, select: Any, people: Population, variables: Variables) -> int:
    """The bytes of one upload of SPATL with the channels that it selects in `variables`."""
    (bucket,), server = algorithm.buckets, jax.eval_shape(algorithm.init, variables)
    shapes, _, _ = jax.eval_shape(bucket.client, *client_shapes(bucket, people, server))

    @jax.jit
    def measure(variables):
        masks, _ = select.choose((), variables, None, None)
        upload = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        upload = upload._replace(masks=masks)
        return wire_bytes(upload, bucket.travels(upload))

    return round(float(measure(variables)))


def measured() -> dict[str, Any]:
    latency = {"spatl_vgg11_latency_speedup": vgg_speed()}
    return speeds() | latency | {"published_megabytes": published_bytes()}


def main(config: Config) -> None:
    print(json.dumps({"name": "federated_sizes"} | measured()))


if __name__ == "__main__":
    configs.run(main, Config)
