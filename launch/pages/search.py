"""The reports of a search and of a supernet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxfm.report import Card, Html, bar_plot, heading, line_plot, row, table
from jaxfm.report.sections import (
    LOWER_IS_BETTER,
    figures,
    main_metric,
    metric_label,
    section,
)


@section("search", order=50, title="A model cut to a budget")
def search(part: Mapping) -> list[Html]:
    """Shows a search: before and after, the ratio of each group, the curve, all candidates."""
    metric = main_metric(list(part["dense"]))
    stages = [["dense", part["dense"][metric]]]
    stages += [[stage, values[metric]] for stage, values in part["stages"].items()]
    best = min if metric in LOWER_IS_BETTER else max
    costs = [[metric_label(n), b, a, f"{a / b:.1%}"] for n, (b, a) in part["costs"].items()]
    speed = [[n, 1e3 * b, 1e3 * a, f"{b / a:.2f}x"] for n, (b, a) in part["latency_s"].items()]
    # Candidates fill their budget: what differs among them is the other cost.
    spread = lambda cost: max(part[cost]) - min(part[cost])
    other = max((cost for cost in ("macs", "parameters") if cost in part), key=spread)
    scored = [(m, s) for m, s in zip(part[other], part["scores"]) if s == s]
    steps = list(range(1, len(part["curve"]) + 1))
    return [
        heading("Before and after", "Test rows that neither training nor the search has seen."),
        row(
            table(["stage", metric_label(metric)], stages, best={metric_label(metric): best}),
            table(["cost of one example", "dense", "pruned", "left"], costs),
            table(["latency, ms", "dense", "pruned", "speed-up"], speed),
        ),
        heading("What each group keeps"),
        bar_plot({name: 100 * ratio for name, ratio in part["ratios"].items()}, unit="%"),
        heading("The search", f"{part['strategy']}, {part['seconds']:.0f} seconds."),
        row(
            line_plot({"best so far": (steps, part["curve"])}, x_label="candidates",
                      y_label="reward", title="Search curve"),
            line_plot({"front": _front(scored)}, x_label=f"{metric_label(other)}, share of dense",
                      y_label="reward", title="Pareto front of all candidates"),
        ),
    ]  # fmt: skip


@figures("search")
def search_figures(part: Mapping) -> list[Card]:
    """Returns the main metric of the pruned model, its cost and its speed."""
    metric = main_metric(list(part["dense"]))
    last = list(part["stages"].values())[-1]
    dense_macs, macs = part["costs"]["macs"]
    dense_s, seconds = part["latency_s"]["batch 32"]
    return [
        Card(metric_label(metric), last[metric], f"dense {part['dense'][metric]:.4f}"),
        Card("multiply-adds", f"{macs / dense_macs:.1%}", "of the dense model's"),
        Card("speed-up", f"{dense_s / seconds:.2f}x", "a batch of 32, measured"),
    ]


@section("supernet", order=60, title="A network for every device")
def supernet(part: Mapping) -> list[Html]:
    """Shows the members of all budgets, and the scores that the predictor learned from."""
    metric, cost = main_metric(list(part["dense"])), part["cost"]
    label = metric_label(metric)
    members = part["members"]
    columns = [f"{cost}, at most", "kept", "evolved", "same share of everything", "chosen"]
    rows = [
        [f"{m['share']:.0%}", f"{m['kept']:.1%}", m["test"]["evolved"][metric],
         m["test"]["uniform"][metric], m["chosen"]]
        for m in members
    ]  # fmt: skip
    ends = [[name, part[name][metric]] for name in ("dense", "largest", "smallest")]
    by_cost = {
        name: ([m["kept"] for m in members], [m["test"][name][metric] for m in members])
        for name in ("evolved", "uniform")
    }
    note = (
        f"Test rows; members were chosen by validation rows. Ranks of {len(part['cloud'])} scored "
        f"members are predicted with a correlation of {part['rank_correlation']:.2f}."
    )
    return [
        heading("One training, many networks", note),
        row(
            table(columns, rows),
            table(["whose", label], ends, title="before members trained together; after"),
        ),
        row(
            line_plot(by_cost, x_label=f"{cost}, share of dense", y_label=f"test {label}"),
            line_plot(
                {"best so far, from small to large": _front([tuple(p) for p in part["cloud"]])},
                x_label=f"{cost}, share of dense", y_label="validation score",
                title="Members that were scored",
            ),
        ),
    ]  # fmt: skip


@figures("supernet")
def member_figures(part: Mapping) -> list[Card]:
    """Returns the main metric of the member chosen for each budget."""
    metric = main_metric(list(part["dense"]))
    dense = f"dense {part['dense'][metric]:.4f}"
    return [
        Card(
            metric_label(metric),
            m["test"][m["chosen"]][metric],
            f"at {m['kept']:.0%} of the {part['cost']}; {dense}",
        )
        for m in part["members"]
    ]


def _front(scored: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Returns the candidates that no cheaper one beats, from cheap to expensive."""
    front: list[tuple[float, float]] = []
    for share, score in sorted(scored, key=lambda x: (x[0], -x[1])):
        if not front or score > front[-1][1]:
            front.append((share, score))
    return [x for x, _ in front], [y for _, y in front]
