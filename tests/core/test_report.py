"""Laws of reports: self-contained, escaped, drawn where the numbers say, written in one step."""

import html.parser
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from jaxfm import report
from jaxfm.report import sections
from jaxfm.report.page import Card, Report
from jaxfm.report.plot import _tick, show

NASTY = "<script>alert('&\"')</script>"


def full_page(text: str = "loss") -> str:
    parts = (
        report.heading(text, text),
        report.cards([Card(text, text, text), Card("n", 12345)]),
        report.table([text, "b"], [[text, 1.0], ["c", 2.0]], best={"b": max}, title=text),
        report.row(
            report.line_plot({text: ([0, 1], [1, 2])}, x_label=text, y_label=text, title=text),
            report.bar_plot({text: 1.0}, unit=text, title=text),
        ),
        report.text_panel([(text, ""), (text, "k")], {"k": text}, title=text),
        report.json_panel(text, {text: text}),
    )
    return report.render(Report(text, text, parts))


class Balance(html.parser.HTMLParser):
    """Checks that every element is closed where it should be."""

    void = ("meta", "line", "circle", "path")

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


@pytest.mark.smoke
@pytest.mark.parametrize("text", ["loss", NASTY])
def test_a_page_is_well_formed_and_needs_nothing_from_outside(text):
    page = full_page(text)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"https?:|//|src=|@import|url\(|<link|<iframe", page)


def test_all_text_is_escaped():
    page = full_page(NASTY)
    assert "<script" not in page and "alert('" not in page
    assert page.count("&lt;script&gt;") >= 16


def svg_of(part: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", part, re.S)[0])


def spots(part: str) -> list[tuple[float, float]]:
    return [(float(c.get("cx")), float(c.get("cy"))) for c in svg_of(part).iter("circle")]


def test_points_lie_in_proportion_to_their_values():
    plot = report.line_plot({"a": ([0, 1, 4], [0, 10, 40])}, x_label="x", y_label="y")
    (x0, y0), (x1, y1), (x2, y2) = spots(plot)
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert (x2 - x0) / (x1 - x0) == pytest.approx(4, rel=0.01)
    assert (y2 - y0) / (y1 - y0) == pytest.approx(4, rel=0.01)


def test_ticks_fit_beside_their_axis():
    plot = report.line_plot({"a": ([1, 2], [2e5, 3e9])}, x_label="x", y_label="y", log_y=True)
    texts = {text.text for text in svg_of(plot).iter("text")}
    assert {"100k", "1M", "1G"} <= texts
    for power in range(-3, 30):
        assert len(_tick(-(10.0**power))) <= 7


def test_a_logarithmic_axis_spaces_decades_equally():
    plot = report.line_plot(
        {"a": ([1, 2, 3], [0.01, 1, 100])}, x_label="x", y_label="y", log_y=True
    )
    heights = [y for _, y in spots(plot)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    texts = {text.text for text in svg_of(plot).iter("text")}
    assert {"0.01", "1", "100"} <= texts


@pytest.mark.parametrize(("gap", "log_y"), [(math.nan, False), (math.inf, False), (0.0, True)])
def test_what_cannot_be_placed_is_a_gap(gap, log_y):
    plot = report.line_plot(
        {"a": ([0, 1, 2, 3], [1, gap, 2, 3])}, x_label="x", y_label="y", log_y=log_y
    )
    (path,) = svg_of(plot).iter("path")
    assert re.sub(r"[^ML]", "", path.get("d")) == "MML"
    empty = report.line_plot({"a": ([0], [math.nan])}, x_label="x", y_label="loss")
    assert "Nothing to plot for loss." in empty


@pytest.mark.parametrize("values", [[5.0, 5.0], [0.0, 0.0], [-3.0, -3.0], [1e-9, 2e9]])
def test_every_range_of_values_stays_inside_the_frame(values):
    plot = report.line_plot({"a": ([7, 7], values)}, x_label="x", y_label="y")
    assert all(0 < x < 560 and 0 < y < 310 for x, y in spots(plot))


def test_bars_are_as_long_as_their_values():
    plot = report.bar_plot({"a": 1.0, "b": 4.0, "none": 0.0}, unit="MB")
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", plot)]
    assert widths[0] == pytest.approx(widths[1] / 4) and widths[2] < 1
    assert "4 MB" in plot


def test_a_table_marks_the_best_and_aligns_decimals():
    rows = [["a", 3.021, 10], ["b", 3.4, 30], ["c", None, 20], ["d", math.nan, 30]]
    table = report.table(["name", "loss", "rate"], rows, best={"loss": min, "rate": max})
    assert re.findall(r'<td class="num best">(.*?)</td>', table) == ["3.02", "30", "30"]
    assert '<td class="num">3.40</td>' in table
    assert table.count('<td class="num">–</td>') == 2


def test_wrong_parts_say_what_is_wrong():
    with pytest.raises(ValueError, match="best names 'los'; the columns are name, loss"):
        report.table(["name", "loss"], [], best={"los": min})
    with pytest.raises(ValueError, match=r"The row \['a'\] has 1 of 2 cells"):
        report.table(["name", "loss"], [["a"]])
    with pytest.raises(ValueError, match="The legend has no 'k'; it has nothing"):
        report.text_panel([("text", "k")])
    with pytest.raises(ValueError, match="The curve 'a' has 1 x values and 2 y values"):
        report.line_plot({"a": ([1], [1, 2])}, x_label="x", y_label="y")
    with pytest.raises(ValueError, match=r"The bar .a. is -1\.0"):
        report.bar_plot({"a": -1.0})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (math.nan, "–"), (math.inf, "∞"), (12345, "12,345"), (0.12345, "0.123"),
        (3.0, "3"), (1.2e-5, "1.2e-05"), (0.0, "0"), (123.4, "123"), (True, "True"), ("x", "x"),
    ],
)  # fmt: skip
def test_numbers_are_shown_short(value, text):
    assert show(value) == text


def test_the_file_appears_whole(tmp_path):
    path = tmp_path / "run" / "report.html"
    report.write(Report("Title", "under it", (report.paragraph("text ÷ µ"),)), path)
    assert "text ÷ µ" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_sections_come_in_their_order_and_a_part_has_one():
    part = lambda text: lambda values: [report.paragraph(f"{text} {values}")]
    sections.section("test-b", order=1002, title="B")(part("second"))
    sections.section("test-a", order=1001, title="A")(part("first"))
    sections.section("test-c", order=1003)(part("third"))
    results = {"test-b": 2, "test-c": 3, "test-a": 1, "unknown": 4}
    assert sections.result_sections(results) == [
        "<p>first 1</p>", "<p>second 2</p>", "<p>third 3</p>"
    ]  # fmt: skip
    assert sections.page_title(results) == "B"
    assert sections.page_title({"unknown": 4}, "none") == "none"
    assert sections.result_cards(results) == []
    with pytest.raises(ValueError, match=r"'test-a' of results\.json is registered already"):
        sections.section("test-a", order=1)(part("again"))
