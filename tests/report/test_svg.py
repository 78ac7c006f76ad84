"""The drawings hold their data: as many marks as values, labels that do not meet, text that stays text."""

import itertools
import math
import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageFont

from loraloom.report import Bars, Event, Heatmap, Lines, Point, Scatter, Series
from loraloom.report.drawing import LABEL_GAP, MAX_POINTS, NARROW, PLOT_HEIGHT, PLOT_WIDTH, width_of
from loraloom.report.png import FONT_FILES, picture
from loraloom.report.svg import draw, inline_svg, standalone_svg

from .support import HOSTILE, full_report, heatmap

PHONE = 260  # pixels of a plot area on a phone
FIGURES = [section.figure for section in full_report().sections if section.figure is not None]


def drawn(figure, title="A title"):
    return ET.fromstring(inline_svg(figure, title, "f1"))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.kind)
def test_every_figure_has_a_name_and_a_description(figure):
    svg = drawn(figure, HOSTILE)
    assert svg.get("role") == "img"
    title, description = svg.get("aria-labelledby").split()
    assert svg.find(f"title[@id='{title}']").text == HOSTILE
    assert svg.find(f"desc[@id='{description}']").text


def marks(svg, width):
    """Box of every mark in pixels, (left, top, right, bottom), for a plot area `width` wide: all that shows a value."""

    def pixels(element, name):
        value = element.get(name, "0")
        return float(value[:-1]) / 100 * width if value.endswith("%") else float(value)

    legend = {id(element) for group in svg.iter("g") if group.get("class") == "legend" for element in group.iter()}
    for element in svg.iter():
        if id(element) in legend or element.tag in ("svg", "g", "text", "title", "desc"):
            continue
        if element.tag == "rect":
            x, y = pixels(element, "x"), pixels(element, "y")
            yield x, y, x + pixels(element, "width"), y + pixels(element, "height")
        elif element.tag == "circle":  # its centre shows the value
            x, y = pixels(element, "cx"), pixels(element, "cy")
            yield x, y, x, y
        elif element.tag == "line":
            ends = [pixels(element, name) for name in ("x1", "y1", "x2", "y2")]
            if element.get("class") != "tick":
                yield ends[0], ends[1], ends[2], ends[3]
        else:
            numbers = [float(word) for word in re.findall(r"[-\d.e]+", element.get("d"))]
            xs, ys = [x / PLOT_WIDTH * width for x in numbers[::2]], numbers[1::2]
            if xs:
                yield min(xs), min(ys), max(xs), max(ys)


def check_inside(figure):
    drawn_figure = draw(figure)
    count = 0
    for width in (PHONE, PLOT_WIDTH):
        for left, top, right, bottom in marks(drawn_figure.svg, width):
            assert left >= -0.1, (left, top, right, bottom)
            assert right <= width * 1.001, (left, top, right, bottom)
            assert top >= -0.1, (left, top, right, bottom)
            assert bottom <= drawn_figure.height + 0.1, (left, top, right, bottom)
            count += 1
    return count


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.kind)
def test_nothing_is_drawn_outside_of_the_plot_area(figure):
    """Each mark with its width and height, on a phone and in a PNG; labels may use the margins."""
    assert check_inside(figure) > 4


def test_the_check_sees_what_is_outside():
    for tag, values in (
        ("rect", {"x": "50%", "width": "60%", "y": "0", "height": "1"}),
        ("rect", {"x": "0", "width": "1", "y": "230", "height": "20"}),
        ("circle", {"cx": "10%", "cy": "-3"}),
        ("line", {"x1": "0", "x2": "100%", "y1": "241", "y2": "241"}),
        ("path", {"d": "M0 0L640 300"}),
    ):
        svg = ET.Element("svg")
        ET.SubElement(svg, tag, values)
        (box,) = marks(svg, PLOT_WIDTH)
        assert box[0] < 0 or box[1] < 0 or box[2] > PLOT_WIDTH or box[3] > 240


values = st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6)
positive = st.floats(1e-6, 1e6)


@given(st.data(), st.booleans(), st.booleans())
def test_any_curves_stay_inside(data, log_x, log_y):
    x, y = positive if log_x else values, positive if log_y else values
    points = st.lists(st.tuples(x, y), min_size=1, max_size=6)
    series = [
        Series(f"s{i}", sorted(x for x, _ in line), [y for _, y in line], points=dots)
        for i, (line, dots) in enumerate(data.draw(st.lists(st.tuples(points, points), min_size=1, max_size=20)))
    ]
    references = {"baseline": data.draw(y)}
    events = [Event("an event", at) for at in data.draw(st.lists(x, max_size=20))]
    check_inside(Lines("x", "y", series, log_x, log_y, references, events))


@given(st.lists(st.tuples(values, values, st.sampled_from("ab")), min_size=1, max_size=12), st.booleans())
def test_any_points_stay_inside(points, connected):
    check_inside(Scatter("x", "y", [Point(f"p{i}", *point) for i, point in enumerate(points)], connected))


