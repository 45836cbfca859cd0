"""Convolutional networks: batch norm as PyTorch has it, PyTorch's names, subnets, statistics.

Tolerance of parity: float32 sums in another order, through a handful of layers.
"""

import os
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm import count_parameters
from jaxfm.hub import torch_vision
from jaxfm.layers import BatchNorm
from jaxfm.model import from_nnx
from jaxfm.models import (
    build,
    mobilenet_config,
    resnet_config,
    shufflenet_config,
    vgg_config,
)
from jaxfm.models.families.convnet import average_pool_3x3, max_pool_3x3
from jaxfm.subnet import Subnet, axis_sizes, centre, extract, kernel_sizes, mask
from jaxfm.testing import (
    random_variables,
    tiny_mobilenet,
    tiny_resnet,
    tiny_shufflenet,
    tiny_vgg,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PROJECTION = {"shortcut": "projection", "stem": "imagenet"}
FAMILIES = {
    "resnet, padded": tiny_resnet(),
    "resnet, projected": tiny_resnet(**PROJECTION),
    "bottleneck": tiny_resnet(**PROJECTION, block="bottleneck", depths=(1, 1)),
    "vgg": tiny_vgg(batch_norm=False),
    "vgg_bn": tiny_vgg(dense_dims=()),
    "mobilenet v1": tiny_mobilenet(1),
    "mobilenet v2": tiny_mobilenet(2),
    "shufflenet v1": tiny_shufflenet(1),
    "shufflenet v2": tiny_shufflenet(2),
}
OF_TORCH = [name for name in FAMILIES if not name.endswith("v1")]
CUT = [name for name in FAMILIES if name != "shufflenet v1"]  # whose axes shuffles leave no names
APPLY = {name: jax.jit(model.apply) for name, model in FAMILIES.items()}


@pytest.mark.parametrize("family", CUT)
def test_a_masked_network_computes_what_the_extracted_one_does(family):
    model, variables = FAMILIES[family], random_variables(FAMILIES[family])
    sizes = axis_sizes(variables, model.axes)
    keep = {
        name: RNG.permutation(size)[: -(-size // 2)].astype(np.int32)
        for name, size in sizes.items()
        if name not in ("channel", "class")
    }
    taps = kernel_sizes(variables, model.axes)
    keep |= {name: centre(size, size - 2) for name, size in list(taps.items())[::2]}
    masked, _ = APPLY[family](mask(variables, model.axes, Subnet(keep)), IMAGES)
    small, _ = APPLY[family](extract(variables, model.axes, Subnet(keep)), IMAGES)
    whole, _ = APPLY[family](variables, IMAGES)
    np.testing.assert_allclose(masked, small, **CLOSE)
    assert not np.allclose(masked, whole, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_above_one_has_a_name_of_its_own(family):
    model = FAMILIES[family]
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    kernels = [leaf.shape for leaf in jax.tree.leaves(shapes.params) if leaf.ndim == 4]
    dense = family.startswith("vgg")  # its first dense layer reads a 2x2 image
    sizes = sorted(shape[0] for shape in kernels if shape[0] > 1)[dense:]
    assert sorted(kernel_sizes(shapes, model.axes).values()) == sizes


@pytest.mark.parametrize("pool", [max_pool_3x3, average_pool_3x3])
def test_pools_have_gradients_under_jit(pool):
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    gradient = jax.jit(jax.grad(lambda x: pool(x).sum()))(x)
    # Windows of stride 2 around rows and columns 0 and 2.
    times = np.array([1, 2, 1, 1]) if pool is average_pool_3x3 else np.array([0, 1, 0, 1])
    whole = np.outer(times, times)[None, ..., None] / (9 if pool is average_pool_3x3 else 1)
    np.testing.assert_allclose(gradient, np.broadcast_to(whole, x.shape), rtol=1e-6)


def test_blocks_may_be_cut_unequally():
    model, variables = FAMILIES["resnet, padded"], random_variables(FAMILIES["resnet, padded"])
    subnet = Subnet({"stage1_0": np.array([3]), "stage1_1": np.array([0, 2])})
    small = extract(variables, model.axes, subnet)
    assert small.params["stage1"]["0"]["conv1"]["conv"]["kernel"].shape == (3, 3, 4, 1)
    masked, _ = APPLY["resnet, padded"](mask(variables, model.axes, subnet), IMAGES)
    np.testing.assert_allclose(model.apply(small, IMAGES)[0], masked, **CLOSE)


def test_group_norm_in_the_place_of_batch_norm_keeps_no_statistics():
    model = tiny_resnet(norm="group", depths=(1,), widths=(4,))
    variables = random_variables(model)
    assert not variables.stats
    chex.assert_shape(model.apply(variables, IMAGES)[0], (2, 5))


@pytest.mark.parametrize(
    "config, count",
    [
        (resnet_config(8), 269_722 - 2 * 97_216),  # of 20, less two blocks a stage
        (resnet_config(20), 269_722),
        (resnet_config(56), 853_018),
        (resnet_config(110), 1_727_962),
        (resnet_config(18), 11_689_512),
        (resnet_config(50), 25_557_032),
        (vgg_config(11), 132_868_840),
        (vgg_config(16, batch_norm=False), 138_357_544),
        (mobilenet_config(1), 4_231_976),
        (mobilenet_config(2), 3_504_872),
        (shufflenet_config(2), 2_278_604),
    ],
)
def test_networks_have_the_published_number_of_parameters(config, count):
    shapes = jax.eval_shape(build(config).init, jax.random.key(0))
    assert count_parameters(shapes.params) == count


@pytest.mark.parametrize("family", OF_TORCH)
def test_tensors_go_to_pytorch_and_back_unchanged(family, tmp_path):
    model, variables = FAMILIES[family], random_variables(FAMILIES[family])
    for file in ("weights.npz", "weights.safetensors"):
        torch_vision.save_torch(model, variables, tmp_path / file)
        _, loaded = torch_vision.load_torch(model.config, tmp_path / file)
        chex.assert_trees_all_equal(loaded, variables)


def test_files_that_do_not_fit_are_refused_by_name(tmp_path):
    model = FAMILIES["resnet, padded"]
    tensors = torch_vision.to_torch(model, random_variables(model))
    load = lambda changed: torch_vision.load_torch(model.config, changed)
    with pytest.raises(ValueError, match=r"no place: extra\.weight"):
        load(tensors | {"extra.weight": np.ones(3)})
    with pytest.raises(ValueError, match=r"linear\.bias has shape \(7,\).*asks for \(5,\)"):
        load(tensors | {"linear.bias": np.ones(7)})
    with pytest.raises(ValueError, match=r"lacks the tensor linear\.weight"):
        load({name: t for name, t in tensors.items() if name != "linear.weight"})
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        (tmp_path / "weights.bin").touch()
        load(tmp_path / "weights.bin")
    with pytest.raises(TypeError, match="v1 has no PyTorch names"):
        torch_vision.to_torch(FAMILIES["mobilenet v1"], random_variables(FAMILIES["mobilenet v1"]))


def data_dir() -> pathlib.Path:
    folder = os.environ.get("JAXFM_DATA_DIR")
    if not folder or not pathlib.Path(folder, "resnet_cifar10").is_dir():
        pytest.skip("needs JAXFM_DATA_DIR with resnet_cifar10 and cifar10")
    return pathlib.Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("depth, accuracy", [(20, 81.03), (56, 83.20)])
def test_published_weights_reach_their_accuracy(depth, accuracy):
    folder = data_dir()
    with np.load(folder / "cifar10" / "cifar10_decoded_20k.npz") as file:
        images, labels = file["test_images"].astype(np.float32) / 255, file["test_labels"]
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    images = (images - mean) / std
    weights = folder / "resnet_cifar10" / f"resnet{depth}.npz"
    model, variables = torch_vision.load_torch(resnet_config(depth), weights)
    predict = jax.jit(lambda batch: model.apply(variables, batch)[0].argmax(-1))
    batches = np.concatenate([predict(images[i : i + 500]) for i in range(0, len(images), 500)])
    assert abs((batches == labels).mean() * 100 - accuracy) <= 0.1


torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
torch.set_num_threads(1)


def test_batch_norm_is_that_of_pytorch_in_training_too():
    theirs, ours = nn.BatchNorm2d(3), from_nnx(lambda rngs: BatchNorm(("c", 3)))
    variables = random_variables(ours)
    with torch.no_grad():
        for leaf, value in (
            ("weight", variables.params["scale"]), ("bias", variables.params["bias"]),
            ("running_mean", variables.stats["mean"]), ("running_var", variables.stats["var"]),
        ):  # fmt: skip
            getattr(theirs, leaf).copy_(torch.tensor(np.asarray(value)))
    x = torch.tensor(IMAGES).permute(0, 3, 1, 2)
    for train in (True, False):
        expected = theirs.train(train)(x).detach().permute(0, 2, 3, 1).numpy()
        y, stats = ours.apply(variables, jnp.asarray(IMAGES), train=train)
        np.testing.assert_allclose(y, expected, **CLOSE)
        variables = variables._replace(stats=stats)
        np.testing.assert_allclose(stats["mean"], theirs.running_mean, **CLOSE)
        np.testing.assert_allclose(stats["var"], theirs.running_var, **CLOSE)


def conv_bn(i, o, k, stride=1, groups=1):
    return [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]


class Residual(nn.Module):
    """A block by torchvision's names, or those of the CIFAR networks where `pad`."""

    def __init__(self, i, o, width, stride, *, pad, bottleneck):
        super().__init__()
        sizes = [(i, width, 1, 1), (width, width, 3, stride), (width, o, 1, 1)]
        sizes = sizes if bottleneck else [(i, width, 3, stride), (width, o, 3, 1)]
        for k, size in enumerate(sizes, 1):
            conv, norm = conv_bn(size[0], size[1], size[2], size[3])
            setattr(self, f"conv{k}", conv)
            setattr(self, f"bn{k}", norm)
        self.count, self.stride, self.new = len(sizes), stride, o - i
        self.downsample = None
        if not pad and (stride > 1 or i != o):
            self.downsample = nn.Sequential(*conv_bn(i, o, 1, stride))

    def forward(self, x):
        y = x
        for k in range(1, self.count + 1):
            y = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(y))
            y = F.relu(y) if k < self.count else y
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.new:
            half = self.new // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        return F.relu(x + y)


class TorchResNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        cifar, wider = config.stem == "cifar", 1 if config.block == "basic" else 4
        width = config.widths[0]
        stem = (3, width, 3, 1, 1) if cifar else (3, width, 7, 2, 3)
        self.conv1, self.bn1 = nn.Conv2d(*stem, bias=False), nn.BatchNorm2d(width)
        self.layers, last = len(config.depths), width
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True), 1):
            blocks = []
            for j in range(depth):
                stride, kw = (2 if i > 1 and j == 0 else 1), {"bottleneck": wider > 1}
                blocks.append(Residual(last, width * wider, width, stride, pad=cifar, **kw))
                last = width * wider
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.name = "linear" if cifar else "fc"
        setattr(self, self.name, nn.Linear(last, config.num_classes))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.name == "linear" else F.max_pool2d(x, 3, 2, 1)
        for i in range(1, self.layers + 1):
            x = getattr(self, f"layer{i}")(x)
        return getattr(self, self.name)(x.mean((2, 3)))


class TorchVgg(nn.Module):
    def __init__(self, config):
        super().__init__()
        layers, last = [], 3
        for counts in config.stages:
            for count in counts:
                layers.append(nn.Conv2d(last, count, 3, padding=1))
                if config.batch_norm:
                    layers.append(nn.BatchNorm2d(count))
                layers.append(nn.ReLU())
                last = count
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        last *= (config.image_size // 2 ** len(config.stages)) ** 2
        head = []
        for count in config.dense_dims:
            head += [nn.Linear(last, count), nn.ReLU(), nn.Dropout()]
            last = count
        out = nn.Linear(last, config.num_classes)
        self.classifier = nn.Sequential(*head, out) if head else out

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class TorchInverted(nn.Module):
    def __init__(self, i, o, expansion, stride):
        super().__init__()
        wide = i * expansion
        wrap = lambda *size: nn.Sequential(*conv_bn(*size), nn.ReLU6())
        parts = [wrap(i, wide, 1)] if expansion > 1 else []
        self.conv = nn.Sequential(*parts, wrap(wide, wide, 3, stride, wide), *conv_bn(wide, o, 1))
        self.adds = stride == 1 and i == o

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class TorchMobileNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        last = config.stem_channels
        layers = [nn.Sequential(*conv_bn(3, last, 3, config.stem_stride), nn.ReLU6())]
        for expansion, channels, depth, stride in config.rows:
            for j in range(depth):
                layers.append(TorchInverted(last, channels, expansion, 1 if j else stride))
                last = channels
        layers.append(nn.Sequential(*conv_bn(last, config.last_channels, 1), nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        head = nn.Linear(config.last_channels, config.num_classes)
        self.classifier = nn.Sequential(nn.Dropout(), head)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class TorchSplit(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        half = o // 2
        read = i if stride == 2 else half
        left = [*conv_bn(i, i, 3, 2, i), *conv_bn(i, half, 1), nn.ReLU()]
        self.branch1 = nn.Sequential(*(left if stride == 2 else []))
        self.branch2 = nn.Sequential(
            *conv_bn(read, half, 1), nn.ReLU(), *conv_bn(half, half, 3, stride, half),
            *conv_bn(half, half, 1), nn.ReLU(),
        )  # fmt: skip
        self.stride = stride

    def forward(self, x):
        a, b = (x, x) if self.stride == 2 else x.chunk(2, 1)
        y = torch.cat((self.branch1(a), self.branch2(b)), 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class TorchShuffleNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        last, self.stages = config.stem_channels, len(config.depths)
        self.conv1 = nn.Sequential(*conv_bn(3, last, 3), nn.ReLU())
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True), 2):
            blocks = [TorchSplit(width if j else last, width, 1 if j else 2) for j in range(depth)]
            setattr(self, f"stage{i}", nn.Sequential(*blocks))
            last = width
        self.conv5 = nn.Sequential(*conv_bn(last, config.last_channels, 1), nn.ReLU())
        self.fc = nn.Linear(config.last_channels, config.num_classes)

    def forward(self, x):
        x = self.conv1(x)
        for i in range(2, self.stages + 2):
            x = getattr(self, f"stage{i}")(x)
        return self.fc(self.conv5(x).mean((2, 3)))


TORCH = {"ResNet": TorchResNet, "Vgg": TorchVgg, "Mob": TorchMobileNet, "Shu": TorchShuffleNet}


@pytest.mark.parametrize("family", OF_TORCH)
def test_networks_compute_what_those_of_pytorch_do(family, tmp_path):
    model, variables = FAMILIES[family], random_variables(FAMILIES[family])
    kind = next(
        kind for name, kind in TORCH.items() if type(model.config).__name__.startswith(name)
    )
    theirs = kind(model.config).eval()
    tensors = torch_vision.to_torch(model, variables)
    state = {
        name: torch.tensor(np.ascontiguousarray(tensors[name]))
        for name in theirs.state_dict()
        if not name.endswith("num_batches_tracked")
    }
    assert state.keys() == tensors.keys()
    theirs.load_state_dict(state, strict=False)
    with torch.no_grad():
        expected = theirs(torch.tensor(IMAGES).permute(0, 3, 1, 2))
    np.testing.assert_allclose(APPLY[family](variables, IMAGES)[0], expected, **CLOSE)
    prefixed = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": prefixed, "best_prec1": 1.0}, tmp_path / "weights.th")
    _, loaded = torch_vision.load_torch(model.config, tmp_path / "weights.th")
    chex.assert_trees_all_equal(loaded, variables)
