"""Rebuilds the report of a run folder.

    python -m jaxfm.launch.report --run_dir=runs/demo

The page is made from config.json, metrics.jsonl and results.json alone; a run that is still going
on can be looked at, too.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.launch.compare_page import best_cards, comparison
from jaxfm.log import read_metrics
from jaxfm.report import (
    Card,
    Html,
    Report,
    bar_plot,
    cards,
    heading,
    json_panel,
    line_plot,
    row,
    table,
    text_panel,
    write,
)
from jaxfm.run_folder import load_results

LOWER_IS_BETTER = ("bits_per_byte", "loss")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Which run."""

    run_dir: str = option("runs/demo", "folder of the run")

    def __post_init__(self):
        check(self)


def write_report(run_dir: pathlib.Path) -> pathlib.Path:
    """Writes report.html into the run folder and returns its path.

    Raises:
      FileNotFoundError: the folder holds no run.
    """
    path = run_dir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{run_dir} holds no run: there is no config.json in it.")
    config = json.loads(path.read_text())
    metrics, results = read_metrics(run_dir), load_results(run_dir)
    parts: list[Html] = [cards(_figures(metrics, results))]
    if metrics:
        parts += _training(metrics, results)
    if "federate" in results:
        parts += _clients(results["federate"])
    if "compare" in results:
        parts += comparison(results["compare"])
    if "draft" in results:
        parts += _draft(results["draft"])
    if "decode" in results:
        parts += _decoding(results["decode"])
    if "search" in results:
        parts += _search(results["search"])
    if "supernet" in results:
        parts += _supernet(results["supernet"])
    parts += [heading("How to get this again"), json_panel("config.json", config)]
    report = Report(_title(results), f"run {run_dir.name}", tuple(parts))
    write(report, run_dir / "report.html")
    return run_dir / "report.html"


def _title(results: Mapping) -> str:
    if "decode" in results:
        return "Federate, cut, serve"
    if "search" in results:
        return "A model cut to a budget"
    if "supernet" in results:
        return "A network for every device"
    if "compare" in results:
        return "Federated algorithms side by side"
    return "A federated run" if "federate" in results else "A training run"


def main_metric(names: Sequence[str]) -> str:
    """The metric that a page leads with."""
    return next(m for m in ("bits_per_byte", "accuracy", "loss") if any(m in n for n in names))


def _name(metric: str) -> str:
    return metric.replace("_", " ")


def _figures(metrics: list[dict], results: Mapping) -> list[Card]:
    figures = []
    if "federate" in results:
        part = results["federate"]
        metric = main_metric(list(part["test"]))
        own, overall = (part["test"].get(f"{w}/{metric}") for w in ("personal", "global"))
        if overall is None:
            figures.append(Card(_name(metric), own, "clients' own models on their own test data"))
        else:
            figures.append(Card(_name(metric), overall, "global test set"))
        worst = part["test"][f"worst_decile/{metric}"]
        figures.append(Card("worst decile", worst, "of clients, on their own test data"))
        up, full = part["totals"]["bytes_up"], part["full_model"]["bytes_up"]
        note = f"{up / max(full, 1):.0%} of what full models would be"
        figures.append(Card("MB uploaded", up / 1e6, note))
        if "seconds" in part["totals"]:
            note = f"{part['totals']['joules']:,.0f} J of all clients, simulated"
            figures.append(Card("hours", part["totals"]["seconds"] / 3600, note))
    elif metrics:
        last = {name: value for line in metrics for name, value in line.items()}
        shown = [name for name in last if name.startswith(("validation/", "test/"))]
        if shown:
            metric = main_metric(shown)
            figures.append(
                Card(_name(metric), last.get(f"validation/{metric}"), "validation split")
            )
    if "search" in results:
        part = results["search"]
        metric = main_metric(list(part["dense"]))
        last = list(part["stages"].values())[-1]
        before, after = part["costs"]["macs"]
        figures.append(Card(_name(metric), last[metric], f"dense {part['dense'][metric]:.4f}"))
        figures.append(Card("multiply-adds", f"{after / before:.1%}", "of the dense model's"))
        before, after = part["latency_s"]["batch 32"]
        figures.append(Card("speed-up", f"{before / after:.2f}x", "a batch of 32, measured"))
    if "supernet" in results:
        part = results["supernet"]
        metric = main_metric(list(part["dense"]))
        dense = f"dense {part['dense'][metric]:.4f}"
        figures += [
            Card(_name(metric), m["test"][m["chosen"]][metric],
                 f"at {m['kept']:.0%} of the {part['cost']}; {dense}")
            for m in part["members"]
        ]  # fmt: skip
    if "compare" in results:
        part = results["compare"]
        metric = next(iter(part["algorithms"].values()))["metric"]
        figures += best_cards(part, metric in LOWER_IS_BETTER)
    if "decode" in results:
        best = max(results["decode"]["decoders"], key=lambda d: d["speed_up"])
        figures.append(Card("speed-up", f"{best['speed_up']:.2f}x", f"{best['name']} decoding"))
    return figures


