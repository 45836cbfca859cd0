"""The part of a report that shows algorithms side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxfm.report import Card, Html, heading, line_plot, row, table
from jaxfm.report.sections import LOWER_IS_BETTER

COLUMNS = {
    "global": "global model",
    "personal": "clients' own",
    "worst_decile": "worst decile",
    "megabytes": "MB",
    "hours": "simulated hours",
    "joules": "joules",
}
_AXES = {"rounds": "round", "megabytes": "MB up and down", "hours": "simulated hours"}


def plus_minus(values: Sequence[float]) -> str:
    """Mean and, of several seeds, their standard deviation (ddof = 1)."""
    if not values:
        return "–"
    mean = np.mean(values)
    if len(values) < 2:
        return f"{mean:.4g}"
    spread = float(np.std(values, ddof=1))
    spread = 0.0 if spread < 1e-9 * abs(mean) else spread  # the rounding of sums of equal figures
    return f"{mean:.4g} ± {spread:.2g}"


def best_cards(part: Mapping[str, Any], lower_is_better: bool) -> list[Card]:
    """Who comes first by each column that ranks algorithms."""
    cards = []
    for key in ("global", "personal", "worst_decile", "megabytes", "hours"):
        means = {
            name: float(np.mean(one["figures"][key]))
            for name, one in part["algorithms"].items()
            if one["figures"].get(key)
        }
        if means:
            lowest = lower_is_better or key in ("megabytes", "hours")
            first = (min if lowest else max)(means, key=lambda name: means[name])
            note = f"{means[first]:.4g}; {'lower' if lowest else 'higher'} is better"
            cards.append(Card(f"best by {COLUMNS[key]}", first, note))
    return cards


def comparison(part: Mapping[str, Any]) -> list[Html]:
    """A table of all figures; curves by round, by megabyte and by hour; clients from worst to best.

    Args:
      part: "seeds" and "algorithms", by name as `compare.summary` gives them.
    """
    algorithms = part["algorithms"]
    metric = next(iter(algorithms.values()))["metric"].replace("_", " ")
    way = "lower" if metric.replace(" ", "_") in LOWER_IS_BETTER else "higher"
    rows = [
        [name, *(plus_minus(one["figures"].get(key, [])) for key in COLUMNS)]
        for name, one in algorithms.items()
    ]
    several = f"Mean ± standard deviation of {part['seeds']} seeds. " if part["seeds"] > 1 else ""
    spread = {name: (_shares(one["clients"]), one["clients"]) for name, one in algorithms.items()}
    return [
        heading(
            "Side by side",
            f"{several}{metric.capitalize()} of the global model on the global test set, of "
            "clients' own models on their own test rows, and of the tenth served worst; "
            f"{way} is better. Where nobody holds the full model, the largest that clients train "
            "stands for the global one. Time and energy are simulated from bytes and operations.",
        ),
        table(["algorithm", *COLUMNS.values()], rows),
        heading("Clients' own models", "On rows that each client holds back from training."),
        row(*_curves(algorithms, "personal", f"clients' own {metric}")),
        heading("The global model", "Where there is one, on the server's validation rows."),
        row(*_curves(algorithms, "validation", f"global {metric}")),
        heading("Who is served how well", "Clients of all seeds, sorted by their test results."),
        line_plot(spread, x_label="share of clients, %", y_label=metric),
    ]


def _curves(algorithms: Mapping[str, Any], whose: str, y_label: str) -> list[Html]:
    """The same curves over each axis."""
    curves = {name: one["curves"][whose] for name, one in algorithms.items()}
    curves = {name: curve for name, curve in curves.items() if curve["values"]}
    return [
        line_plot(
            {name: (curve[axis], curve["values"]) for name, curve in curves.items()},
            x_label=x_label,
            y_label=y_label,
        )
        for axis, x_label in _AXES.items()
    ]


def _shares(values: Sequence[float]) -> list[float]:
    return [100 * (i + 1) / len(values) for i in range(len(values))]
