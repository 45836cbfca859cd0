"""Whose each row of a table is: by a column, a file or a mapping."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxfm.data.columns import Roles
from jaxfm.data.folders import read_path
from jaxfm.data.tables import Table, names_of
from jaxfm.errors import naming

Client = str | Path | Mapping[str, Any] | Sequence[Any]


def owners(
    table: Table, roles: Roles, client: Client | None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Returns the owner of each row, a number i32[N] or -1 for none, and the owners' names, sorted.

    Args:
      table: the rows.
      roles: says the column of the owners, where `client` is None.
      client: a sequence of one owner for each row; a mapping from owners to lists of row numbers
        (from 0); a mapping from files, as the table names them, to owners; or a file that holds one
        of these: JSON, or a table with a column "client" and, for some rows only, a column "file".
    Raises:
      ValueError: too few or too many owners, rows or files that do not exist, rows of two owners.
    """
    if client is None:
        if roles.client is None:
            return None, ()
        keys = list(table.columns[roles.client])
        for row, key in enumerate(keys):
            if key is None or str(key) == "":
                raise table.fault(roles.client, row, "the client is missing.")
            if isinstance(key, list | dict | np.ndarray):
                raise table.fault(roles.client, row, f"{key!r:.40} is not a client's name.")
        return _numbered(keys)
    if isinstance(client, str | Path):
        with naming(client):
            return owners(table, roles, _read(table, Path(client)))
    if not isinstance(client, Mapping):
        if not isinstance(client, Sequence | np.ndarray):
            raise TypeError(f"client={client!r} is no column, file, mapping or sequence of owners.")
        if len(client) != table.size:
            raise ValueError(
                f"{len(client)} clients are given for {table.size} rows; give one each."
            )
        return _numbered(client)
    if client and all(isinstance(rows, list | tuple | np.ndarray) for rows in client.values()):
        return _numbered(_by_rows(client, table.size))
    return _numbered(_by_file(client, table, roles))


def _numbered(keys: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns owners as numbers, sorted by value (numbers) or by name; None is nobody."""
    known = {key for key in keys if key is not None}
    try:
        names = sorted(known)
    except TypeError:
        names = sorted(known, key=str)
    place = {name: number for number, name in enumerate(names)}
    return np.array([place.get(key, -1) for key in keys], np.int32), tuple(map(str, names))


def _read(table: Table, path: Path) -> Client:
    """Returns what a file says of clients."""
    if not path.is_file():
        raise ValueError(
            f"client={str(path)!r} is neither a file nor a column of {table.origin}, which has "
            f"{names_of(table.columns)}."
        )
    if path.suffix == ".json":
        try:
            value = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}.") from error
        if not isinstance(value, dict | list):
            raise ValueError(f"{path} should hold a list or an object of clients; found {value!r}.")
        if isinstance(value, dict) or (value and not isinstance(value[0], dict)):
            return value
    found = read_path(path)
    if "client" not in found.columns:
        raise ValueError(f"{path} has no column 'client', only {names_of(found.columns)}.")
    if "file" in found.columns:
        return dict(zip(found.columns["file"], found.columns["client"]))
    return list(found.columns["client"])


def _by_rows(client: Mapping[str, Any], size: int) -> list[Any]:
    owner: list[Any] = [None] * size
    for name, rows in client.items():
        for row in rows:
            if (
                isinstance(row, bool)
                or not isinstance(row, int | np.integer)
                or not 0 <= row < size
            ):
                raise ValueError(f"Client {name!r}: row {row!r} is not in 0..{size - 1}.")
            if owner[row] is not None:
                raise ValueError(f"Row {row} belongs to two clients, {owner[row]!r} and {name!r}.")
            owner[row] = name
    return owner


def _by_file(client: Mapping[str, Any], table: Table, roles: Roles) -> list[Any]:
    column = "file" if "file" in table.columns else roles.image
    if column is None:
        raise ValueError(
            f"{table.origin} names no files that clients could be mapped to; give lists of rows, "
            "{client: [row, ...]}."
        )
    files = [str(cell) for cell in table.columns[column]]
    if unknown := sorted(set(client) - set(files)):
        raise ValueError(
            f"The clients' file {unknown[0]!r} is none of the data's, as {files[0]!r}."
        )
    return [client.get(file) for file in files]