def _training(metrics: list[dict], results: Mapping) -> list[Html]:
    shown = ("validation", "personal/")
    names = {name for line in metrics for name in line if name.startswith(shown)}
    steps = "round" if any("clients/reported" in line for line in metrics) else "step"
    curves_loss = {"training loss": _curve(metrics, "step", "train/loss")}
    parts = [heading("Training")]
    if not names:
        return [*parts, line_plot(curves_loss, x_label=steps, y_label="nats")]
    metric = main_metric(sorted(names))
    tiers = results.get("federate", {}).get("tiers", [])
    label = lambda name: _tier_name(name, metric, tiers)
    chosen = sorted(name for name in names if name.endswith(metric))
    by_step = {label(n): _curve(metrics, "step", n) for n in chosen}
    plots = [
        line_plot(by_step, x_label=steps, y_label=f"validation {_name(metric)}"),
    ]
    if steps == "round":
        by_bytes = {label(n): _curve(metrics, "total/bytes_up", n, 1e-6) for n in chosen}
        plots.append(
            line_plot(by_bytes, x_label="MB uploaded", y_label=f"validation {_name(metric)}")
        )
        if any("total/seconds" in line for line in metrics):
            by_time = {label(n): _curve(metrics, "total/seconds", n, 1 / 3600) for n in chosen}
            plots.append(
                line_plot(by_time, x_label="simulated hours", y_label=f"validation {_name(metric)}")
            )
    else:
        plots.append(line_plot(curves_loss, x_label=steps, y_label="training loss, nats"))
    return [*parts, row(*plots)]


def _tier_name(name: str, metric: str, tiers: list[dict]) -> str:
    if name.startswith("personal/"):
        return "clients' own, on their own rows"
    middle = name.removeprefix("validation").removesuffix(metric).strip("/")
    if len(tiers) < 2:
        return "model"
    number = int(middle.removeprefix("bucket") or 0)
    return f"{tiers[number]['parameters'] / 1e3:,.0f}k parameters"


def _curve(metrics: list[dict], x: str, y: str, scale: float = 1.0):
    points = [(line[x] * scale, line[y]) for line in metrics if x in line and y in line]
    return [p[0] for p in points], [p[1] for p in points]


def _clients(part: Mapping) -> list[Html]:
    test, tiers, totals = part["test"], part["tiers"], part["totals"]
    metric = main_metric(list(test))
    best = min if metric in LOWER_IS_BETTER else max
    three = table(
        ["whose model, on which test set", _name(metric)],
        [
            ["the global model, on the global test set", test.get(f"global/{metric}")],
            ["each client's own, on its own (mean)", test[f"personal/{metric}"]],
            ["the worst tenth of clients", test[f"worst_decile/{metric}"]],
        ],
    )
    largest = max(tier["parameters"] for tier in tiers)
    rows = [
        [
            f"{100 * tier['parameters'] / largest:.0f}%",
            tier["clients"], tier["parameters"], tier["memory_bytes"] / 1e6,
            tier["bytes_up"] / 1e6, tier["flops_per_step"] / 1e9, tier[metric],
        ]
        for tier in tiers
    ]  # fmt: skip
    columns = ["size", "clients", "parameters", "memory, MB", "upload, MB", "GFLOP a step",
               f"test {_name(metric)}"]  # fmt: skip
    traffic = {
        "up": totals["bytes_up"] / 1e6,
        "up, full model everywhere": part["full_model"]["bytes_up"] / 1e6,
        "down": totals["bytes_down"] / 1e6,
        "down, full model everywhere": part["full_model"]["bytes_down"] / 1e6,
    }
    wire = bar_plot(traffic, unit="MB", title="bytes on the wire, all rounds")
    sizes = {client["name"]: client["examples"] for client in part["clients"][:24]}
    return [
        heading("Clients", "Unequal machines, unequal data; data never leave their owner."),
        table(columns, rows, best={columns[-1]: best}),
        row(
            Html(f"<div>{three}{wire}</div>"),
            bar_plot(sizes, unit="rows", title="training rows of each client"),
        ),
    ]


