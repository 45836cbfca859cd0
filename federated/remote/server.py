"""Rounds whose clients are processes of their own, over any transport.

    remote = Remote(algorithm, bucket_of, like, cohort_size=8)
    state = start(remote, variables, jax.random.key(1))
    state, report = play_round(remote, state, exchange, Held())

`exchange` carries orders to clients and yields their replies, in any order, until it has waited
long enough. Cohorts, keys and sums are those of `compile_rounds`: what the clients' machines
compute is what a simulation computes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.algorithm import Info, added
from jaxfm.federated.client import combined, receive, send
from jaxfm.federated.cohort import Report, RoundInfo, Slots, cohorts_of, draw, joined, round_keys
from jaxfm.federated.remote.checking import Refused, Reply, as_tree, check_info, check_reply
from jaxfm.federated.remote.masked_round import masked_sum
from jaxfm.federated.remote.orders import (
    Order,
    Remote,
    RemoteState,
    Side,
    expected_of,
    order_of,
    side_of,
)  # fmt: skip
from jaxfm.federated.remote.site import is_masked
from jaxfm.federated.remote.standalone import NEVER, Refusal, not_finite
from jaxfm.federated.remote.trees import flat, tree_of
from jaxfm.federated.rounds import RunState
from jaxfm.model import Key, PyTree, Variables

Exchange = Callable[[Mapping[int, Order]], Iterable[Reply]]
Held = dict[int, dict[str, str]]  # by client: names and digests of constants that it has


def start(remote: Remote, variables: Variables, key: Key) -> RemoteState:
    """The state before the first round."""
    server = jax.jit(remote.algorithm.init)(variables)
    run = RunState(server, (), jnp.zeros((), jnp.int32), key)
    counted = np.full(len(remote.bucket_of), NEVER, np.int32)
    name = np.frombuffer(secrets.token_bytes(16), np.uint8)
    return RemoteState(run, counted, server, name)


def play_round(
    remote: Remote, state: RemoteState, exchange: Exchange, held: Held
) -> tuple[RemoteState, RoundInfo, list[Refused]]:
    """Plays one round: orders go out, replies are checked and added up in the cohort's order.

    Args:
      held: what clients are known to hold; brought up to date.
    Returns:
      The state after the round, its report (one round, as of the engine), and who was refused.
    """
    key, number, num_clients = state.run.key, int(state.run.round), len(remote.bucket_of)
    places, rate = cohorts_of(remote.algorithm, num_clients, remote.cohort_size)
    drawn = np.asarray(draw(key, number, num_clients, places, 0.0, rate)[0], np.int32)
    cohort = [int(i) for i in drawn if i >= 0]
    present = {int(remote.bucket_of[i]) for i in cohort}
    sides = {b: side_of(remote, state, b) for b in sorted(present)}
    orders = {}
    for i in cohort:
        if remote.most_examples is None or remote.most_examples[i] > 0:
            side = sides[int(remote.bucket_of[i])]
            orders[i] = order_of(remote, state, side, i, held.get(i, {}))
    if any(is_masked(side.shapes) for side in sides.values()):
        taken, sums, refused = _collect_masked(remote, state, sides, orders, exchange)
    else:
        taken, refused = _collect(remote, state, sides, orders, exchange(orders))
        sums = _by_bucket(remote, cohort, taken)
    _remember(held, orders, taken)
    totals = _totals(remote, state, sides, sums)
    after, figures = jax.jit(remote.algorithm.server)(
        state.run.server, totals, remote.public, round_keys(key, number)[3]
    )
    counted = np.array(state.counted)
    counted[[i for i, own in taken.items() if own.counts]] = number
    run = state.run._replace(server=after, round=state.run.round + 1)
    report = _report(remote, sides, drawn, taken, figures)
    return state._replace(run=run, counted=counted), report, refused


class _Own(NamedTuple):
    """What a client contributed.

    Attributes:
      counts: whether it is in the sums; its numbers were not finite where it is not.
      sums: as of `Bucket.receive`; None where it does not count, or its upload was masked.
      info: its report.
    """

    counts: bool
    sums: PyTree
    info: Info


def _collect(
    remote: Remote, state: RemoteState, sides: Mapping[int, Side], orders: Mapping[int, Order],
    replies: Iterable[Reply],
) -> tuple[dict[int, _Own], list[Refused]]:  # fmt: skip
    """The replies that are in order, by client, and the others with their reasons."""
    taken: dict[int, _Own] = {}
    refused: list[Refused] = []
    for reply in replies:
        client = reply.client
        try:
            if client not in orders:
                raise Refusal("It was not asked for anything in this round.")
            if client in taken:
                raise Refusal("It has already answered in this round.")
            side = sides[int(remote.bucket_of[client])]
            taken[client] = _take(remote, state, side, orders[client], reply)
        except Refusal as error:
            refused.append(Refused(client, str(error)))
    return taken, refused


def _take(remote: Remote, state: RemoteState, side: Side, order: Order, reply: Reply) -> _Own:
    """What the server makes of a reply; raises Refusal."""
    expected = expected_of(remote, side, order)
    upload, leaves, fault = check_reply(reply, expected)
    info: Info = as_tree(side.shapes.info, leaves)
    check_info(info, expected)
    if fault:
        return _Own(False, None, info)
    tree = tree_of(side.shapes.upload, upload)
    sums = receive(side.bucket, state.run.server, remote.public, tree)
    if sentence := not_finite(flat("received", sums)):
        raise Refusal(sentence)
    return _Own(True, sums, info)


def _remember(held: Held, orders: Mapping[int, Order], taken: Mapping[int, _Own]) -> None:
    """Brings up to date which constants clients hold; one that failed may have lost them."""
    for client, order in orders.items():
        if client not in taken:
            held.pop(client, None)
            continue
        names, marks = order.config["keep_names"], order.config["keep_digests"]
        held[client] = {**held.get(client, {}), **dict(zip(names, marks, strict=True))}


def _by_bucket(
    remote: Remote, cohort: list[int], taken: Mapping[int, _Own]
) -> dict[int, list[PyTree]]:
    """What was received, by bucket, in the cohort's order."""
    found: dict[int, list[PyTree]] = {}
    for i in cohort:
        if i in taken and taken[i].counts:
            found.setdefault(int(remote.bucket_of[i]), []).append(taken[i].sums)
    return found


