"""The report of a draft model and of decoders on the same prompts."""

from __future__ import annotations

from collections.abc import Mapping

from jaxfm.report import Card, Html, heading, line_plot, row, table, text_panel
from jaxfm.report.sections import figures, section


@section("draft", order=30)
def draft(part: Mapping) -> list[Html]:
    """Shows how the draft learned, and how often it agrees with its parent."""
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


@section("decode", order=40, title="Federate, cut, serve")
def decoders(part: Mapping) -> list[Html]:
    """Shows the decoders' speeds, and a text of each with what was drafted."""
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


@figures("decode")
def decoder_figures(part: Mapping) -> list[Card]:
    """Returns the best speed-up."""
    best = max(part["decoders"], key=lambda d: d["speed_up"])
    return [Card("speed-up", f"{best['speed_up']:.2f}x", f"{best['name']} decoding")]
