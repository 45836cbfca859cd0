"""The curves of a run's metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping

from jaxfm.report import Card, Html, heading, line_plot, row
from jaxfm.report.sections import main_metric, metric_label


def training(metrics: list[dict], results: Mapping) -> list[Html]:
    """Shows the validation metric by step, and of a federated run by bytes and by time as well."""
    shown = ("validation", "personal/")
    names = {name for line in metrics for name in line if name.startswith(shown)}
    steps = "round" if any("clients/reported" in line for line in metrics) else "step"
    curves_loss = {"training loss": _curve(metrics, "step", "train/loss")}
    parts = [heading("Training")]
    if not names:
        return [*parts, line_plot(curves_loss, x_label=steps, y_label="nats")]
    metric = main_metric(sorted(names))
    y_label = f"validation {metric_label(metric)}"
    part = results.get("federate", {})
    label = lambda name: _tier_name(name, metric, part.get("tiers", []), part.get("scored") or 0)
    chosen = sorted(name for name in names if name.endswith(metric))
    by_step = {label(n): _curve(metrics, "step", n) for n in chosen}
    plots = [line_plot(by_step, x_label=steps, y_label=y_label)]
    if steps == "round":
        by_bytes = {label(n): _curve(metrics, "total/bytes_up", n, 1e-6) for n in chosen}
        plots.append(line_plot(by_bytes, x_label="MB uploaded", y_label=y_label))
        if any("total/seconds" in line for line in metrics):
            by_time = {label(n): _curve(metrics, "total/seconds", n, 1 / 3600) for n in chosen}
            plots.append(line_plot(by_time, x_label="simulated hours", y_label=y_label))
    else:
        plots.append(line_plot(curves_loss, x_label=steps, y_label="training loss, nats"))
    return [*parts, row(*plots)]


def training_figures(metrics: list[dict]) -> list[Card]:
    """Returns the main metric as it was last measured."""
    last = {name: value for line in metrics for name, value in line.items()}
    shown = [name for name in last if name.startswith(("validation/", "test/"))]
    if not shown:
        return []
    metric = main_metric(shown)
    return [Card(metric_label(metric), last.get(f"validation/{metric}"), "validation split")]


def _tier_name(name: str, metric: str, tiers: list[dict], first: int) -> str:
    if name.startswith("personal/"):
        return "clients' own, on their own rows"
    middle = name.removeprefix("validation").removesuffix(metric).strip("/")
    if len(tiers) < 2:
        return "model"
    number = int(middle.removeprefix("bucket") or first)
    return f"{tiers[number]['parameters'] / 1e3:,.0f}k parameters"


def _curve(metrics: list[dict], x: str, y: str, scale: float = 1.0):
    points = [(line[x] * scale, line[y]) for line in metrics if x in line and y in line]
    return [p[0] for p in points], [p[1] for p in points]
