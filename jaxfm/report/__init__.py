"""Self-contained HTML reports: pages, tables, cards and plots."""

from jaxfm.report.page import (
    Card,
    Html,
    Report,
    cards,
    heading,
    json_panel,
    paragraph,
    render,
    row,
    table,
    text_panel,
    write,
)
from jaxfm.report.plot import bar_plot, grid_plot, line_plot

__all__ = [
    "Card",
    "Html",
    "Report",
    "bar_plot",
    "cards",
    "grid_plot",
    "heading",
    "json_panel",
    "line_plot",
    "paragraph",
    "render",
    "row",
    "table",
    "text_panel",
    "write",
]