def _collect_masked(
    remote: Remote, state: RemoteState, sides: Mapping[int, Side], orders: Mapping[int, Order],
    exchange: Exchange,
) -> tuple[dict[int, _Own], dict[int, list[PyTree]], list[Refused]]:  # fmt: skip
    """As `_collect`, of uploads that nobody but their client sees: one sum of each bucket."""
    taken: dict[int, _Own] = {}
    sums: dict[int, list[PyTree]] = {}
    refused: list[Refused] = []
    for b, side in sides.items():
        own = {i: order for i, order in orders.items() if remote.bucket_of[i] == b}
        found = masked_sum(remote, side, own, exchange)
        refused += found.refused
        if found.lost:
            rest = own.keys() - {one.client for one in found.refused} - found.faulty.keys()
            refused += [Refused(i, found.lost) for i in sorted(rest)]
        taken |= {i: _Own(False, None, info) for i, info in found.faulty.items()}
        taken |= {i: _Own(True, None, info) for i, info in found.infos.items()}
        if not found.lost:
            sums[b] = [receive(side.bucket, state.run.server, remote.public, found.upload)]
    return taken, sums, refused


def _totals(
    remote: Remote, state: RemoteState, sides: Mapping[int, Side],
    sums: Mapping[int, list[PyTree]],
) -> PyTree:  # fmt: skip
    """The sums of all buckets."""
    totals, server = None, state.run.server
    for b, bucket in enumerate(remote.algorithm.buckets):
        if not (remote.bucket_of == b).any():
            continue
        download = sides[b].download if b in sides else send(bucket, server, remote.public)
        own = combined(bucket, server, remote.public, download, remote.like, sums.get(b, []))
        lifted = bucket.lift(server, own)
        totals = lifted if totals is None else added(totals, lifted)
    return totals


def _report(
    remote: Remote, sides: Mapping[int, Side], drawn: np.ndarray, taken: Mapping[int, _Own],
    figures: Mapping,
) -> RoundInfo:  # fmt: skip
    """The report of a round as the engine makes it, with a leading axis of one round."""
    slots: list[Slots | None] = [None] * len(remote.algorithm.buckets)
    reports: list[Report | None] = [None] * len(remote.algorithm.buckets)
    flag = lambda yes: jnp.asarray(yes, jnp.float32)
    for b, side in sides.items():
        place = np.asarray([p for p, i in enumerate(drawn) if i >= 0 and remote.bucket_of[i] == b])
        nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), side.shapes.info)
        columns = []
        for client in drawn[place]:
            own = taken.get(int(client))
            if own is None:
                columns.append(Report(flag(0), flag(0), nothing))
            elif not own.counts:
                columns.append(Report(flag(0), flag(1), nothing._replace(spent=own.info.spent)))
            else:
                columns.append(Report(flag(1), flag(0), own.info))
        reports[b] = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(v) for v in x]), *columns)
        zeros = jnp.zeros(len(place), jnp.int32)
        slots[b] = Slots(
            client=jnp.asarray(drawn[place]),
            taken=zeros == 0,
            place=jnp.asarray(place, jnp.int32),
            row=zeros,
            memory=zeros,
        )
    info = joined(jnp.asarray(drawn), slots, reports, dict(figures))
    return jax.tree.map(lambda x: np.asarray(x)[None], jax.device_get(info))