@given(
    st.lists(st.tuples(values, st.floats(0, 1e5), st.lists(values, max_size=3)), min_size=1, max_size=5),
    st.booleans(),
    st.none() | values,
)
def test_any_bars_stay_inside(rows, from_zero, whole):
    numbers, errors, samples = ([*column] for column in zip(*rows, strict=True))
    labels = [str(i) for i in range(len(rows))]
    check_inside(Bars("v", labels, numbers, errors, from_zero=from_zero, samples=samples, whole=whole))


@pytest.mark.parametrize(("whole", "width"), [(1.0, "50%"), (None, "100%"), (0.25, "100%")])
def test_a_bar_is_a_share_of_the_whole(whole, width):
    bar = drawn(Bars("accuracy", ["a"], [0.5], whole=whole)).find(".//rect[@class='s0']")
    assert bar.get("width") == width


def test_a_cell_for_every_value():
    figure = heatmap(5)
    cells = drawn(figure).find("g[@class='cells']")
    rects = cells.findall("rect")
    assert len(rects) == 5 * 7
    assert sum(rect.get("class") == "cell none" for rect in rects) == 1
    written = [text.text for text in cells.findall("text")]
    assert len(written) == 5 * 7
    assert written[0] == "·"
    assert float(written[1]) == pytest.approx(figure.values[0][1], abs=0.005)


def test_the_largest_value_has_the_last_color():
    figure = Heatmap("r", "c", ["a", "b"], ["x", "y"], [[0.0, 1.0], [2.0, 4.0]])
    classes = [rect.get("class") for rect in drawn(figure).find("g[@class='cells']").findall("rect")]
    assert (classes[0], classes[-1]) == ("cell q0", "cell q10")
    fixed_range = Heatmap("r", "c", ["a"], ["x"], [[0.5]], low=0.0, high=1.0)
    assert drawn(fixed_range).find("g[@class='cells']/rect").get("class") == "cell q5"


def test_single_results_are_rings_of_their_curve():
    svg = drawn(Lines("x", "y", [Series("s", [0, 1], [1.0, 2.0], points=[(1, 1.5), (1, 2.5)])]))
    rings = [circle for circle in svg.iter("circle") if circle.get("class") == "ring s0"]
    assert [ring.get("cx") for ring in rings] == ["100%", "100%"]


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


def test_names_of_points_meet_neither_each_other_nor_a_point():
    points = [Point(f"λ = {i / 9:.1f}", i, -i * i) for i in range(10)]
    svg = drawn(Scatter("kept", "gained", points, connected=True))
    boxes = [box_of(text) for text in svg.findall("text") if text.get("class") == "label"]
    assert len(boxes) >= 6
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or abs(one[1] - other[1]) >= LABEL_GAP
    for circle in svg.findall("circle"):
        x, y = float(circle.get("cx")[:-1]) / 100 * NARROW, float(circle.get("cy"))
        assert not any(left < x < right and base - 11 < y < base + 4 for left, base, right in boxes)


def box_of(text):
    """(left, baseline, right) in pixels of a phone's plot area."""
    x, width = float(text.get("x")[:-1]) / 100 * NARROW, width_of(text.text)
    left = x - {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor")]
    return left, float(text.get("y")), left + width


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
    assert picture(figure, "A title").startswith(b"\x89PNG")


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.kind)
def test_every_word_of_a_picture_lies_on_it(figure):
    """Measured with the very fonts that resvg draws with."""
    root = ET.fromstring(standalone_svg(figure, "A title").replace(' xmlns="http://www.w3.org/2000/svg"', ""))
    plain, bold = (ImageFont.truetype(path, 120) for path in sorted(FONT_FILES, key=len))
    plot = root.find("svg")
    width, height = float(root.get("width")), float(root.get("height"))
    left, top = float(plot.get("x")), float(plot.get("y"))
    checked = 0
    for spot in (plot, *plot.iter("svg")):
        at = float(spot.get("x", "0%")[:-1]) / 100 * PLOT_WIDTH if spot is not plot else 0.0
        for text in spot.iter("text") if spot is plot else spot.findall("text"):
            x, dx = text.get("x", "0"), float(text.get("dx", "0"))
            size = {"small": 11.5, "on": 11}.get(text.get("class", "").split(" ")[0], 12)
            long = (bold if "strong" in text.get("class", "") else plain).getlength(text.text) * size / 120
            if text.get("transform"):
                if spot is plot:
                    continue
                along = long * math.cos(math.radians(46))
                assert left + at + along <= width
                assert top - 7 - along * math.tan(math.radians(46)) >= 0
                checked += 1
                continue
            start = left + at + dx + (float(x[:-1]) / 100 * PLOT_WIDTH if x.endswith("%") else float(x))
            middle = "on" in text.get("class", "").split(" ")
            anchor = "middle" if middle else text.get("text-anchor", "start")
            start -= {"start": 0, "middle": long / 2, "end": long}[anchor]
            assert start >= 0, text.text
            assert start + long <= width, text.text
            assert 8 <= top + float(text.get("y", "0")) <= height, text.text
            checked += 1
    assert checked > 2
