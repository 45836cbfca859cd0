"""Clients of this process as an exchange: all that real ones do, without a network."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping

from jaxfm.federated.remote.checking import Reply
from jaxfm.federated.remote.orders import Order
from jaxfm.federated.remote.server import Exchange
from jaxfm.federated.remote.standalone import Config, Refusal, answer, pack


def in_process(root: pathlib.Path, prepare: Callable[[pathlib.Path, Config], None]) -> Exchange:
    """An exchange whose clients answer one after another.

    Args:
      root, prepare: as of `standalone.answer`.
    """

    def exchange(orders: Mapping[int, Order]) -> Iterator[Reply]:
        for client, order in orders.items():
            try:
                yield Reply(client, *answer(order.config, pack(order.arrays), root, prepare))
            except Refusal as error:
                yield Reply(client, {}, {}, str(error))

    return exchange
