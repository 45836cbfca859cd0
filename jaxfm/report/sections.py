"""What a run's report shows of each part of its results.json, registered beside what it shows.

A script saves the part "lengths"; the module that knows its values registers how it is shown:

>>> from jaxfm.report import Card, bar_plot, heading
>>> @section("lengths", order=90, title="How long texts are")
... def lengths(part):
...     return [heading("Lengths"), bar_plot(part["bins"])]
>>> @figures("lengths")
... def length_cards(part):
...     return [Card("mean length", part["mean"], "tokens")]
>>> results = {"lengths": {"bins": {"short": 3, "long": 1}, "mean": 7.5}}
>>> page_title(results), [card.value for card in result_cards(results)]
('How long texts are', [7.5])
>>> len(result_sections(results))
2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxfm.report.page import Card
from jaxfm.report.plot import Html

Part = Mapping[str, Any]
_F = TypeVar("_F", bound=Callable)

LOWER_IS_BETTER = ("bits_per_byte", "loss")


class Section(NamedTuple):
    """How one part of the results is shown.

    Attributes:
      show: `(part) -> [Html]`.
      order: sections come in ascending order.
      title: of the page, if this is the last section that has one.
    """

    show: Callable[[Part], list[Html]]
    order: int
    title: str


_SECTIONS: dict[str, Section] = {}
_FIGURES: dict[str, Callable[[Part], list[Card]]] = {}


def section(part: str, *, order: int, title: str = "") -> Callable[[_F], _F]:
    """Returns a decorator that registers `(part) -> [Html]` for a part of results.json.

    Raises:
      ValueError: the part has a section already.
    """
    return _registrar(_SECTIONS, part, lambda show: Section(show, order, title))


def figures(part: str) -> Callable[[_F], _F]:
    """Returns a decorator that registers `(part) -> [Card]`, the key figures of a part.

    Raises:
      ValueError: the part has key figures already.
    """
    return _registrar(_FIGURES, part, lambda show: show)


def result_sections(results: Mapping[str, Part]) -> list[Html]:
    """Returns the sections of all parts that have one, in their order."""
    return [html for part, known in _present(results) for html in known.show(results[part])]


def result_cards(results: Mapping[str, Part]) -> list[Card]:
    """Returns the key figures of all parts that have some, in the order of their sections."""
    known = [part for part, _ in _present(results) if part in _FIGURES]
    return [card for part in known for card in _FIGURES[part](results[part])]


def page_title(results: Mapping[str, Part], default: str = "A run") -> str:
    """Returns the title of the last section that has one, or `default`."""
    titles = [known.title for _, known in _present(results) if known.title]
    return titles[-1] if titles else default


def main_metric(names: Sequence[str]) -> str:
    """Returns the metric that a page leads with."""
    known = ("bits_per_byte", "accuracy", "loss")
    own = names[0].rpartition("/")[2] if names else "loss"
    return next((m for m in known if any(m in n for n in names)), own)


def metric_label(metric: str) -> str:
    """Returns a metric's name as a reader wants it."""
    return metric.replace("_", " ")


def _present(results: Mapping[str, Part]) -> list[tuple[str, Section]]:
    known = [(part, _SECTIONS[part]) for part in results if part in _SECTIONS]
    return sorted(known, key=lambda pair: pair[1].order)


def _registrar(table: dict, part: str, entry: Callable) -> Callable[[_F], _F]:
    def register(show: _F) -> _F:
        if part in table:
            raise ValueError(f"The part {part!r} of results.json is registered already.")
        table[part] = entry(show)
        return show

    return register
