"""Which entries of which axes are cut together: union-find over the entries of all axes.

Every entry of an axis that might be cut carries the ids of the units that it needs: none if it is
always present, one for a plain channel, several for an axis that merges others (entry (h, k) of a
flattened [heads, head dim] is present if head h and dimension k are). An axis of n entries is an
array i64[n, m] of ids in m columns; 0 stands for "always present", and m = 0 is an axis that is
never cut. Two axes that meet in an operation are unified; a reshape that splits an axis binds its
ids to tuples of new ones. What cannot be decided is frozen, with the reason.
"""

from __future__ import annotations

import numpy as np

Axis = np.ndarray  # i64[n, m]
FROZEN = 0


def plain(size: int) -> Axis:
    """Returns an axis that is never cut."""
    return np.zeros((size, 0), np.int64)


def columns(*parts: Axis) -> Axis:
    """Returns axes concatenated, with as many columns as the widest has."""
    most = max(part.shape[1] for part in parts)
    pad = lambda part: np.pad(part, ((0, 0), (0, most - part.shape[1])))
    return np.concatenate([pad(part) for part in parts])


def merge(axes: list[Axis]) -> Axis:
    """Returns the axis of all combinations of entries; the first axis varies slowest."""
    shape = [len(axis) for axis in axes]
    spread = []
    for i, axis in enumerate(axes):
        at = [1] * len(axes)
        at[i] = shape[i]
        for column in axis.T:
            spread.append(np.broadcast_to(column.reshape(at), shape).reshape(-1))
    return np.stack(spread, 1) if spread else plain(int(np.prod(shape)))


