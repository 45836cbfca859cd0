"""The report of a search for a prompt."""

from __future__ import annotations

from collections.abc import Mapping

from jaxfm.report import Card, Html, heading, table
from jaxfm.report.sections import figures, section


@section("prompts", order=25, title="A prompt found over clients")
def candidates(part: Mapping) -> list[Html]:
    """Shows the ranking, and the winner on the test rows."""
    rows = [
        [
            candidate["template"].replace("\n", "\\n"),
            "; ".join(f"{text[-24:]!r}: {word}" for text, word in candidate["exemplars"]) or "none",
            candidate["mean_reward"], candidate["rounds"], candidate["reports"],
        ]
        for candidate in part["ranking"]
    ]  # fmt: skip
    tested = [
        ["the winner", part["test"]["accuracy"], part["test"]["log_likelihood"]],
        ["the first template, without exemplars", part["first_template"]["accuracy"],
         part["first_template"]["log_likelihood"]],
    ]  # fmt: skip
    return [
        heading("The ranking", _sentences(part)),
        table(["template", "exemplars", "mean reward", "rounds", "reports"], rows),
        heading("On test rows", "They belong to no client and no exemplar."),
        table(["prompt", "accuracy", "log-likelihood, nats"], tested, best={"accuracy": max}),
    ]


def _sentences(part: Mapping) -> str:
    said = [
        f"{part['candidates']} candidates competed for {part['rounds']} rounds over "
        f"{part['clients']} clients ({part['bandit']}). They are ranked by a lower bound of their "
        "mean reward; only rewards travelled.",
    ]
    if part["epsilon"] != "inf":
        said.append(
            f"A client's rows are protected with epsilon = {float(part['epsilon']):.2f} at delta = "
            f"{part['delta']}."
        )
    return " ".join(said)


@figures("prompts")
def prompt_cards(part: Mapping) -> list[Card]:
    """Returns the winner's accuracy, its gain, and what travelled."""
    gain = part["test"]["accuracy"] - part["first_template"]["accuracy"]
    return [
        Card("accuracy", part["test"]["accuracy"], "of the winner on test rows; higher is better"),
        Card("gain", gain, "over the first template without exemplars"),
        Card("kB uploaded", part["bytes_up"] / 1e3, "rewards of all rounds; lower is better"),
    ]
