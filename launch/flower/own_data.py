"""Data that a client alone has: what the server says of them, and how the client reads its own.

    python -m jaxfm.launch.flower serve --own_rows=500 -- --data=ours.csv --data.num_clients=4 ...
    python -m jaxfm.launch.flower join --numbers=2 --data=theirs.csv --data.label=diagnosis

The server has a small file of its own. It validates and tests the model on its rows, and says by it
what rows look like (`Form`): columns, classes, and by what they were standardised. The form travels
with the app; no row of the server's does, and no row of a client's leaves it. What is wrong with a
client's data is said in the client's log alone, as such a sentence may hold a cell.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxfm import config as configs
from jaxfm import tasks
from jaxfm.data import partition
from jaxfm.data.dealing import Data, noise_like, take_public
from jaxfm.data.federation import federate, leading_size
from jaxfm.data.loading import DataSet, load
from jaxfm.data.scaling import Scale
from jaxfm.data.source import Source, class_names
from jaxfm.errors import explain
from jaxfm.federated.client import client_data
from jaxfm.federated.registry import find
from jaxfm.federated.remote.run import population_of
from jaxfm.federated.remote.site import Client
from jaxfm.federated.remote.standalone import Refusal
from jaxfm.launch.federate import ready
from jaxfm.launch.flower.join import OwnDataConfig
from jaxfm.launch.setup import DataConfig, read_data, text_tokenizer
from jaxfm.tokenizer import Tokenizer, padding_id

_KINDS = ("features", "images", "text", "language")
_UNLABELLED = ("label",)  # not among public rows
_DEALING = ("partition", "client", "weight", "writers")


class Form(NamedTuple):
    """What rows look like, without any.

    Attributes:
      leaves: names of dtypes, and shapes of one row, by name.
      classes: names of the labels, in order.
      roles: of the columns, as of `jaxfm.data.columns.Roles`, by name; {}: there are none.
      scale: as of `Scale`, as lists; {}: nothing was standardised.
      public: rows that the server sends to clients, without labels.
    """

    leaves: dict[str, tuple[str, tuple[int, ...]]]
    classes: tuple[str, ...]
    roles: dict[str, Any]
    scale: dict[str, list[float]]
    public: int

    def to_json(self) -> str:
        """As text."""
        return json.dumps(self._asdict())

    def zeros(self, size: int) -> dict[str, np.ndarray]:
        """Rows with nothing in them."""
        return {
            name: np.full((size, *shape), dtype == "bool", dtype)
            for name, (dtype, shape) in self.leaves.items()
        }


def form_of(text: str) -> Form:
    """The inverse of `Form.to_json`."""
    form = Form(**json.loads(text))
    leaves = {name: (dtype, tuple(shape)) for name, (dtype, shape) in form.leaves.items()}
    return form._replace(leaves=leaves, classes=tuple(form.classes))


def rows_of_clients(config: Any, own_rows: Sequence[int]) -> list[int]:
    """The most rows of each client.

    Args:
      config: of the run.
      own_rows: one number for all clients, or one for each, which then has exactly as many.
    Raises:
      ValueError: another number of numbers; options that deal rows out; one number where the
        algorithm, or the privacy of examples, needs to know how many rows there are.
    """
    clients = config.data.num_clients
    if len(own_rows) not in (1, clients) or min(own_rows) < 1:
        raise ValueError(
            f"own_rows={','.join(map(str, own_rows))}: give a number of rows for all clients, or "
            f"one for each of data.num_clients={clients}."
        )
    for name in _DEALING:
        if (value := getattr(config.data, name)) != DataConfig.__dataclass_fields__[name].default:
            raise ValueError(
                f"data.{name}={value}: clients with --own_rows have their own data, each row of "
                f"which weighs one; leave out --data.{name}."
            )
    if len(own_rows) == 1 and clients > 1:
        factory = find(config.algorithm).factory
        divides = "total_examples" in inspect.signature(factory).parameters
        if divides or config.examples.gradients() is not None:
            what = config.algorithm if divides else "the privacy of examples"
            raise ValueError(
                f"own_rows={own_rows[0]}: {what} needs the number of rows of each client; give "
                f"--own_rows as {clients} numbers."
            )
    return [*own_rows] if len(own_rows) == clients else [own_rows[0]] * clients


def server_data(config: Any, own_rows: Sequence[int]) -> tuple[Form, Data]:
    """What the server says of rows, and its data: its own rows validate and test the model.

    Raises:
      ValueError: as of `rows_of_clients` and `read_data`; data of another kind.
    """
    counts = rows_of_clients(config, own_rows)
    found = read_data(config.data, config.seed, config.model)
    if found.kind not in _KINDS:
        raise ValueError(
            f"own_rows: data.source={config.data.source} holds {found.kind}; clients' own data are "
            "columns of numbers, images or texts."
        )
    width = _width(config, found)
    splits = {
        name: source._replace(examples=_padded(source.examples, width, found.tokenizer))
        for name, source in found.splits.items()
    }
    rest, public = take_public(splits["train"], config.data.public, seed=config.seed)
    if config.data.synthetic:
        public = noise_like(rest.examples["image"], config.data.synthetic, seed=config.seed)
    scale = {} if found.scale is None else found.scale._asdict()
    form = Form(
        leaves={n: (x.dtype.name, x.shape[1:]) for n, x in rest.examples.items()},
        classes=class_names(splits),
        roles={} if found.roles is None else found.roles._replace(client=None)._asdict(),
        scale={name: numbers.tolist() for name, numbers in scale.items()},
        public=0 if public is None else leading_size(public),
    )
    validation = splits["validation"].examples
    joined = {n: np.concatenate([x, rest.examples[n]]) for n, x in validation.items()}
    data = stand_in(form, config, counts)
    return form, data._replace(
        validation=joined, test=splits["test"].examples, public=public, scale=found.scale
    )


def stand_in(form: Form, config: Any, counts: Sequence[int]) -> Data:
    """Data of the run's shapes with nothing in them.

    Args:
      form: of rows.
      config: of the run.
      counts: rows of each client.
    """
    tokenizer = text_tokenizer(config.data, config.model) if "tokens" in form.leaves else None
    some = form.zeros(2)
    source = Source(some, classes=form.classes)
    parts = [np.zeros(count, np.int32) for count in counts]
    parts, held = _held_out(parts, config)
    public = {n: x for n, x in form.zeros(form.public).items() if n not in _UNLABELLED}
    return Data(
        train=federate(some, parts),
        local_validation=None if held is None else federate(some, held),
        local_test=federate(some, [np.zeros(0, np.int32) for _ in counts]),
        validation=some,
        test=some,
        names=tuple(f"client {i}" for i in range(len(counts))),
        task=tasks.task_for(DataSet({"train": source}, tokenizer), masked=config.data.masked),
        tokenizer=tokenizer,
        public=public if form.public else None,
        classes=form.classes,
        scale=_scale(form),
    )


def own_client(
    form: Form, config: Any, own_rows: Sequence[int], own: OwnDataConfig, number: int
) -> Client:
    """A client that trains on its own data, for `prepare_site`.

    Args:
      form, config, own_rows: of the server.
      own: says where the client's rows are.
      number: which client it is.
    Raises:
      FileNotFoundError, ValueError: in one sentence what does not fit.
    """
    counts = rows_of_clients(config, own_rows)
    rows = read_rows(form, config, own)
    size, most = leading_size(rows), counts[number]
    if not 0 < size <= most or (len(own_rows) > 1 and size != most):
        limit = f"{most}" if len(own_rows) > 1 else f"1 to {most}"
        raise ValueError(
            f"{own.source} has {size} training rows, where the server's --own_rows says {limit}."
        )
    empty = stand_in(form, config, counts)
    parts, held = _held_out([np.arange(size, dtype=np.int32)], config)
    alone = lambda part: federate(
        rows, [part if i == number else np.zeros(0, np.int32) for i in range(len(counts))]
    )
    data = empty._replace(
        train=alone(parts[0]), local_validation=None if held is None else alone(held[0])
    )
    _, _, prepared = ready(config, empty)
    found = client_data(population_of(prepared, data), number)
    secret = config.examples.gradients() is not None
    return Client(prepared.algorithm, prepared.variables, *found, empty.public, secret)


def read_rows(form: Form, config: Any, own: OwnDataConfig) -> dict[str, np.ndarray]:
    """A client's training rows, brought to the server's form.

    Raises:
      FileNotFoundError, ValueError: as of `jaxfm.data.load`; rows of another form.
    """
    theirs = {} if own.text or own.image or own.features else form.roles
    label = "folder" if config.data.label == "folder" else form.roles.get("label")
    size = config.data.image_size
    found = load(
        own.source,
        label=own.label or label,
        text=own.text or tuple(theirs.get("text", ())),
        image=own.image or theirs.get("image"),
        features=own.features or tuple(theirs.get("features", ())),
        columns=own.columns,
        encoding=own.encoding,
        image_size=(size[0], size[1]) if size else None,
        tokenizer=text_tokenizer(config.data, config.model),
        length=config.data.length,
        standardize=_scale(form) or False,
        classes=form.classes,
        draw_splits=False,
    )
    rows = _padded(found.splits["train"].examples, _width(config, found), found.tokenizer)
    have = {name: (leaf.dtype.name, leaf.shape[1:]) for name, leaf in rows.items()}
    for name, leaf in form.leaves.items():
        if have.get(name) != leaf:
            raise ValueError(
                f"{own.source}: its rows have {_said(have)}, where the server's have "
                f"{_said(form.leaves)}."
            )
    return {name: rows[name] for name in form.leaves}


def client_of_node(
    form: Form, config: Any, own_rows: Sequence[int], file: Any, number: int
) -> Client:
    """`own_client` of a node whose config names the file that `join` has written.

    Raises:
      Refusal: what does not fit, which this process's log says.
    """
    with told_here_only(number):
        if not file:
            raise ValueError("in this run clients have data of their own; join with --data=FILE.")
        own = configs.load(OwnDataConfig, str(file))
        return own_client(form, config, own_rows, own, number)


@contextlib.contextmanager
def told_here_only(client: int) -> Iterator[None]:
    """Says in this process's log what is wrong with a client's data, and to the server only that
    something is.

    Raises:
      Refusal: in the place of what was raised.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(
            f"Client {client} does not take part: {explain(error)[0]}", file=sys.stderr, flush=True
        )
        raise Refusal("Its own data do not fit the run; its log says why.") from None


def _said(leaves: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in leaves.items())


def _scale(form: Form) -> Scale | None:
    return Scale(*(np.array(form.scale[n]) for n in Scale._fields)) if form.scale else None


def _held_out(parts: list[np.ndarray], config: Any) -> tuple[list, list | None]:
    """What clients train on, and what they hold out to validate models of their own."""
    share = config.data.local_validation
    if not share:
        return parts, None
    return partition.holdout(parts, share, seed=config.seed + 1)


def _width(config: Any, found: DataSet) -> int:
    """Tokens of every row of labelled text; 0 for other data."""
    return config.data.length if found.kind == "text" else 0


def _padded(
    examples: Mapping[str, np.ndarray], width: int, tokenizer: Tokenizer | None
) -> dict[str, np.ndarray]:
    """Rows of labelled text filled up to one length, so that all clients' are equally long."""
    rows = dict(examples)
    if width and tokenizer is not None:
        gap = ((0, 0), (0, width - rows["tokens"].shape[1]))
        rows["tokens"] = np.pad(rows["tokens"], gap, constant_values=padding_id(tokenizer))
        rows["mask"] = np.pad(rows["mask"], gap)
    return rows