class Labels:
    """The union-find; it grows while a graph is read."""

    def __init__(self) -> None:
        self._parent = np.zeros(1024, np.int64)
        self._size = 1  # id 0 is FROZEN
        self._bound: dict[int, tuple[int, ...]] = {}
        self._is_bound = np.zeros(1024, bool)
        self._reason: dict[int, str] = {}

    def fresh(self, size: int) -> Axis:
        """Returns an axis of new ids, i64[size, 1]."""
        first, self._size = self._size, self._size + size
        while self._size > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros_like(self._parent)])
            self._is_bound = np.concatenate([self._is_bound, np.zeros_like(self._is_bound)])
        ids = np.arange(first, self._size)
        self._parent[ids] = ids
        return ids[:, None]

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Returns the representatives of ids."""
        while True:
            up = self._parent[ids]
            if np.array_equal(up, ids):
                return ids
            ids = up

    def reason(self, ids: np.ndarray) -> str | None:
        """Returns why the first frozen id is frozen; None if none is."""
        for i in ids.reshape(-1).tolist():
            while i and self._parent[i] != i:
                if self._parent[i] == FROZEN:
                    return self._reason.get(i, "frozen")
                i = int(self._parent[i])
            for part in self._bound.get(i, ()):
                found = self.reason(np.array([part]))
                if found:
                    return found
        return None

    def resolve(self, axis: Axis) -> Axis:
        """Returns the axis in representatives; bound ids become what they are bound to."""
        axis = self.find(axis)
        while axis.size and self._is_bound[axis].any():
            axis = self.find(np.concatenate([self._expand(column) for column in axis.T], 1))
        axis = axis.copy()
        for j in range(1, axis.shape[1]):  # an id that occurs twice in a row counts once
            axis[:, j][(axis[:, :j] == axis[:, j : j + 1]).any(1)] = FROZEN
        if axis.shape[1] > 1 and (np.count_nonzero(axis, 1) <= 1).all():
            axis = axis.max(1, keepdims=True)  # one id per row fits into one column
        return axis[:, axis.any(0)]

    def balance(self, axis: Axis, blocks: int, why: str) -> bool:
        """Joins ids until each occurs equally often in all equal blocks of an axis.

        Ids that already do are left alone. The others are sorted into kinds by how often they occur
        in each block. All of them together are even; so equal shares of every kind, as many shares
        as the numbers of ids of all kinds allow, are even too, and each share becomes one id.

        Returns:
          Whether anything was joined or frozen.
        """
        axis = self.resolve(axis)
        if axis.shape[1] > 1:
            first, *rest = np.split(axis, blocks)
            for block in rest:
                self.unify(first, block, why)
        if axis.shape[1] != 1:
            return not np.array_equal(axis, self.resolve(axis))
        ids, place = np.unique(axis[:, 0], return_inverse=True)
        times = np.zeros((len(ids), blocks), np.int64)
        np.add.at(times, (place, np.arange(len(axis)) * blocks // len(axis)), 1)
        uneven = (times != times[:, :1]).any(1)
        if FROZEN in ids[uneven]:
            self.freeze(ids[uneven], why)
            return (ids[uneven] != FROZEN).any()
        _, kind, counts = np.unique(times[uneven], axis=0, return_inverse=True, return_counts=True)
        number = np.gcd.reduce(counts)
        first_of: dict[int, int] = {}
        for k in range(len(counts)):
            own = ids[uneven][kind.reshape(-1) == k]
            for i, into in zip(own.tolist(), np.arange(len(own)) * number // len(own), strict=True):
                one = first_of.setdefault(int(into), i)
                self.union(np.array([one]), np.array([i]), why)
        return bool(uneven.any())

    def _expand(self, column: np.ndarray) -> Axis:
        unique, inverse = np.unique(column, return_inverse=True)
        rows = [self._bound.get(i, (i,)) for i in unique.tolist()]
        table = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for row, ids in zip(table, rows, strict=True):
            row[: len(ids)] = ids
        return table[inverse]

    def union(self, a: np.ndarray, b: np.ndarray, why: str) -> None:
        """Joins ids pair by pair; an id that is joined with 0 is frozen."""
        pairs = np.unique(np.stack([self.find(a), self.find(b)], 1), axis=0)
        for x, y in pairs.tolist():
            low, high = sorted((self._top(x), self._top(y)))
            if low == high:
                continue
            if low == FROZEN:
                self._freeze_one(high, why)
            elif low in self._bound or high in self._bound:
                self.unify(np.array([[low]]), np.array([[high]]), why)
            else:
                self._parent[high] = low

    def _top(self, i: int) -> int:
        while self._parent[i] != i:
            i = int(self._parent[i])
        return i

    def _freeze_one(self, i: int, why: str) -> None:
        for part in self._bound.get(i, ()):
            self.freeze(np.array([part]), why)
        self._reason.setdefault(i, why)
        self._parent[i] = FROZEN
        self._bound.pop(i, None)
        self._is_bound[i] = False

    def freeze(self, ids: np.ndarray, why: str) -> None:
        """Makes all ids always present."""
        for i in np.unique(self.find(ids)).tolist():
            if self._top(i) != FROZEN:
                self._freeze_one(self._top(i), why)

    def unify(self, a: Axis, b: Axis, why: str) -> None:
        """Makes two axes of equal size one: entry i of `a` is present where entry i of `b` is."""
        a, b = self.resolve(a), self.resolve(b)
        if a.shape == b.shape and np.array_equal(a, b):
            return
        if a.shape[1] == b.shape[1] == 1:
            self.union(a[:, 0], b[:, 0], why)
            return
        pairs, rest_a, rest_b = _match(a, b)
        for i, j in pairs:
            self.union(a[:, i], b[:, j], why)
        if len(rest_a) == 1 and rest_b and self._bind(a[:, rest_a[0]], b[:, rest_b]):
            return
        if len(rest_b) == 1 and rest_a and self._bind(b[:, rest_b[0]], a[:, rest_a]):
            return
        self.freeze(a[:, rest_a], why)
        self.freeze(b[:, rest_b], why)

    def _bind(self, column: np.ndarray, others: Axis) -> bool:
        """Binds each id of a column to the ids of its row; returns False where rows differ."""
        column, others = self.find(column), self.find(others)
        unique, first = np.unique(column, return_index=True)
        lookup = np.searchsorted(unique, column)
        if FROZEN in unique or not np.array_equal(others[first][lookup], others):
            return False
        if np.isin(others, unique).any() or self._is_bound[unique].any():
            return False
        for i, row in zip(unique.tolist(), others[first].tolist(), strict=True):
            ids = tuple(dict.fromkeys(x for x in row if x != FROZEN))
            if len(ids) > 1:
                self._bound[i], self._is_bound[i] = ids, True
            else:
                self.union(
                    np.array([i]), np.array([ids[0] if ids else FROZEN]), "it is always present"
                )
        return True

    def split(self, axis: Axis, shape: list[int], why: str) -> list[Axis]:
        """Returns the axes of a reshape of one axis to `shape`."""
        out: list[list[np.ndarray]] = [[] for _ in shape]
        for column in self.resolve(axis).T:
            grid = column.reshape(shape)
            varies = [d for d, n in enumerate(shape) if n > 1 and (grid != grid.take([0], d)).any()]
            if not varies:
                self.freeze(column, why)
                continue
            at = tuple(slice(None) if d in varies else 0 for d in range(len(shape)))
            own = grid[at]
            if len(varies) == 1:
                out[varies[0]].append(own)
                continue
            ids = own.reshape(-1)
            if FROZEN in ids or len(np.unique(ids)) < len(ids):
                self.freeze(ids, why)
                continue
            parts = [self.fresh(shape[d]) for d in varies]
            self._bind(ids, merge(parts))
            for d, part in zip(varies, parts, strict=True):
                out[d].append(part[:, 0])
        return [np.stack(c, 1) if c else plain(n) for c, n in zip(out, shape, strict=True)]


def _match(a: Axis, b: Axis) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Returns pairs of columns that distinguish the same entries, and the columns left over."""
    pattern = lambda column: np.unique(column, return_index=True, return_inverse=True)[1:]

    def same(i: int, j: int) -> bool:
        (first, inverse), (other, inverse_b) = pattern(a[:, i]), pattern(b[:, j])
        return np.array_equal(first[inverse], other[inverse_b])

    pairs: list[tuple[int, int]] = []
    rest_a, rest_b = list(range(a.shape[1])), list(range(b.shape[1]))
    for alike in (lambda i, j: np.array_equal(a[:, i], b[:, j]), same):
        for i in list(rest_a):
            j = next((j for j in rest_b if alike(i, j)), None)
            if j is not None:
                pairs.append((i, j))
                rest_a.remove(i)
                rest_b.remove(j)
    return pairs, rest_a, rest_b
