"""Against Torch-Pruning: the same ResNet at the same true multiply-adds, before fine-tuning.

    pip install torch torch-pruning
    python benchmarks/search_torch.py --data_dir=cifar10.npz --weights=resnet20.npz [--quick]

Both sides rank by the L2 norms of coupled channels and cut all groups alike, then globally, down to
half of the multiply-adds, measured on the network that is left. Batch norm is re-estimated on the
same training images on both sides, and accuracy is that on the same test images. "groups" are what
each library finds; "seconds" run from the loaded network to the pruned one and include the search
for the share of channels. The other library stops at shortcuts that pad with zeros, so it gets them
as fixed 1x1 convolutions that copy channels: the same function, whose multiply-adds do not count.
Their constant norm is a member of its groups. The last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm import config as configs
from jaxfm import search
from jaxfm.config import check, option
from jaxfm.hub import torch_vision
from jaxfm.models import resnet_config
from jaxfm.search.recalibration import recalibrate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared."""

    quick: bool = option(False, "fewer images")
    data_dir: str = option("", "npz with train_images, train_labels, test_images, test_labels")
    weights: str = option("", "state dict of a CIFAR ResNet")
    macs: float = option(0.5, "share of the multiply-adds that remains")
    calibration: int = option(512, "training images that statistics are measured on")
    report: int = option(3000, "test images")

    def __post_init__(self):
        check(self)


