"""The report of a federated run, and of algorithms side by side."""

from __future__ import annotations

from collections.abc import Mapping

from jaxfm.federated.outcome import untrained_rest
from jaxfm.launch.compare_page import best_cards, comparison
from jaxfm.report import Card, Html, bar_plot, heading, row, table
from jaxfm.report.sections import (
    LOWER_IS_BETTER,
    figures,
    main_metric,
    metric_label,
    section,
)


@section("stopped", order=5, title="A federated run that stopped")
def stopped(part: Mapping) -> list[Html]:
    """Shows why a run stopped before its last round."""
    return [heading(f"{part['algorithm']} learned nothing", part["why"])]


@section("federate", order=10, title="A federated run")
def clients(part: Mapping) -> list[Html]:
    """Shows the three metrics, the tiers, the bytes on the wire and the sizes of clients."""
    test, tiers, totals = part["test"], part["tiers"], part["totals"]
    metric = main_metric(list(test))
    best = min if metric in LOWER_IS_BETTER else max
    scored = part.get("scored")
    whose = "the global model" if scored is None else "the largest model that clients train"
    three = table(
        ["whose model, on which test set", metric_label(metric)],
        [
            [f"{whose}, on the global test set", test.get(f"global/{metric}")],
            ["each client's own, on its own (mean)", test[f"personal/{metric}"]],
            ["the worst tenth of clients", test[f"worst_decile/{metric}"]],
        ],
    )
    largest = part["full_model"].get("parameters") or max(tier["parameters"] for tier in tiers)
    rows = [
        [
            f"{100 * tier['parameters'] / largest:.0f}%",
            tier["clients"], tier["parameters"], tier["memory_bytes"] / 1e6,
            tier["bytes_up"] / 1e6, tier["flops_per_step"] / 1e9,
            tier[metric] if tier["clients"] else None,
        ]
        for tier in tiers
    ]  # fmt: skip
    columns = ["size", "clients", "parameters", "memory, MB", "upload, MB", "GFLOP a step",
               f"test {metric_label(metric)}"]  # fmt: skip
    traffic = {
        "up": totals["bytes_up"] / 1e6,
        "up, full model everywhere": part["full_model"]["bytes_up"] / 1e6,
        "down": totals["bytes_down"] / 1e6,
        "down, full model everywhere": part["full_model"]["bytes_down"] / 1e6,
    }
    wire = bar_plot(traffic, unit="MB", title="bytes on the wire, all rounds")
    sizes = {client["name"]: client["examples"] for client in part["clients"][:24]}
    return [
        heading("Clients", _sentences(part)),
        table(columns, rows, best={columns[-1]: best}),
        row(
            Html(f"<div>{three}{wire}</div>"),
            bar_plot(sizes, unit="rows", title="training rows of each client"),
        ),
    ]


def _sentences(part: Mapping) -> str:
    """What was run, and what became of those who did not count."""
    said = ["Unequal machines, unequal data; data never leave their owner."]
    if "algorithm" in part:
        said.append(
            f"{part['algorithm']} on {part['data']}, dealt out by the partition "
            f"{part['partition']}: {part['rounds']} rounds of {part['cohort_size']} clients."
        )
    if part.get("phases"):
        targets = part["targets"]
        said.append(
            f"Phases: {', '.join(part['phases'])}; losses were taken over "
            f"{targets['central']:,.0f} targets in central phases and "
            f"{targets['federated']:,.0f} in federated ones."
        )
    if part.get("scored") is not None and part["full_model"].get("parameters"):
        own = part["tiers"][part["scored"]]["parameters"]
        said.append(untrained_rest(own, part["full_model"]["parameters"]))
    said += [_privacy(part.get("privacy")), part.get("ended", "")]
    said += [part.get("left_out", ""), part.get("diverged", "")]
    return " ".join(filter(None, said))


def _privacy(private: Mapping | None) -> str:
    """What a private run promises."""
    if not private:
        return ""
    ways = {"poisson": "each drawn by itself", "fixed": "so many", "in_turn": "in turn"}
    drawn = ways[private["kind"]]
    return (
        f"The model, after each of {private['rounds']} rounds, hardly tells whether any one client "
        f"took part: {private['cohort_size']} of {private['num_clients']} clients a round "
        f"({drawn}), noise of {private['noise_multiplier']:.3g} clipping norms on their sum. "
        "Losses and counts of single clients, as a simulation logs them, are not covered."
    )


@figures("federate")
def client_figures(part: Mapping) -> list[Card]:
    """Returns the main metric, the clients served worst, bytes and, where simulated, time."""
    metric = main_metric(list(part["test"]))
    way = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
    own, overall = (part["test"].get(f"{w}/{metric}") for w in ("personal", "global"))
    if part.get("is_personal") or overall is None:
        first = Card(metric_label(metric), own, f"clients' own models on their own rows; {way}")
    else:
        first = Card(metric_label(metric), overall, f"global test set; {way}")
    worst = part["test"].get(f"worst_decile/{metric}")
    up, full = part["totals"]["bytes_up"], part["full_model"]["bytes_up"]
    note = f"{up / full:.0%} of what full models would be" if full else "nobody uploaded"
    cards = [
        first,
        Card("worst decile", worst, f"of clients, on their own test data; {way}"),
        Card("MB uploaded", up / 1e6, f"{note}; lower is better"),
    ]
    totals = part["totals"]
    if totals.get("absent") or totals.get("non_finite"):
        lost = f"of {totals['selected']:.0f} drawn; {totals['non_finite']:.0f} not finite"
        cards.append(Card("updates lost", totals["absent"] + totals["non_finite"], lost))
    if examples := part.get("examples"):
        middle = f"{examples['median']:.3g} for the client in the middle"
        note = f"of examples, at a delta of {examples['delta']:g}; {middle}"
        cards.append(Card("largest epsilon", examples["largest"], note))
    if private := part.get("privacy"):
        budget = "no budget" if private["budget"] is None else f"of {private['budget']:g}"
        note = f"{budget}, at a delta of {private['delta']:g}; clients; lower is more private"
        cards.append(Card("epsilon", private["epsilon"], note))
    if "seconds" in totals:
        note = f"{totals['joules']:,.0f} J of all clients, simulated; lower is better"
        cards.append(Card("hours", totals["seconds"] / 3600, note))
    return cards


section("compare", order=20, title="Federated algorithms side by side")(comparison)


@figures("compare")
def comparison_figures(part: Mapping) -> list[Card]:
    """Returns which algorithm is best by each column."""
    metric = next(iter(part["algorithms"].values()))["metric"]
    return best_cards(part, metric in LOWER_IS_BETTER)
