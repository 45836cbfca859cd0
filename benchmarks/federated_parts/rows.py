"""The rows of the table: algorithms of the registry, with their options and what is around them.

A registered algorithm without a row here gets one with its default options, unless it is a variant
of another one (`Entry.like`) or needs public data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxfm.federated import Algorithm, Setting, nothing
from jaxfm.federated.preparation import make_tiers
from jaxfm.federated.registry import Entry, entries, find, make
from jaxfm.federated.wrappers.compression import named_compression
from jaxfm.subnet import axis_sizes

LOW_RATIOS = (1.0, 0.5, 0.25)  # widths of the tiers of `raffm_low`
QUICK = ("fed_avg", "scaffold", "raffm", "adp", "spatl", "spatl_topk8")


class Row(NamedTuple):
    """An algorithm of the registry, and how it is run.

    Attributes:
      algorithm: its name in the registry, or the path of a .py file that registers it.
      options: of the algorithm, by name; others keep their defaults.
      wrap: what is around it, such as compression; None: nothing.
      supply: by parameter, `(setting) -> value`, in place of what the registry supplies.
    """

    algorithm: str
    options: Mapping[str, Any] = {}
    wrap: Callable[[Algorithm], Algorithm] | None = None
    supply: Mapping[str, Callable[[Setting], Any]] = {}

    def make(self, setting: Setting) -> Algorithm:
        """The algorithm for a run."""
        entry = find(self.algorithm)
        entry = entry._replace(supply={**entry.supply, **self.supply})
        algorithm = make(entry, setting, self.options)
        return algorithm if self.wrap is None else self.wrap(algorithm)


def listed_rows(keep: float) -> dict[str, Row]:
    """The rows with options or wrappers of their own, and variants that are worth a row.

    Args:
      keep: the share of the multiply-adds that the clients of SPATL and ADP keep.
    """
    topk8 = functools.partial(named_compression, upload="top_k")
    narrow = functools.partial(named_compression, upload="8bit", download="8bit")
    own = {"keep": keep}
    shared = Row("spatl", own, supply={"is_personal": lambda setting: nothing})
    return {
        "fed_avg": Row("fed_avg"),
        "fed_avg_topk8": Row("fed_avg", wrap=topk8),
        "fed_avg_4bit": Row("fed_avg", wrap=functools.partial(named_compression, upload="4bit")),
        "fed_prox": Row("fed_prox", {"mu": 0.01}),
        "fed_adam": Row("fed_adam", {"learning_rate": 0.01}),
        "fed_nova": Row("fed_nova"),
        "fed_dyn": Row("fed_dyn", {"alpha": 0.1}),
        "scaffold": Row("scaffold"),
        "fed_per": Row("fed_per"),
        "lg_fed_avg": Row("lg_fed_avg"),
        "hetero_fl": Row("hetero_fl"),
        "hetero_fl_scaled": Row("hetero_fl", {"scaler": True}),
        "fed_rolex": Row("fed_rolex"),
        "raffm": Row("raffm", {"distill": 0.5}),
        "raffm_low": Row("raffm", {"distill": 0.5}, supply={"tiers": _low_tiers}),
        "adp": Row("adp", own),
        "adp_federated": Row("adp", own | {"federated_gates": True}),
        "spatl": shared,
        "spatl_once": shared._replace(options=own | {"select_times": 1}),
        "spatl_topk8": shared._replace(wrap=topk8),
        "spatl_narrow": shared._replace(wrap=narrow),
        "fed_avg_narrow": Row("fed_avg", wrap=narrow),
        "spatl_personal": Row("spatl", own),
        "spatl_personal_narrow": Row("spatl", own, wrap=narrow),
    }


def choose_rows(
    setting: Setting, *, keep: float, only: Sequence[str] = (), quick: bool = False
) -> dict[str, Row]:
    """The rows of a run by name, FedAvg first.

    Args:
      setting: of the run.
      keep: as of `listed_rows`.
      only: the names of rows, or of registered algorithms, beside FedAvg; (): all rows.
      quick: of all rows, only a few.
    Raises:
      ValueError: a name that is neither.
    """
    listed, registered = listed_rows(keep), entries()
    if only:
        known = {**dict.fromkeys(registered), **listed}
        unknown = sorted(name for name in set(only) - known.keys() if not name.endswith(".py"))
        if unknown:
            raise ValueError(f"only={unknown} are unknown; choose of {', '.join(sorted(known))}.")
        names = dict.fromkeys(("fed_avg", *only))
        return {name: listed.get(name, Row(name)) for name in names}
    if quick:
        return {name: listed[name] for name in QUICK}
    seen = {row.algorithm for row in listed.values()}
    others = [entry for entry in registered.values() if entry.name not in seen]
    return listed | {e.name: Row(e.name) for e in others if _stands_alone(e, setting)}


def _stands_alone(entry: Entry, setting: Setting) -> bool:
    """Whether an algorithm is no variant of another one, and runs without public data."""
    if entry.like is not None:
        return False
    unlabelled = {name: leaf for name, leaf in setting.some.items() if name != "label"}
    return not make(entry, setting._replace(public=unlabelled)).needs_public


def _low_tiers(setting: Setting) -> Any:
    """Tiers of the narrow widths that `LOW_RATIOS` names."""
    sizes = axis_sizes(setting.variables, setting.model.axes)
    return make_tiers(sizes, setting.axes, LOW_RATIOS)
