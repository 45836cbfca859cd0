"""The report of a stream: what is known of each stage after each other one."""

from __future__ import annotations

from collections.abc import Mapping

from jaxfm.report import Card, Html, heading, line_plot, table
from jaxfm.report.sections import figures, section


@section("continual", order=10, title="Learning from a stream")
def stream(part: Mapping) -> list[Html]:
    """Shows the measures of each way, its matrix, and how the average goes."""
    ways, names = part["ways"], part["names"]
    rows = [
        [name, s["average_accuracy"], s["forgetting"], s["backward_transfer"]]
        for name, s in ways.items()
    ]
    columns = ["protection", "average accuracy", "forgetting", "backward transfer"]
    seen = {
        name: (
            list(range(1, len(names) + 1)),
            [sum(r[: t + 1]) / (t + 1) for t, r in enumerate(s["accuracy"])],
        )
        for name, s in ways.items()
    }
    after = [f"after stage {t + 1}" for t in range(len(names))]
    matrices = [
        table(
            ["", *(f"stage {j + 1}" for j in range(len(names)))],
            [[label, *r] for label, r in zip(after, s["accuracy"], strict=True)],
            title=f"{name}: accuracy on the test rows of each stage",
        )
        for name, s in ways.items()
    ]
    return [
        heading(
            "What was learned, and what was forgotten",
            f"{len(names)} stages of {part['rounds']} rounds, by {part['by']}. Forgetting is how "
            "far a stage's accuracy lies below its best at the end; more is worse.",
        ),
        table(
            columns, rows,
            best={"average accuracy": max, "forgetting": min, "backward transfer": max},
        ),
        line_plot(seen, x_label="stages seen", y_label="mean accuracy on these"),
        *matrices,
    ]  # fmt: skip


@figures("continual")
def cards(part: Mapping) -> list[Card]:
    """Returns the forgetting of each way."""
    return [
        Card(f"forgetting, {name}", f"{s['forgetting']:.3f}", "less is better")
        for name, s in part["ways"].items()
    ]