def torch_resnet(tensors: dict[str, np.ndarray], depth: int) -> Any:
    """The network of the state dict in PyTorch; shortcuts between stages copy channels by a fixed
    convolution, since Torch-Pruning's importance stops at padding with zeros."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self, inside: int, outside: int, stride: int):
            super().__init__()
            self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outside)
            self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outside)
            self.shortcut = nn.Identity()
            if stride > 1:
                self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)
                copy = torch.eye(inside)[:, :, None, None]
                more = (outside - inside) // 2
                self.shortcut.weight.data = F.pad(copy, (0, 0, 0, 0, 0, 0, more, more))

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(self.shortcut(x) + y)

    class Net(nn.Module):
        def __init__(self, count: int):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
            widths = (16, 16, 32, 64)
            for i in range(3):
                blocks = [
                    Block(widths[i + (j > 0)], widths[i + 1], 2 if i and not j else 1)
                    for j in range(count)
                ]
                setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.linear(x.mean((2, 3)))

    net = Net((depth - 2) // 6)
    state = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    absent, unknown = net.load_state_dict(state, strict=False)
    assert not unknown and all(".shortcut." in name or "num_batches" in name for name in absent)
    return net.eval()


def multiply_adds(net: Any) -> int:
    """Of the convolutions but shortcuts, and of the classifier, for one image."""
    import torch

    counts, hooks = [], []
    for name, module in net.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and "shortcut" not in name:
            hooks.append(
                module.register_forward_hook(
                    lambda m, _, y: counts.append(y.numel() * m.weight[0].numel())
                )
            )
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def theirs(tensors, depth: int, config: Config, calibration, images, labels) -> dict[str, Any]:
    """Accuracy and seconds of Torch-Pruning, uniform and global."""
    import torch
    import torch_pruning as tp

    example = torch.zeros(1, 3, 32, 32)
    turn = lambda x: torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))

    def accuracy(net) -> float:
        parts = np.array_split(np.asarray(images), 12)
        with torch.no_grad():
            guesses = [net(turn(part)).numpy().argmax(-1) for part in parts]
        return float((np.concatenate(guesses) == labels).mean())

    found: dict[str, Any] = {"dense": accuracy(torch_resnet(tensors, depth))}
    for name, spread in (("uniform", False), ("global", True)):
        began = time.perf_counter()
        # The pruner takes a share of channels: the largest one within the budget, by bisection.
        low, high, best = 0.0, 0.9, None
        for _ in range(8):
            ratio = 0.5 * (low + high)
            net = torch_resnet(tensors, depth)
            dense = multiply_adds(net)
            pruner = tp.pruner.MagnitudePruner(
                net, example, importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=ratio, global_pruning=spread, ignored_layers=[net.linear],
            )  # fmt: skip
            groups = len(list(pruner.DG.get_all_groups(ignored_layers=[net.linear])))
            pruner.step()
            macs = multiply_adds(net)
            if macs <= config.macs * dense:
                high, best = ratio, (net, macs / dense, groups)
            else:
                low = ratio
        seconds = time.perf_counter() - began
        if best is None:
            raise ValueError(f"No share of channels up to {high} leaves {config.macs} of the work.")
        net, share, groups = best
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # the plain mean over batches
        with torch.no_grad():
            net.train()
            for batch in np.split(np.asarray(calibration), len(calibration) // 64):
                net(turn(batch))
        found[name] = {
            "accuracy": accuracy(net.eval()), "macs": float(share), "groups": groups,
            "seconds": round(seconds, 2),
        }  # fmt: skip
    return found


def ours(weights: str, depth: int, config: Config, calibration, images, labels) -> dict[str, Any]:
    """Accuracy and seconds of this library's, uniform and global."""
    model, variables = torch_vision.load_torch(resnet_config(depth), weights)

    def accuracy(run, params) -> float:
        run = jax.jit(run)
        guesses = [np.asarray(run(params, x)).argmax(-1) for x in np.split(images, 12)]
        return float((np.concatenate(guesses) == labels).mean())

    found: dict[str, Any] = {"dense": accuracy(lambda v, x: model.apply(v, x)[0], variables)}
    for name in ("uniform", "global"):
        began = time.perf_counter()
        net = search.model_network(model, variables, calibration[:64])
        scores = jax.jit(lambda v, net=net: search.importance(net, v, "l2"))(variables)
        order = search.ranks(scores)
        limits = search.budgets(net, macs=config.macs)
        problem = search.problem(net.sizes, limits, lambda data, counts: counts[:, 0] * 0.0)
        one = (
            search.magnitude(problem, [np.asarray(s) for s in scores])
            if name == "global"
            else search.uniform(len(net.groups))
        )
        action = one.ask(one.init(jax.random.key(0)), jax.random.key(0))[0][0]
        counts = np.asarray(jax.jit(problem.project)(action))
        kept = search.keep(order, counts)
        small = search.pruned(net, variables, kept)
        jax.block_until_ready(small.params)
        seconds = time.perf_counter() - began
        train = search.sliced(net, kept, 1)
        batches = calibration.reshape(-1, 64, *calibration.shape[1:])
        measure = lambda v, x, run=train: recalibrate(lambda v, b: run(v, b)[1], v, x)
        there = jax.jit(measure)(small.params, batches)
        dense, now = small.table()["macs"]
        found[name] = {
            "accuracy": accuracy(small.apply, there), "macs": now / dense,
            "groups": len(net.groups), "seconds": round(seconds, 2),
        }  # fmt: skip
    return found


def main(config: Config) -> None:
    if not (config.data_dir and config.weights):
        print(json.dumps({"name": "search_torch", "needs": "--data_dir and --weights"}))
        return
    with np.load(config.data_dir) as file:
        data = {name: file[name] for name in file.files if name.endswith(("images", "labels"))}
    rng = np.random.default_rng(0)
    scale = lambda x: (x.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    count = 600 if config.quick else config.report // 12 * 12
    train = rng.permutation(len(data["train_labels"]))[: config.calibration // 64 * 64]
    test = rng.permutation(len(data["test_labels"]))[:count]
    calibration = jnp.asarray(scale(data["train_images"][train]))
    images, labels = jnp.asarray(scale(data["test_images"][test])), data["test_labels"][test]
    depth = int("".join(c for c in config.weights.rsplit("/", 1)[-1].split("-")[0] if c.isdigit()))
    with np.load(config.weights) as file:
        tensors = {name: file[name] for name in file.files}
    result = {"name": "search_torch", "network": f"resnet{depth}"}
    result["ours"] = ours(config.weights, depth, config, calibration, images, labels)
    print(result["ours"], flush=True)
    result["torch_pruning"] = theirs(tensors, depth, config, calibration, images, labels)
    print(json.dumps(result))


if __name__ == "__main__":
    configs.run(main, Config)
