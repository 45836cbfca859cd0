"""Sources dealt out to clients: who holds which rows, what is held out, what is public.

>>> from jaxfm import tasks
>>> from jaxfm.data.arrays import digits
>>> data = deal_out(digits(), tasks.classification(10), num_clients=4, beta=0.5)
>>> data.train.count.shape, data.names[0], data.public is None
((4,), 'client 0', True)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from jaxfm.data import partition
from jaxfm.data.federation import Federation, federate, leading_size
from jaxfm.data.noise import smooth_noise
from jaxfm.data.scaling import Scale
from jaxfm.data.source import Source, class_names

if TYPE_CHECKING:
    from jaxfm.tasks import Task
    from jaxfm.tokenizer import Tokenizer

Examples = Mapping[str, np.ndarray]
Dealing = Literal["auto", "natural", "iid", "dirichlet", "shards", "quantity"]


class Data(NamedTuple):
    """Everything that a run reads.

    Attributes:
      train: of the clients.
      local_validation: held out by each client to watch its own model; None unless asked for.
      local_test: held out by each client for the final test.
      validation, test: of the server. Models are selected by validation only.
      names: of the clients.
      task: what is learned.
      tokenizer: of text; None for images.
      public: rows that belong to no client, without labels, or noise; None unless asked for.
      classes: the names of the labels, in order; none where text is to be continued.
      scale: by which columns of numbers were standardised; None if they were not.
    """

    train: Federation
    local_validation: Federation | None
    local_test: Federation
    validation: Examples
    test: Examples
    names: tuple[str, ...]
    task: Task
    tokenizer: Tokenizer | None
    public: Examples | None
    classes: tuple[str, ...] = ()
    scale: Scale | None = None

    def check(self) -> None:
        """Raises a ValueError where the task cannot take the examples, or a split has none."""
        check_splits(
            {
                "training": self.train.examples,
                "validation": self.validation,
                "test": self.test,
            },
            self.task,
        )


def check_splits(splits: Mapping[str, Mapping], task: Task) -> None:
    """Raises a ValueError where a split has no rows, or the task cannot take them."""
    for name, examples in splits.items():
        if not leading_size(examples):
            raise ValueError(f"The {name} split is empty; give more data.")
        try:
            task.check(examples)
        except ValueError as error:
            raise ValueError(f"The {name} split: {error}") from None


def deal_out(
    splits: Mapping[str, Source],
    task: Task,
    *,
    num_clients: int,
    how: Dealing = "auto",
    beta: float = 0.5,
    shards_per_client: int = 2,
    local_test: float = 0.1,
    local_validation: float = 0.0,
    public: float = 0.0,
    noise: int = 0,
    tokenizer: Tokenizer | None = None,
    scale: Scale | None = None,
    seed: int = 0,
) -> Data:
    """Returns the data of a run; the same seed gives the same clients.

    Args:
      splits: "train", "validation" and "test".
      task: what is learned.
      num_clients: how many clients there are; of a natural partition the largest.
      how: as of `deal`, with its `beta` and `shards_per_client`.
      local_test: share of each client's rows that it holds out as its test set.
      local_validation: share of the remaining rows that it holds out for validation.
      public: share of the training rows that the server gets without labels.
      noise: number of public images of smooth noise, in place of real rows.
      tokenizer: of text.
      scale: of columns that were standardised.
      seed: of every draw.
    Raises:
      ValueError: as of `deal`; what the task refuses; a split without rows.
    """
    check_splits({name: source.examples for name, source in splits.items()}, task)
    train, shared = take_public(splits["train"], public, seed=seed)
    if noise and "image" not in train.examples:
        raise ValueError(f"noise={noise} draws public images, but the data are none.")
    if noise:
        shared = noise_like(train.examples["image"], noise, seed=seed)
    parts, names = deal(
        train, num_clients, how, beta=beta, shards_per_client=shards_per_client, seed=seed
    )
    parts, test_rows = partition.holdout(parts, local_test, seed=seed)
    validation = None
    if local_validation:
        parts, rows = partition.holdout(parts, local_validation, seed=seed + 1)
        validation = federate(train.examples, rows)
    return Data(
        train=federate(train.examples, parts),
        local_validation=validation,
        local_test=federate(train.examples, test_rows),
        validation=splits["validation"].examples,
        test=splits["test"].examples,
        names=names,
        task=task,
        tokenizer=tokenizer,
        public=shared,
        classes=class_names(splits),
        scale=scale,
    )


def deal(
    source: Source,
    num_clients: int,
    how: Dealing = "auto",
    *,
    beta: float = 0.5,
    shards_per_client: int = 2,
    seed: int = 0,
) -> tuple[partition.Partition, tuple[str, ...]]:
    """Returns the rows of each client and the clients' names.

    Args:
      source: the rows to deal out.
      num_clients: how many clients there are; of a natural partition the largest.
      how: a function of `jaxfm.data.partition`; "auto" is natural where rows have owners,
        dirichlet where they have labels, and iid where they have neither.
      beta: concentration of dirichlet and quantity.
      shards_per_client: of shards.
      seed: of every draw.
    Raises:
      ValueError: `how` is unknown; rows have no owners or no labels where it needs them; there are
        fewer owners than clients.
    """
    if how not in get_args(Dealing):
        raise ValueError(f"how={how!r} is unknown; choose one of {', '.join(get_args(Dealing))}.")
    size = leading_size(source.examples)
    if how == "auto":
        unowned: Dealing = "dirichlet" if "label" in source.examples else "iid"
        how = unowned if source.client is None else "natural"
    if how == "natural":
        return _largest_owners(source, num_clients)
    numbered = lambda: tuple(f"client {i}" for i in range(num_clients))
    if how == "iid":
        return partition.iid(size, num_clients, seed=seed), numbered()
    if how == "quantity":
        return partition.quantity(size, num_clients, beta=beta, seed=seed), numbered()
    if "label" not in source.examples:
        raise ValueError(
            f"The partition {how} deals rows out by label, and these rows have none; choose "
            "natural, iid or quantity."
        )
    labels = source.examples["label"]
    if how == "dirichlet":
        return partition.dirichlet(labels, num_clients, beta=beta, seed=seed), numbered()
    parts = partition.shards(labels, num_clients, shards_per_client=shards_per_client, seed=seed)
    return parts, numbered()


def take_public(source: Source, share: float, *, seed: int) -> tuple[Source, Examples | None]:
    """Returns the rows that clients keep, and a random share of rows without labels, or None."""
    if not share:
        return source, None
    size = leading_size(source.examples)
    order = np.random.default_rng((seed, 1)).permutation(size)
    cut = max(1, round(share * size))
    if cut >= size:
        raise ValueError(f"public={share} of {size} training rows leaves none to the clients.")
    public = take_rows(source, np.sort(order[:cut])).examples
    unlabelled = {name: leaf for name, leaf in public.items() if name not in ("label", "tags")}
    return take_rows(source, np.sort(order[cut:])), unlabelled


def noise_like(images: np.ndarray, count: int, *, seed: int) -> dict[str, np.ndarray]:
    """Returns `count` images of smooth noise with the shape, dtype and range of `images`."""
    noise = smooth_noise(
        count, images.shape[1:], dtype=images.dtype, high=float(images.max()), seed=seed
    )
    return {"image": noise}


def with_validation(
    splits: Mapping[str, Source], share: float = 0.1, *, seed: int
) -> dict[str, Source]:
    """Returns splits whose "validation" is a random share of "train": test rows select nothing."""
    train = splits["train"]
    order = np.random.default_rng(seed).permutation(leading_size(train.examples))
    cut = int(share * len(order))
    rest, validation = np.sort(order[cut:]), np.sort(order[:cut])
    return {
        "train": take_rows(train, rest),
        "validation": take_rows(train, validation),
        "test": splits["test"],
    }


def take_rows(source: Source, rows: np.ndarray) -> Source:
    """Returns the source of the given rows, with their owners."""
    client = None if source.client is None else source.client[rows]
    examples = {name: leaf[rows] for name, leaf in source.examples.items()}
    return source._replace(examples=examples, client=client)


def subsample(examples: Examples, count: int) -> dict[str, np.ndarray]:
    """Returns about `count` examples at equal distances; all of them if `count` is 0."""
    size = leading_size(examples)
    stride = max(1, size // count) if count else 1
    return {name: leaf[::stride] for name, leaf in examples.items()}


def _largest_owners(
    source: Source, num_clients: int
) -> tuple[partition.Partition, tuple[str, ...]]:
    if source.client is None:
        raise ValueError(
            "These rows have no natural owners; choose another partition: iid, dirichlet, shards "
            "or quantity."
        )
    parts = partition.natural(source.client, len(source.clients))
    if len(parts) < num_clients:
        raise ValueError(
            f"num_clients={num_clients}: there are only {len(parts)} owners; give as many or fewer."
        )
    largest = np.argsort([-len(rows) for rows in parts], kind="stable")[:num_clients]
    return [parts[i] for i in largest], tuple(source.clients[i] for i in largest)
