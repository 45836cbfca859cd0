"""The tasks as records: data, splits, metric, trivial baselines, verifier.

A record says how items become examples and with which trivial baselines every figure must stand;
one without a baseline does not register. Splits are made by the generator's own classes, and rows
that another split holds in the same normal form are left out, so nothing is seen twice. Each module
here holds the tasks of one kind and registers them.
"""

from jaxfm.tasks.hpc.records import cost, language, pragma, race, similarity, translation, tuning
from jaxfm.tasks.hpc.records.contract import (
    SPLITS,
    UNSEEN_FAMILIES,
    Baseline,
    Example,
    Record,
    drawn,
    fresh,
    names,
    record,
    register,
    splits,
)

__all__ = [
    "SPLITS", "UNSEEN_FAMILIES", "Baseline", "Example", "Record", "cost", "drawn", "fresh",
    "language", "names", "pragma", "race", "record", "register", "similarity",
    "splits", "translation", "tuning",
]  # fmt: skip