def _draft(part: Mapping) -> list[Html]:
    curve = {"distillation": (list(range(len(part["losses"]))), part["losses"])}
    return [
        heading(
            "The draft",
            f"The smallest tier, cut out ({part['parameters']:,} of {part['parent_parameters']:,} "
            "parameters) and briefly taught to predict what its parent does.",
        ),
        row(
            line_plot(curve, x_label="step", y_label="KL to the parent, nats", log_y=True),
            table(
                ["draft", "agrees with its parent"],
                [["as cut", part["agreement_before"]], ["distilled", part["agreement_after"]]],
                title="share of test tokens with the same most likely next token",
            ),
        ),
    ]


def _decoding(part: Mapping) -> list[Html]:
    rows = [
        [d["name"], d["tokens_per_s"], d["speed_up"], d["acceptance"], d["tokens_per_pass"],
         "yes" if d["identical"] else "NO"]
        for d in part["decoders"]
    ]  # fmt: skip
    columns = ["decoder", "tokens/s", "speed-up", "acceptance", "tokens a pass", "same tokens"]
    panels = [
        text_panel(
            [(s["prompt"], "prompt"), *((text, kind) for text, kind in s["pieces"])],
            {"prompt": "prompt (held-out code)", "accepted": "drafted and accepted"},
            title=s["title"],
        )
        for s in part["samples"]
    ]
    return [
        heading("Decoding held-out code", part["note"]),
        table(columns, rows, best={"tokens/s": max}),
        *panels,
    ]


def main(config: ReportConfig) -> None:
    """Writes the page and says where it is."""
    print(write_report(pathlib.Path(config.run_dir)))


def _search(part: Mapping) -> list[Html]:
    """What a search found: before and after, the ratio of each group, the curve, all candidates."""
    metric = main_metric(list(part["dense"]))
    stages = [["dense", part["dense"][metric]]]
    stages += [[stage, values[metric]] for stage, values in part["stages"].items()]
    best = min if metric in LOWER_IS_BETTER else max
    costs = [[_name(n), b, a, f"{a / b:.1%}"] for n, (b, a) in part["costs"].items()]
    speed = [[n, 1e3 * b, 1e3 * a, f"{b / a:.2f}x"] for n, (b, a) in part["latency_s"].items()]
    # Candidates fill their budget: what differs among them is the other cost.
    spread = lambda cost: max(part[cost]) - min(part[cost])
    other = max((cost for cost in ("macs", "parameters") if cost in part), key=spread)
    scored = [(m, s) for m, s in zip(part[other], part["scores"]) if s == s]
    steps = list(range(1, len(part["curve"]) + 1))
    return [
        heading("Before and after", "Test rows that neither training nor the search has seen."),
        row(
            table(["stage", _name(metric)], stages, best={_name(metric): best}),
            table(["cost of one example", "dense", "pruned", "left"], costs),
            table(["latency, ms", "dense", "pruned", "speed-up"], speed),
        ),
        heading("What each group keeps"),
        bar_plot({name: 100 * ratio for name, ratio in part["ratios"].items()}, unit="%"),
        heading("The search", f"{part['strategy']}, {part['seconds']:.0f} seconds."),
        row(
            line_plot({"best so far": (steps, part["curve"])}, x_label="candidates",
                      y_label="reward", title="Search curve"),
            line_plot({"front": _front(scored)}, x_label=f"{_name(other)}, share of dense",
                      y_label="reward", title="Pareto front of all candidates"),
        ),
    ]  # fmt: skip


def _supernet(part: Mapping) -> list[Html]:
    """The members of all budgets, and the scores that the predictor learned from."""
    metric, cost = main_metric(list(part["dense"])), part["cost"]
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
            table(["whose", _name(metric)], ends, title="before members trained together; after"),
        ),
        row(
            line_plot(by_cost, x_label=f"{cost}, share of dense", y_label=f"test {_name(metric)}"),
            line_plot(
                {"best so far, from small to large": _front([tuple(p) for p in part["cloud"]])},
                x_label=f"{cost}, share of dense", y_label="validation score",
                title="Members that were scored",
            ),
        ),
    ]  # fmt: skip


def _front(scored: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The candidates that no cheaper one beats, from cheap to dear."""
    front: list[tuple[float, float]] = []
    for share, score in sorted(scored, key=lambda x: (x[0], -x[1])):
        if not front or score > front[-1][1]:
            front.append((share, score))
    return [x for x, _ in front], [y for _, y in front]


if __name__ == "__main__":
    configs.run(main, ReportConfig)
