"""Pages: whole, self-contained, escaped; curves where the data are, gaps where there are none."""

import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from nanochat import page
from nanochat.page import Curve, bars, chart, thin, ticks

VOID = {"meta", "br", "link", "img"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed before what is in it, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(html: str) -> str:
    """Assert what holds for every page, and return it."""
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    assert html.startswith("<!doctype html>") and "width=device-width" in html and "prefers-color-scheme:dark" in html
    assert not re.search(r"""(src|href)=|url\(|@import|https?://""", html)  # nothing is fetched from anywhere
    return html


def svg(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.findall(r"<svg viewBox=\"0 0 420.*?</svg>", html, re.DOTALL)[0])


def paths(html: str) -> list[str]:
    return [path.attrib["d"] for path in svg(html).iter("path")]


def data(html: str) -> dict[str, list[dict[str, object]]]:
    return json.loads(unescape(re.findall(r'data-x="(.*?)"', html)[0]))


def test_a_page_stands_by_itself_and_escapes() -> None:
    evil = '<script>alert("&")</script>'
    html = check(
        page.page(
            evil, page.heading(evil, evil), page.cards([(evil, evil)]), page.table([[evil, evil]]), page.note(evil),
            page.details(evil, ""), chart(evil, [Curve(evil, [0, 1], [1.0, 2.0])], str), bars(evil, [(evil, 1.0, evil, 0)]),
        )
    )  # fmt: skip
    assert evil not in html and html.count("<script>") == 1


def test_a_curve_goes_from_corner_to_corner() -> None:
    html = chart("loss", [Curve("fp32", [0, 10, 20], [3.0, 2.0, 1.0])], lambda y: f"{y:.1f}", limits=(1.0, 3.0))
    left, right, top, bottom = page.LEFT, page.WIDTH - page.RIGHT, page.TOP, page.HEIGHT - page.BOTTOM
    assert paths(html) == [f"M{left}.0 {top}.0L{(left + right) / 2:.1f} {(top + bottom) / 2:.1f}L{right}.0 {bottom}.0"]
    assert data(html)["c"] == [{"n": "fp32", "p": [[0, 3.0, "3.0"], [10, 2.0, "2.0"], [20, 1.0, "1.0"]]}]
    labels = [text.text for text in svg(html).iter("text")]
    assert labels == ["1.0", "1.5", "2.0", "2.5", "3.0", "0", "5", "10", "15", "20"]


def test_what_is_not_finite_is_a_gap_and_a_point_alone_a_dot() -> None:
    html = chart("loss", [Curve("a", range(5), [4.0, 3.0, math.nan, 2.0, math.inf])], str)
    assert len(re.findall("M", paths(html)[0])) == 2 and len(re.findall("L", paths(html)[0])) == 1
    assert len(list(svg(html).iter("circle"))) == 1
    assert "NaN" not in html and "Infinity" not in html
    assert "no finite value" in chart("loss", [Curve("a", [0], [math.nan])], str)
    assert len(list(svg(chart("loss", [Curve("a", [7], [1.0])], str)).iter("circle"))) == 1


def test_curves_differ_without_colour_and_faint_ones_are_not_in_the_legend() -> None:
    html = chart(
        "loss", [Curve("reference", [0, 1], [1.0, 2.0], None), *(Curve(f"c{i}", [0, 1], [1.0, 2.0], i) for i in range(6))], str
    )
    drawn = [path.attrib.get("stroke-dasharray") for path in svg(html).iter("path")]
    assert len(set(drawn[1:])) == 6
    assert "c5</small>" in html and "reference</small>" not in html


def test_long_curves_are_means_of_neighbours() -> None:
    xs, ys = thin(range(1000), [float(i % 2) for i in range(1000)], 500)
    assert xs[:2] == [1, 3] and xs[-1] == 999 and set(ys) == {0.5}
    assert thin([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0]) and thin([], []) == ([], [])
    xs, ys = thin(range(5), [1.0, 2.0, 3.0, 4.0, 9.0], 2)
    assert xs == [2, 4] and ys == [2.0, 6.5]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.03, 0.21, [0.05, 0.1, 0.15, 0.2]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (8, 9, [8, 8.2, 8.4, 8.6, 8.8, 9]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_bars_are_in_proportion() -> None:
    html = bars("speed", [("bf16", 50.0, "50", 0), ("fp8", 100.0, "100", 1)])
    one, other = [float(rect.attrib["width"]) for rect in svg(html).iter("rect")]
    assert other == pytest.approx(2 * one)
    assert [float(rect.attrib["width"]) for rect in svg(bars("none", [("a", 0.0, "0", 0)])).iter("rect")] == [0]
