"""A run's report: one self-contained HTML file, readable in light and dark, without a network.

    page = Report(
        "Federated language model",
        "24 clients, three widths, 60 rounds",
        (
            cards([Card("bits per byte", 3.02, "held-out code")]),
            heading("Training", "Each client trains the widest subnet that it can afford."),
            row(
                line_plot({"full": (rounds, bits)}, x_label="round", y_label="bits per byte"),
                bar_plot({"ours": 12.0, "full-model FedAvg": 30.5}, unit="MB"),
            ),
            table(["decoder", "tokens/s"], [["plain", 310.0], ["speculative", 520.0]],
                  best={"tokens/s": max}),
            text_panel([("def ", ""), ("forward", "accepted")], {"accepted": "drafted, accepted"}),
            json_panel("Config", to_dict(config)),
        ),
    )
    write(page, "runs/demo/report.html")

All text is escaped. Parts are plain functions from values to `Html`.
"""

from __future__ import annotations

import html
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxfm.report.plot import NUM_COLORS, Html, show
from jaxfm.report.style import STYLE


class Report(NamedTuple):
    """A page: its head and its parts from top to bottom."""

    title: str
    subtitle: str
    parts: tuple[Html, ...]


class Card(NamedTuple):
    """A key figure."""

    label: str
    value: Any  # a number or a text
    note: str = ""


def heading(text: str, explanation: str = "") -> Html:
    """Returns the head of a section, and what the reader should know before looking."""
    return Html(f"<h2>{html.escape(text)}</h2>" + (paragraph(explanation) if explanation else ""))


def paragraph(text: str) -> Html:
    """Returns a paragraph of running text."""
    return Html(f"<p>{html.escape(text)}</p>")


def row(*parts: Html) -> Html:
    """Returns parts side by side where the window is wide enough."""
    return Html(f'<div class="row">{"".join(parts)}</div>')


def cards(figures: Iterable[Card]) -> Html:
    """Returns key figures in large type."""
    items = [
        f'<div class="card"><div class="name">{html.escape(card.label)}</div>'
        f'<div class="value">{html.escape(show(card.value))}</div>'
        f'<div class="note">{html.escape(card.note)}</div></div>'
        for card in figures
    ]
    return Html(f'<div class="cards">{"".join(items)}</div>')


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    best: Mapping[str, Callable] | None = None,
    title: str = "",
) -> Html:
    """Returns a table; `best={"loss": min}` marks the best number of a column.

    Raises:
      ValueError: a row of another length than columns, or a name in `best` that is no column.
    """
    best = best or {}
    for name in best:
        if name not in columns:
            raise ValueError(f"best names {name!r}; the columns are {', '.join(columns)}.")
    for cells in rows:
        if len(cells) != len(columns):
            raise ValueError(f"The row {list(cells)} has {len(cells)} of {len(columns)} cells.")
    by_column = [[cells[i] for cells in rows] for i in range(len(columns))]
    marks = {
        i: best[name]([cell for cell in by_column[i] if _is_number(cell)])
        for i, name in enumerate(columns)
        if name in best and any(map(_is_number, by_column[i]))
    }
    # A column of figures is set flush right, head included.
    right = [any(map(_is_number, column)) for column in by_column]
    head = "".join(
        f"<th{' class=num' if flush else ''}>{html.escape(name)}</th>"
        for name, flush in zip(columns, right)
    )
    texts = list(zip(*(_texts(column) for column in by_column)))
    body = "".join(
        "<tr>"
        + "".join(
            _cell(text, right[i], _is_number(cell) and cell == marks.get(i))
            for i, (cell, text) in enumerate(zip(cells, line))
        )
        + "</tr>"
        for cells, line in zip(rows, texts)
    )
    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    return Html(
        f'<div class="panel scroll"><table>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def text_panel(
    spans: Iterable[tuple[str, str]],
    legend: Mapping[str, str] | None = None,
    *,
    title: str = "",
) -> Html:
    """Returns text or code in a fixed-width face, parts of it coloured by kind.

    Args:
      spans: (text, kind) one after the other; kind "" is plain.
      legend: kind -> what it means; its order gives the colours.
    Raises:
      ValueError: a span's kind is not in the legend.
    """
    legend = legend or {}
    colors = {kind: f"c{i % NUM_COLORS}" for i, kind in enumerate(legend)}
    pieces = []
    for text, kind in spans:
        if kind and kind not in colors:
            raise ValueError(
                f"The legend has no {kind!r}; it has {', '.join(legend) or 'nothing'}."
            )
        text = html.escape(text)
        pieces.append(f'<mark class="{colors[kind]}">{text}</mark>' if kind else text)
    chips = "".join(
        f'<span class="chip"><mark class="{colors[kind]}"></mark>{html.escape(meaning)}</span>'
        for kind, meaning in legend.items()
    )
    caption = f"<figcaption>{html.escape(title)}</figcaption>" if title else ""
    chips = f'<div class="legend">{chips}</div>' if chips else ""
    # The first line break after <pre> is dropped by browsers, so one is given.
    return Html(f'<figure class="panel">{caption}{chips}<pre>\n{"".join(pieces)}</pre></figure>')


def json_panel(title: str, values: Any) -> Html:
    """Returns JSON values, folded until clicked."""
    text = html.escape(json.dumps(values, indent=2, ensure_ascii=False))
    summary = f"<summary>{html.escape(title)}</summary>"
    return Html(f'<details class="panel">{summary}<pre>\n{text}</pre></details>')


def render(report: Report) -> str:
    """Returns the page as HTML text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{html.escape(report.title)}</h1>"
        f'<p class="subtitle">{html.escape(report.subtitle)}</p></header>\n<main>\n'
        + "\n".join(report.parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def write(report: Report, path: str | os.PathLike[str]) -> None:
    """Writes the page in one step, so that a browser never sees half of it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(render(report), encoding="utf-8")
    part.replace(path)


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool) and cell == cell


def _texts(column: Sequence[Any]) -> list[str]:
    """Returns the cells of a column as text; fractions of like size get equally many decimals."""
    numbers = [abs(cell) for cell in column if _is_number(cell)]
    sizes = [number for number in numbers if number]
    uneven = not sizes or min(sizes) < max(sizes) / 100 or math.isinf(max(sizes))
    if uneven or all(number == int(number) for number in numbers):
        return [show(cell) for cell in column]
    decimals = max(0, 2 - math.floor(math.log10(max(sizes))))
    return [f"{cell:,.{decimals}f}" if _is_number(cell) else show(cell) for cell in column]


def _cell(text: str, is_right: bool, is_best: bool) -> str:
    classes = ["num"] * is_right + ["best"] * is_best
    attribute = f' class="{" ".join(classes)}"' if classes else ""
    return f"<td{attribute}>{html.escape(text)}</td>"
