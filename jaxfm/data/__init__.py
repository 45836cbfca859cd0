"""Data: sources of examples, partitions over clients, federations of them.

`load` reads files, folders and the Hugging Face hub, whatever the kind; the others read one kind.
Sources: stdlib and digits need no files; corpus and read_folder (text), mnist, cifar10, cifar100
and npz read files; huggingface and huggingface_documents load by name; smooth_noise draws images.
Who holds what: the functions of `partition`, federate, merge and select_clients, or deal and
deal_out for all of it at once.
"""

from jaxfm.data import partition
from jaxfm.data.arrays import digits, npz
from jaxfm.data.cifar import cifar10, cifar100
from jaxfm.data.dealing import Data, deal, deal_out, subsample, take_rows, with_validation
from jaxfm.data.federation import Federation, federate, merge, select_clients
from jaxfm.data.hub_datasets import huggingface, huggingface_documents
from jaxfm.data.idx import mnist
from jaxfm.data.images import as_images
from jaxfm.data.loading import DataSet, load
from jaxfm.data.noise import smooth_noise
from jaxfm.data.source import Source
from jaxfm.data.standard_library import stdlib
from jaxfm.data.text import corpus, read_folder

__all__ = [
    "Data",
    "DataSet",
    "Federation",
    "Source",
    "as_images",
    "cifar10",
    "cifar100",
    "corpus",
    "deal",
    "deal_out",
    "digits",
    "federate",
    "huggingface",
    "huggingface_documents",
    "load",
    "merge",
    "mnist",
    "npz",
    "partition",
    "read_folder",
    "select_clients",
    "smooth_noise",
    "stdlib",
    "subsample",
    "take_rows",
    "with_validation",
]
