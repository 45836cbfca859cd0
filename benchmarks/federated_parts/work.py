"""The works of the table: who holds which rows, and which network is trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxfm.data.arrays import digits
from jaxfm.data.cifar import cifar10
from jaxfm.data.dealing import Data
from jaxfm.data.federation import Federation, federate, of_one_shape
from jaxfm.data.idx import mnist
from jaxfm.data.partition import dirichlet, natural
from jaxfm.data.source import Source
from jaxfm.federated import Local, Setting, make_setting
from jaxfm.model import Model, Variables
from jaxfm.models.families.cnn import CnnConfig, cnn
from jaxfm.models.families.resnet import ResNetConfig, resnet, resnet_config
from jaxfm.models.families.vgg import vgg, vgg_config
from jaxfm.tasks import classification
from jaxfm.tasks.evaluation import evaluate

TASK = classification(10)
RATIOS = (1.0, 0.75, 0.5)  # widths of the tiers of HeteroFL, FedRolex and RaFFM


class Size(NamedTuple):
    """How much of a work's data is used, and how clients train.

    Attributes:
      validation: rows of the server's validation set.
      private: rows of all clients.
      clients, cohort: the number of all clients, and of those of a round.
      epochs, batch: of local training.
    """

    validation: int
    private: int
    clients: int
    cohort: int
    epochs: int
    batch: int


WORKS = {
    "digits": Size(200, 1097, 10, 5, 3, 20),
    "mnist": Size(1000, 4000, 10, 5, 2, 20),
    "mnist_writers": Size(1000, 6000, 50, 10, 3, 20),
    "cifar10": Size(500, 2000, 10, 10, 2, 32),
    "cifar10_resnet20": Size(500, 2000, 10, 10, 2, 32),
    "cifar10_vgg11": Size(500, 2000, 10, 10, 2, 32),
    "paper_resnet20": Size(5000, 45000, 10, 10, 10, 64),
    "paper_vgg11": Size(5000, 45000, 10, 10, 10, 64),
}


class Work(NamedTuple):
    """What is the same for all algorithms.

    Attributes:
      size: see `Size`.
      validation, test: rows for the global model.
      train, choice, own: one federation for each seed, of the clients' training rows, and of their
        own validation and test rows.
      model: the network of full width.
    """

    size: Size
    validation: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    train: list[Federation]
    choice: list[Federation]
    own: list[Federation]
    model: Model


def load(name: str, folder: str, *, num_seeds: int = 1, beta: float = 0.1) -> Work:
    """Returns a work by its name.

    Args:
      name: one of `WORKS`.
      folder: with the data, or the path of CIFAR-10's .npz file; "digits" needs none.
      num_seeds: partitions.
      beta: of the Dirichlet distribution of labels.
    """
    size, data = WORKS[name], _read(name, folder)
    rng, source = np.random.default_rng(0), data["train"]
    order = rng.permutation(len(source.examples["label"]))
    rows = {leaf_name: leaf[order] for leaf_name, leaf in source.examples.items()}
    private = {leaf_name: leaf[size.validation :] for leaf_name, leaf in rows.items()}
    train, choice, own = [], [], []
    for seed in range(num_seeds):
        if name == "mnist_writers":
            writers = np.random.default_rng(seed).permutation(source.client.max() + 1)
            people = natural(source.client[order][size.validation :])
            parts = [people[writer] for writer in writers[: size.clients]]
        else:
            label = private["label"][: size.private]
            parts = dirichlet(label, size.clients, beta=beta, seed=seed, min_examples=10)
        dealt = [np.array_split(rng.permutation(np.asarray(part)), 6) for part in parts]
        train.append(federate(private, [np.concatenate(sixths[2:]) for sixths in dealt]))
        choice.append(federate(private, [sixths[0] for sixths in dealt]))
        own.append(federate(private, [sixths[1] for sixths in dealt]))
    return Work(
        size=size,
        validation={leaf_name: leaf[: size.validation] for leaf_name, leaf in rows.items()},
        test={leaf_name: leaf[:2000] for leaf_name, leaf in data["test"].examples.items()},
        train=of_one_shape(train),
        choice=of_one_shape(choice),
        own=of_one_shape(own),
        model=_network(name, private["image"].shape[1]),
    )


def setting_of(work: Work, local: Local, num_rounds: int) -> Setting:
    """What the work offers to the factory of an algorithm, with tiers of widths `RATIOS`."""
    data = Data(
        train=work.train[0],
        local_validation=None,
        local_test=work.own[0],
        validation=work.validation,
        test=work.test,
        names=tuple(f"client {i}" for i in range(work.size.clients)),
        task=TASK,
        tokenizer=None,
        public=None,
    )
    return make_setting(work.model, data, local, num_rounds=num_rounds, widths=RATIOS)


def accuracy(model: Model, variables: Variables, examples: Mapping) -> float:
    """The accuracy of a network on some rows."""
    return float(evaluate(model.apply, variables, TASK, examples, 250)["accuracy"])


def _read(name: str, folder: str) -> Mapping[str, Source]:
    if name == "digits":
        return digits()
    if name == "mnist":
        return mnist(folder)
    if name == "mnist_writers":
        return mnist(folder, writers=folder)
    return cifar10(folder)


def _network(name: str, side: int) -> Model:
    if name == "cifar10":
        return resnet(ResNetConfig(depths=(1, 1, 1), shortcut="projection"))
    if name.endswith("_resnet20"):
        return resnet(resnet_config(20))
    if name.endswith("_vgg11"):
        return vgg(vgg_config(11, cifar=True))
    return cnn(CnnConfig(image_size=(side, side), conv_channels=(8, 16), dense_dim=64))
