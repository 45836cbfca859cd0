"""A page that shows what each stage of a pipe and its draft did in each tick."""

from __future__ import annotations

import pathlib

import numpy as np

from jaxfm.parallel.pipe.state import CANCELLED, DRAFTED, IDLE, LIVE, PREFILL, Counters
from jaxfm.report import Card, Report, cards, grid_plot, heading, write


def write_timeline(counters: Counters, path: str | pathlib.Path) -> None:
    """Writes the page.

    Args:
      counters: of a `Generation` by `pipeinfer(record=...)`: the ticks that it recorded are shown.
      path: of the HTML file.
    """
    ticks = min(int(counters.ticks), len(counters.timeline))
    names = [f"stage {i}" for i in range(len(counters.executed))]
    prefill = np.full((int(counters.prefill), len(names) + 1), PREFILL, np.uint8)
    prefill[:, -1] = IDLE
    rows = np.concatenate([prefill, counters.timeline[:ticks]]).T
    rows[-1] *= DRAFTED
    total = max(int(counters.ticks), 1)
    figures = [
        Card("ticks", total, "after the prompt was read"),
        Card("stage time in use", f"{counters.executed.sum() / (total * len(names)):.0%}", ""),
        Card("packets launched", int(counters.launched[0]), "some of them were cancelled"),
        Card("corrections", int(counters.corrections.sum()), "tokens that no draft foresaw"),
    ]
    kinds = {
        LIVE: "computes",
        CANCELLED: "cancelled",
        PREFILL: "reads the prompt",
        DRAFTED: "drafts",
    }
    picture = grid_plot(
        dict(zip([*names, "draft"], rows.tolist())), kinds, x_label="tick", title="The pipe"
    )
    parts = (cards(figures), heading("Timeline", "White: nothing to do."), picture)
    write(Report("A pipe at work", f"{len(names)} stages", parts), pathlib.Path(path))
