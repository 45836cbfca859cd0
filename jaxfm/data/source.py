"""What a data source hands over."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxfm.data.federation import Federation, federate, leading_size
from jaxfm.data.partition import natural


class Source(NamedTuple):
    """One split of a data set, in host memory. Loaders with several return a dict of them.

    Attributes:
      examples: leaves [N, ...]: "image" u8 or f32 [N, H, W, C], "label" i32[N],
        "tokens" i32[N, T + 1].
      client: i32[N], whose each row is: a number below len(clients), -1 for nobody's; None where
        the data has no natural owners. `federation_of` groups by it.
      clients: the owners' names.
      classes: the names of the labels, where known.
    """

    examples: dict[str, np.ndarray]
    client: np.ndarray | None = None
    clients: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


def checked(source: Source, origin: str | Path) -> Source:
    """The source itself, having checked that its parts fit; errors name `origin`."""
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


def with_clients(source: Source, keys: np.ndarray) -> Source:
    """The source with one client for each distinct key of its rows, named by it, sorted."""
    distinct, client = np.unique(keys, return_inverse=True)
    return source._replace(client=client.astype(np.int32), clients=tuple(map(str, distinct)))


def federation_of(source: Source) -> Federation:
    """The source with its natural clients, in their order; one without rows here is empty."""
    if source.client is None:
        raise ValueError(
            "The examples have no natural owners (client is None); choose a partition from "
            "jaxfm.data.partition and join it with federate(source.examples, partition)."
        )
    return federate(source.examples, natural(source.client, len(source.clients)))


def describe(splits: Mapping[str, Source]) -> str:
    """A table for people: examples, owners and shapes of each split."""
    lines = [f"{'split':<12}{'examples':>10}{'clients':>9}  leaves"]
    for name, source in splits.items():
        leaves = ", ".join(
            f"{key} {leaf.dtype}{list(leaf.shape[1:])}" for key, leaf in source.examples.items()
        )
        owners = 0 if source.client is None else len(np.unique(source.client[source.client >= 0]))
        lines.append(f"{name:<12}{leading_size(source.examples):>10,}{owners:>9,}  {leaves}")
    return "\n".join(lines)
