"""Line and bar plots as inline SVG, coloured by the page's CSS, so they follow light and dark.

The page defines the classes: `axis`, `grid`, `series c0` ... `c5`, `bar`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import NewType

Html = NewType("Html", str)

NUM_COLORS = 6  # colours repeat after these, with dashes

_WIDTH, _HEIGHT = 560, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 14, 50
_CHARACTER = 8.0  # width of a character, at most, in the unit of the picture
_TICK_CHARACTERS = 6  # that fit between the label of the vertical axis and the axis
_THOUSANDS = ("", "k", "M", "G", "T", "P", "E")


def show(value: object) -> str:
    """Returns a number for readers: 12,345, 0.123, 1.2e-05; a dash for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _tick(value: float) -> str:
    """As `show`, and in thousands, millions or more where that would not fit beside the axis."""
    text = show(value)
    if len(text) <= _TICK_CHARACTERS or abs(value) < 1000:
        return text
    power = int(math.log10(abs(value)) + 1e-9) // 3
    if power >= len(_THOUSANDS):
        return f"{value:.0e}"
    return f"{value / 1000**power:.4g}{_THOUSANDS[power]}"


def line_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> Html:
    """Draws curves over one pair of axes, a legend above them, values on hovering.

    Args:
      series: name -> (xs, ys). What is not finite, and what is not positive on a logarithmic
        axis, leaves a gap.
    Raises:
      ValueError: xs and ys of a curve differ in length; it names the curve.
    """
    curves = {}
    for name, (xs, ys) in series.items():
        if len(xs) != len(ys):
            raise ValueError(f"The curve {name!r} has {len(xs)} x values and {len(ys)} y values.")
        curves[name] = [
            (_placeable(x, log_x), _placeable(y, log_y))
            for x, y in zip(map(float, xs), map(float, ys))
        ]
    points = [
        (x, y) for curve in curves.values() for x, y in curve if x is not None and y is not None
    ]
    if not points:
        return _figure(
            title, "", f'<p class="empty">Nothing to plot for {html.escape(y_label)}.</p>'
        )
    x_axis = _Axis([x for x, _ in points], log_x, _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis([y for _, y in points], log_y, _HEIGHT - _BOTTOM, _TOP)
    on_log = lambda label, log: f"{label} (log scale)" if log else label
    parts = _axes(x_axis, y_axis, on_log(x_label, log_x), on_log(y_label, log_y))
    for i, (name, curve) in enumerate(curves.items()):
        parts.append(_curve(name, curve, x_axis, y_axis, _color(i)))
    return _figure(title, _legend(curves), _svg(parts, f"{y_label} by {x_label}"))


def bar_plot(values: Mapping[str, float], *, unit: str = "", title: str = "") -> Html:
    """Draws horizontal bars from zero, each with its name and value.

    Raises:
      ValueError: a value is negative or not finite; it names the bar.
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"The bar {name!r} is {value}: bars show finite values from 0.")
    largest = max(values.values(), default=0.0) or 1.0
    rows = [
        f'<div class="barname">{html.escape(name)}</div><div class="bartrack">'
        f'<div class="bar c{i % NUM_COLORS}" style="width:{max(100 * value / largest, 0.4):.2f}%">'
        f'</div></div><div class="barvalue">{html.escape(f"{show(value)} {unit}".strip())}</div>'
        for i, (name, value) in enumerate(values.items())
    ]
    return _figure(title, "", f'<div class="bars">{"".join(rows)}</div>')


def grid_plot(
    rows: Mapping[str, Sequence[int]], kinds: Mapping[int, str], *, x_label: str, title: str = ""
) -> Html:
    """Draws a row of cells for each name, coloured by kind: who did what when.

    Args:
      rows: name -> kind of each cell.
      kinds: kind -> what it means; its order gives the colours. Other kinds stay blank.
    """
    columns = max((len(cells) for cells in rows.values()), default=0)
    if not columns:
        return _figure(
            title, "", f'<p class="empty">Nothing to plot by {html.escape(x_label)}.</p>'
        )
    width = max(_WIDTH - _LEFT - _RIGHT, 6 * columns) / columns
    bottom = _TOP + _ROW * len(rows)
    colors = {kind: _color(i) for i, kind in enumerate(kinds)}
    parts = []
    for i, (name, cells) in enumerate(rows.items()):
        y = _TOP + _ROW * i
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + _ROW / 2 + 4:.1f}" text-anchor="end">'
            f"{html.escape(name)}</text>"
        )
        # Equal neighbours are one box: a long run has few of them.
        start = 0
        for end in range(1, len(cells) + 1):
            if end < len(cells) and cells[end] == cells[start]:
                continue
            if cells[start] in kinds:
                tip = html.escape(f"{name}: {kinds[cells[start]]}, {x_label} {start} to {end - 1}")
                parts.append(
                    f'<rect class="cell {colors[cells[start]]}" x="{_LEFT + start * width:.1f}" '
                    f'y="{y + 2}" width="{(end - start) * width - 1:.1f}" height="{_ROW - 4}">'
                    f"<title>{tip}</title></rect>"
                )
            start = end
    step = max(1, round(_nice_step(columns / 10)))
    for tick in range(0, columns + 1, step):
        x = _LEFT + tick * width
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick}</text>')
    whole, height = _LEFT + columns * width + _RIGHT, bottom + 40
    parts.append(
        f'<text class="label" x="{whole / 2:.0f}" y="{height - 4}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
    )
    svg = (
        f'<svg viewBox="0 0 {whole:.0f} {height}" style="min-width:{whole:.0f}px" role="img" '
        f'aria-label="{html.escape(title or x_label)}">{"".join(parts)}</svg>'
    )
    return _figure(
        title,
        _legend(dict.fromkeys(kinds.values())),
        f'<div class="wide">{svg}</div>',
    )


_ROW = 26


class _Axis:
    """Where the values of one axis lie, in pixels, and its ticks."""

    def __init__(self, values: Sequence[float], log: bool, start: float, end: float):
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12 * max(abs(low), abs(high), 1e-30):
            half = 0.5 if log or low == 0 else abs(low) / 2
            low, high = low - half, high + half
        self.log, self.start, self.end = log, start, end
        step = _nice_step((high - low) / 6)
        decades = log and high - low >= 2
        if decades:
            step = max(1.0, round((high - low) / 6))
        low, high = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
        self.low, self.high = low, high
        marks = [low + i * step for i in range(round((high - low) / step) + 1)]
        self.ticks = [10**mark for mark in marks] if log else [round(mark, 12) for mark in marks]

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _nice_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * 0.999)


def _placeable(value: float, log: bool) -> float | None:
    return value if math.isfinite(value) and (value > 0 or not log) else None


def _color(i: int) -> str:
    return f"c{i % NUM_COLORS}" + (" dashed" if i // NUM_COLORS % 2 else "")


def _axes(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> list[str]:
    bottom, middle = _HEIGHT - _BOTTOM, (_LEFT + _WIDTH - _RIGHT) / 2
    parts = []
    for tick in y_axis.ticks:
        y = y_axis(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick)}</text>'
        )
    for tick in x_axis.ticks:
        x = x_axis(tick)
        text = _tick(tick)
        # Half of it lies right of its tick, and nothing may lie right of the picture.
        at = min(x, _WIDTH - _CHARACTER * len(text) / 2)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        )
        parts.append(f'<text x="{at:.1f}" y="{bottom + 20}" text-anchor="middle">{text}</text>')
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    )
    parts.append(
        f'<text class="label" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle"'
        f"{_squeezed(x_label, _WIDTH - _LEFT - _RIGHT)}>"
        f"{html.escape(x_label)}</text>"
    )
    center = (_TOP + bottom) / 2
    parts.append(
        f'<text class="label" transform="translate(14 {center}) rotate(-90)" text-anchor="middle"'
        f"{_squeezed(y_label, bottom - _TOP)}>"
        f"{html.escape(y_label)}</text>"
    )
    return parts


def _squeezed(label: str, room: float) -> str:
    """The attributes that fit a label into its room, where it would be cut off."""
    fits = _CHARACTER * len(label) <= room
    return "" if fits else f' textLength="{room:.0f}" lengthAdjust="spacingAndGlyphs"'


def _curve(name: str, curve: Sequence, x_axis: _Axis, y_axis: _Axis, color: str) -> str:
    """Draws a path that breaks at gaps, and a spot to hover on for each point."""
    path, spots, pen_is_down = [], [], False
    for x, y in curve:
        if x is None or y is None:
            pen_is_down = False
            continue
        px, py = x_axis(x), y_axis(y)
        path.append(f"{'L' if pen_is_down else 'M'}{px:.1f} {py:.1f}")
        pen_is_down = True
        tip = html.escape(f"{name}: {show(y)} at {show(x)}")
        spots.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>{tip}</title></circle>')
    few = " few" if len(curve) <= 24 else ""  # few enough for their points to be shown
    return f'<g class="series {color}{few}"><path d="{"".join(path)}"/>{"".join(spots)}</g>'


def _legend(names: Mapping[str, object]) -> str:
    if len(names) < 2 and "" in names:
        return ""
    chips = [
        f'<span class="chip"><i class="swatch {_color(i)}"></i>{html.escape(name)}</span>'
        for i, name in enumerate(names)
    ]
    return f'<div class="legend">{"".join(chips)}</div>'


def _svg(parts: Sequence[str], description: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(description)}">'
        f"{''.join(parts)}</svg>"
    )


def _figure(title: str, legend: str, body: str) -> Html:
    caption = f"<figcaption>{html.escape(title)}</figcaption>" if title else ""
    return Html(f'<figure class="panel">{caption}{legend}{body}</figure>')
