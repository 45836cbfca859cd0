"""Data: sources of examples, partitions over clients, federations of them."""

from jaxfm.data import partition
from jaxfm.data.arrays import digits, npz
from jaxfm.data.cifar import cifar10, cifar100
from jaxfm.data.federation import Federation, federate, merge, select_clients
from jaxfm.data.hub_datasets import huggingface, huggingface_documents
from jaxfm.data.idx import mnist
from jaxfm.data.noise import smooth_noise
from jaxfm.data.source import Source
from jaxfm.data.standard_library import stdlib
from jaxfm.data.text import corpus, read_folder

__all__ = [
    "Federation",
    "Source",
    "cifar10",
    "cifar100",
    "corpus",
    "digits",
    "federate",
    "huggingface",
    "huggingface_documents",
    "merge",
    "mnist",
    "npz",
    "partition",
    "read_folder",
    "select_clients",
    "smooth_noise",
    "stdlib",
]
