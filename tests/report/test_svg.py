"""The drawings hold their data: as many marks as values, labels that do not meet, text that stays text."""

import itertools
from xml.etree import ElementTree as ET

import pytest

from loraloom.report import Bars, Heatmap, Lines, Point, Scatter, Series
from loraloom.report.svg import LABEL_GAP, MAX_POINTS, PLOT_HEIGHT, figure_svg

from .support import HOSTILE, full_report, heatmap

FIGURES = [section.figure for section in full_report().sections if section.figure is not None]


def drawn(figure, title="A title"):
    return ET.fromstring(figure_svg(figure, title, "f1"))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.kind)
def test_every_figure_has_a_name_and_a_description(figure):
    svg = drawn(figure, HOSTILE)
    assert svg.get("role") == "img"
    title, description = svg.get("aria-labelledby").split()
    assert svg.find(f"title[@id='{title}']").text == HOSTILE
    assert svg.find(f"desc[@id='{description}']").text


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.kind)
def test_nothing_is_drawn_outside_of_the_plot_area(figure):
    """Marks, that is; labels may use the margins."""
    for element in drawn(figure).iter():
        for name in ("x", "x1", "x2", "cx", "width"):
            value = element.get(name, "0%")
            if value.endswith("%"):
                assert -0.01 <= float(value[:-1]) <= 100.01


def test_a_cell_for_every_value():
    figure = heatmap(5)
    cells = drawn(figure).find("g[@class='cells']")
    rects = cells.findall("rect")
    assert len(rects) == 5 * 7
    assert sum(rect.get("class") == "none" for rect in rects) == 1
    written = [text.text for text in cells.findall("text")]
    assert len(written) == 5 * 7
    assert written[0] == "·"
    assert float(written[1]) == pytest.approx(figure.values[0][1], abs=0.005)


def test_the_largest_value_has_the_last_colour():
    figure = Heatmap("r", "c", ["a", "b"], ["x", "y"], [[0.0, 1.0], [2.0, 4.0]])
    classes = [rect.get("class") for rect in drawn(figure).find("g[@class='cells']").findall("rect")]
    assert (classes[0], classes[-1]) == ("q0", "q10")
    fixed_range = Heatmap("r", "c", ["a"], ["x"], [[0.5]], low=0.0, high=1.0)
    assert drawn(fixed_range).find("g[@class='cells']/rect").get("class") == "q5"


def test_a_missing_value_lifts_the_pen():
    path = drawn(Lines("x", "y", [Series("s", [0, 1, 2, 3], [1.0, None, 2.0, 3.0])])).find(".//path").get("d")
    assert path.count("M") == 2
    assert path.count("L") == 1


def test_a_long_curve_is_thinned_and_keeps_its_spike():
    xs = [float(i) for i in range(10_000)]
    ys = [1.0] * 10_000
    ys[7777] = 9.0
    path = drawn(Lines("x", "y", [Series("s", xs, [*ys])])).find(".//path").get("d")
    points = path[1:].split("L")
    assert len(points) <= MAX_POINTS + 2
    heights = [float(point.split()[1]) for point in points]
    assert min(heights) == pytest.approx((1 - (9 - 0) / 10) * PLOT_HEIGHT, abs=0.5)


def test_labels_at_the_end_of_curves_do_not_meet():
    series = [Series(f"s{i}", [0, 1], [1.0, 1 + i / 1000]) for i in range(8)]
    labels = [
        t
        for t in drawn(Lines("x", "y", [*series, Series("t", [0, 1], [0.0, 5.0])])).findall("text")
        if t.get("dx") == "8"
    ]
    heights = sorted(float(label.get("y")) for label in labels)
    assert len(heights) == 9
    assert all(b - a >= LABEL_GAP - 0.01 for a, b in itertools.pairwise(heights))
    assert max(heights) <= PLOT_HEIGHT


def test_points_close_together_get_labels_apart():
    figure = Scatter("x", "y", [Point(f"p{i}", 1 + i / 100, 1.0) for i in range(3)] + [Point("far", 9, 2)])
    labels = [t for t in drawn(figure).findall("text") if t.get("class") == "label"]
    assert len({label.get("y") for label in labels[:3]}) == 3


def test_bars_begin_at_zero_and_a_missing_one_says_so():
    svg = drawn(Bars("v", ["a", "b", "c", "d"], [-1.0, 3.0, None, 0.0]))
    bars = [rect for rect in svg.findall("rect") if rect.get("class") == "s0"]
    assert [(bar.get("x"), bar.get("width")) for bar in bars] == [("0%", "25%"), ("25%", "75%"), ("25%", "0%")]
    assert "no result" in [text.text for text in svg.findall("text")]


@pytest.mark.parametrize(
    "figure",
    [
        Lines("x", "y", []),
        Lines("x", "y", [Series("s", [], [])]),
        Lines("x", "y", [Series("s", [3.0], [2.0])]),
        Lines("x", "y", [Series("s", [3.0], [None])]),
        Heatmap("r", "c", [], [], []),
        Heatmap("r", "c", ["a"], ["b"], [[None]]),
        Heatmap("r", "c", ["a"], ["b"], [[1.0]]),
        Bars("b", [], []),
        Bars("b", ["a"], [0.0]),
        Scatter("x", "y", []),
        Scatter("x", "y", [Point("p", 1.0, 1.0)]),
    ],
    ids=repr,
)
def test_little_or_nothing_to_show_is_no_error(figure):
    assert drawn(figure).get("class").startswith("figure")
