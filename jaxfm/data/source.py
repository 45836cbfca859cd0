"""What a data source returns."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxfm.data.federation import Federation, federate, leading_size
from jaxfm.data.partition import natural


class Source(NamedTuple):
    """One split of a data set, in host memory. Loaders with several return a dict of them.

    Attributes:
      examples: leaves [N, ...]: "image" u8 or f32 [N, H, W, C], "features" f32[N, D],
        "label" i32[N], "weight" f32[N], "tokens" i32[N, T + 1], or, where they are labelled,
        i32[N, T] with "mask" bool[N, T], and with "tags" i32[N, T] where words are.
      client: i32[N], the owner of each row: a number below len(clients), or -1 for none; None if
        the data has no natural owners. `federation_of` groups by it.
      clients: the owners' names.
      classes: the names of the labels, where known.
    """

    examples: dict[str, np.ndarray]
    client: np.ndarray | None = None
    clients: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


def checked(source: Source, origin: str | Path) -> Source:
    """Returns the source after checking that its parts fit; errors name `origin`."""
    try:
        size = leading_size(source.examples)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    if source.client is not None and len(source.client) != size:
        raise ValueError(f"{origin}: {size} examples but {len(source.client)} client numbers.")
    label = source.examples.get("label")
    if (
        source.classes
        and label is not None
        and size
        and not 0 <= label.min() <= label.max() < len(source.classes)
    ):
        raise ValueError(
            f"{origin}: labels must be in 0..{len(source.classes) - 1}; "
            f"found {label.min()}..{label.max()}."
        )
    return source


def class_names(splits: Mapping[str, Source]) -> tuple[str, ...]:
    """Returns the names of the classes; where no split has names, the numbers up to the largest.

    Raises:
      ValueError: a label is negative.
    """
    if known := next((source.classes for source in splits.values() if source.classes), ()):
        return known
    labels = [source.examples["label"] for source in splits.values() if "label" in source.examples]
    labels = [label for label in labels if np.size(label)]
    if not labels:
        return ()
    if (least := min(int(label.min()) for label in labels)) < 0:
        raise ValueError(f"Labels must be 0 or more; found {least}.")
    return tuple(map(str, range(1 + max(int(label.max()) for label in labels))))


def with_clients(source: Source, keys: np.ndarray) -> Source:
    """Returns the source with one client, named by it, for each distinct key of its rows."""
    distinct, client = np.unique(keys, return_inverse=True)
    return source._replace(client=client.astype(np.int32), clients=tuple(map(str, distinct)))


def federation_of(source: Source) -> Federation:
    """Returns the natural clients of a source, in their order; one without rows is empty."""
    if source.client is None:
        raise ValueError(
            "The examples have no natural owners (client is None); choose a partition from "
            "jaxfm.data.partition and join it with federate(source.examples, partition)."
        )
    return federate(source.examples, natural(source.client, len(source.clients)))


def describe(splits: Mapping[str, Source]) -> str:
    """Returns a readable table of examples, owners and shapes of each split."""
    lines = [f"{'split':<12}{'examples':>10}{'clients':>9}  leaves"]
    for name, source in splits.items():
        leaves = ", ".join(
            f"{key} {leaf.dtype}{list(leaf.shape[1:])}" for key, leaf in source.examples.items()
        )
        owners = 0 if source.client is None else len(np.unique(source.client[source.client >= 0]))
        lines.append(f"{name:<12}{leading_size(source.examples):>10,}{owners:>9,}  {leaves}")
    return "\n".join(lines)
