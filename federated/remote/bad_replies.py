"""Ways in which a client's reply can be wrong, to see that each is refused.

For tests and benchmarks. Each takes an honest reply and that of the client's last round, and
returns what comes in its place. Lies that look honest (small numbers of the right shapes) are not
among them: these are for robust aggregation and clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxfm.federated.remote.checking import Reply
from jaxfm.federated.remote.standalone import Wire, pack

Change = Callable[[Reply, Reply], Reply]


def _said(**changes: Any) -> Change:
    """Other values in the config; None: left out."""

    def change(reply: Reply, last: Reply) -> Reply:
        config = {**reply.config, **changes}
        return reply._replace(config={n: x for n, x in config.items() if x is not None})

    return change


def _relative(name: str, step: int) -> Change:
    return lambda reply, last: reply._replace(
        config={**reply.config, name: reply.config[name] + step}
    )


def _matrix(reply: Reply) -> str:
    """The name of an uploaded matrix."""
    return next(n for n, x in reply.wires.items() if n.startswith("upload") and len(x.shape) > 1)


def _scalar(reply: Reply) -> str:
    """The name of an uploaded weight."""
    return next(n for n, x in reply.wires.items() if n.startswith("upload") and x.shape == ())


def _figure(reply: Reply, word: str) -> str:
    return next(n for n in reply.wires if n.startswith("info") and n.endswith(word))


def _with(reply: Reply, wires: Mapping[str, Any], without: str = "") -> Reply:
    kept = {name: wire for name, wire in reply.wires.items() if name != without}
    return reply._replace(wires={**kept, **wires})


def _wire(**fields: Any) -> Change:
    """Other fields of a matrix on its way."""

    def change(reply: Reply, last: Reply) -> Reply:
        name = _matrix(reply)
        return _with(reply, {name: Wire(*_fields(reply.wires[name]))._replace(**fields)})

    return change


def _fields(wire: Any) -> tuple:
    return wire.dtype, wire.shape, wire.stype, wire.data


def _array(
    make: Callable[[np.ndarray], np.ndarray], of: Callable[[Reply], str] = _matrix
) -> Change:
    """Another array in the place of one."""

    def change(reply: Reply, last: Reply) -> Reply:
        name = of(reply)
        wire = reply.wires[name]
        array = np.frombuffer(wire.data, wire.dtype).reshape(wire.shape)
        return _with(reply, pack({name: make(array)}))

    return change


def _number(word: str, value: float) -> Change:
    """Another figure in the report."""
    return _array(lambda x: np.full_like(x, value), lambda reply: _figure(reply, word))


def _one(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def make(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[-1] = value
        return array

    return make


def _extra(reply: Reply, last: Reply) -> Reply:
    return _with(reply, pack({"upload.more": np.zeros(3, np.float32)}))


def _renamed(reply: Reply, last: Reply) -> Reply:
    name = _matrix(reply)
    return _with(reply, {name.upper(): reply.wires[name]}, without=name)


def _resized(factor: float, more: int = 0) -> Change:
    def change(reply: Reply, last: Reply) -> Reply:
        name = _matrix(reply)
        data = reply.wires[name].data
        size = int(len(data) * factor) + more
        return _wire(data=(data * (1 + size // len(data)))[:size])(reply, last)

    return change


def _many(reply: Reply, last: Reply) -> Reply:
    small = np.zeros((), np.float32)
    return _with(reply, pack({f"upload.flood[{i}]": small for i in range(10_000)}))


KINDS: dict[str, Change] = {
    "no config": lambda reply, last: reply._replace(config={}),
    "no nonce": _said(nonce=None),
    "a guessed nonce": _said(nonce="0" * 32),
    "a nonce that is a number": _said(nonce=7),
    "no run": _said(run=None),
    "another run": _said(run="f" * 32),
    "a run that is a path": _said(run="../../etc"),
    "a past round": _relative("round", -1),
    "a future round": _relative("round", 1),
    "a round that is text": _said(round="1"),
    "a round that is a fraction": _said(round=1.5),
    "a round that is true": _said(round=True),
    "no round": _said(round=None),
    "another client's name": _relative("client", 1),
    "no client": _said(client=None),
    "a word too many": _said(admin="yes"),
    "no word on faults": _said(fault=None),
    "a fault that is a number": _said(fault=1),
    "a fault of a megabyte": _said(fault="x" * 1_000_000),
    "no arrays": lambda reply, last: reply._replace(wires={}),
    "a missing leaf": lambda reply, last: _with(reply, {}, without=_matrix(reply)),
    "a missing weight": lambda reply, last: _with(reply, {}, without=_scalar(reply)),
    "a missing report": lambda reply, last: _with(reply, {}, without=_figure(reply, "examples")),
    "a leaf too many": _extra,
    "a flood of leaves": _many,
    "a leaf of another name": _renamed,
    "float64": _array(lambda x: x.astype(np.float64)),
    "float16": _array(lambda x: x.astype(np.float16)),
    "integers": _array(lambda x: x.astype(np.int32)),
    "bits read as integers": _wire(dtype="int32"),
    "an unknown dtype": _wire(dtype="float33"),
    "objects": _wire(dtype="object"),
    "a dtype that is a number": _wire(dtype=4),
    "big-endian numbers": _wire(dtype=">f4"),
    "a transposed matrix": _array(lambda x: x.T),
    "a flat matrix": _array(lambda x: x.reshape(-1)),
    "one axis more": _array(lambda x: x[None]),
    "a scalar for a matrix": _array(lambda x: x.reshape(-1)[0]),
    "a negative axis": _wire(shape=(-1, 3)),
    "a shape of terabytes": _wire(shape=(10**6, 10**7)),
    "a shape that is a list": _wire(shape=[6, 8]),
    "cut data": _resized(1, -1),
    "a byte too many": _resized(1, 1),
    "no data": _resized(0),
    "64 times the data": _resized(64),
    "data that are text": _wire(data="0" * 192),
    "a NumPy file": _wire(stype="numpy.ndarray"),
    "a pickle": _wire(stype="pickle", data=b"cposix\nsystem\n(S'true'\ntR."),
    "one NaN": _array(_one(np.nan)),
    "all NaN": _array(lambda x: np.full_like(x, np.nan)),
    "infinity": _array(_one(np.inf)),
    "minus infinity": _array(_one(-np.inf)),
    "a number that overflows the sum": _array(_one(3e38)),
    "a weight that is NaN": _array(lambda x: np.full_like(x, np.nan), _scalar),
    "negative examples": _number("examples", -5.0),
    "examples that nobody has": _number("examples", 1e6),
    "more steps than there is time for": _number("steps", 1e6),
    "negative targets": _number("loss_count", -1.0),
    "a loss that is NaN": _number("loss_total", np.nan),
    "last round's reply again": lambda reply, last: last,
    "last round's numbers and name": lambda reply, last: last._replace(
        config={**last.config, "round": reply.config["round"]}
    ),
    "an exception": lambda reply, last: Reply(reply.client, {}, {}, "<class 'ZeroDivisionError'>"),
}
