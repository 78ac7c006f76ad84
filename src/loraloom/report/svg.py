"""Figures as inline SVG that fits any width without scaling its text, and takes its colours from the page's CSS.

There is no viewBox around a figure: the plot area is as wide as the page allows, positions along it are per cent, while
heights, text and margins are pixels. So a phone and a wide screen get the same readable labels, and no script is
needed. Curves, whose points can't be per cent, sit in an inner picture that stretches; its strokes do not.
"""

from xml.etree import ElementTree as ET

from loraloom.report.describe import describe
from loraloom.report.model import Bars, Figure, Heatmap, Lines, Scatter
from loraloom.report.scale import (
    COLOUR_STEPS,
    Axis,
    amounts,
    cell_decimals,
    colour_range,
    colour_step,
    fixed,
    linear_axis,
    log_axis,
    number,
)

PLOT_HEIGHT = 240
LABEL_GAP = 15  # pixels between the baselines of two labels
CHARACTER = 6.6  # pixels of an average character at the figures' text size
NARROW = 260  # width of the plot area on a phone
STRETCH = 1000  # width of the inner pictures' own coordinates
SERIES_COLOURS = 6
MAX_POINTS = 400  # per curve: more than a screen can show


def figure_svg(figure: Figure, title: str, name: str) -> str:
    """The figure as one `<svg>` element.

    Args:
        figure: what to draw.
        title: its accessible name; the description is made of the numbers.
        name: an id that no other figure of the page has.
    """
    draw = {Lines: draw_lines, Heatmap: draw_heatmap, Bars: draw_bars, Scatter: draw_scatter}[type(figure)]
    svg = draw(figure)  # type: ignore[operator]  # each takes its own kind of figure
    svg.set("role", "img")
    svg.set("aria-labelledby", f"{name}-title {name}-desc")
    for place, (tag, text) in enumerate((("title", title), ("desc", describe(figure)))):
        element = ET.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        svg.insert(place, element)
    return ET.tostring(svg, encoding="unicode")


def draw_lines(figure: Lines) -> ET.Element:
    """Curves with their names at their ends, baselines dashed, events as vertical rules."""
    xs = [x for series in figure.series for x in series.x] + [event.x for event in figure.events]
    ys = [y for series in figure.series for y in series.y if y is not None] + list(figure.references.values())
    x_axis = log_axis(xs) if figure.log_x else linear_axis(xs, tight=True)
    y_axis = log_axis(ys) if figure.log_y else linear_axis(ys)
    ends: list[tuple[float, str, str]] = []
    for i, series in enumerate(figure.series):
        last = next((y for y in reversed(series.y) if y is not None), None)
        if last is not None:
            ends.append((_height(y_axis, last), series.name, f"s{i % SERIES_COLOURS}"))
    ends += [(_height(y_axis, y), label, "muted") for label, y in figure.references.items()]
    svg = _plot(figure.x_label, figure.y_label, x_axis, y_axis, right=_room(label for _, label, _ in ends))
    for y, _, _ in ends[len(ends) - len(figure.references) :] if figure.references else []:
        _add(svg, "line", x1="0", x2="100%", y1=y, y2=y, **{"class": "reference"})
    for event in figure.events:
        at = _percent(x_axis.share(event.x))
        _add(svg, "line", x1=at, x2=at, y1=0, y2=PLOT_HEIGHT, **{"class": "event"})
    inner = _stretched(svg, PLOT_HEIGHT)
    for i, series in enumerate(figure.series):
        colour = f"s{i % SERIES_COLOURS}"
        dashed = " dashed" if i >= SERIES_COLOURS else ""
        pairs = zip(series.x, series.y, strict=True)
        points = [(x_axis.share(x), None if y is None else _height(y_axis, y)) for x, y in pairs]
        _add(inner, "path", d=_path(_thinned(points)), **{"class": f"curve {colour}{dashed}"})
        if len(points) <= 30:
            for share, height in points:
                if height is not None:
                    _add(svg, "circle", cx=_percent(share), cy=height, r="3", **{"class": colour})
    for y, label, colour in _apart(ends):
        text = _add(svg, "text", x="100%", y=y, dx="8", dy=".32em", **{"class": f"label {colour}"})
        text.text = _cut(label)
    for place, event in enumerate(figure.events):  # above the curves, whose lines a label interrupts
        share = x_axis.share(event.x)
        anchor = {"text-anchor": "end", "dx": "-5"} if share > 0.5 else {"dx": "5"}
        text = _add(svg, "text", x=_percent(share), y=12 + place * LABEL_GAP, **anchor, **{"class": "small halo"})
        text.text = event.label
    return svg


def draw_scatter(figure: Scatter) -> ET.Element:
    """Points with their names, joined in their order where they are one sweep."""
    x_axis = linear_axis([point.x for point in figure.points])
    y_axis = linear_axis([point.y for point in figure.points])
    svg = _plot(figure.x_label, figure.y_label, x_axis, y_axis, right=24)
    places = [(x_axis.share(point.x), _height(y_axis, point.y), point.label) for point in figure.points]
    if figure.connected:
        _add(_stretched(svg, PLOT_HEIGHT), "path", d=_path([(x, y) for x, y, _ in places]), **{"class": "curve s0"})
    taken: list[tuple[float, float, float]] = []
    for x, y, label in places:
        _add(svg, "circle", cx=_percent(x), cy=y, r="4.5", **{"class": "s0"})
        anchor = "start" if x < 0.04 else "end" if x > 0.96 else "middle"
        place: dict[str, str | float] = {
            "x": _percent(x),
            "y": _free(x, y, label, taken),
            "text-anchor": anchor,
            "class": "label",
        }
        _add(svg, "text", **place).text = label
    return svg


def draw_bars(figure: Bars) -> ET.Element:
    """Bars from zero, or points on an axis, each under its name, the value at the right; whiskers for errors."""
    row, thick = 40, 14
    errors = figure.errors or [None] * len(figure.values)
    spans = [(v - (e or 0), v + (e or 0)) for v, e in zip(figure.values, errors, strict=True) if v is not None]
    reach = [end for span in spans for end in span] + ([0.0] if figure.from_zero else [])
    axis = Axis(min(reach), max(reach), []) if figure.from_zero and min(reach) < max(reach) else linear_axis(reach)
    svg = _svg(row * len(figure.labels), "bars", bottom=0 if figure.from_zero else 26)
    texts = amounts(figure.values, figure.unit)
    for i, (label, value, error) in enumerate(zip(figure.labels, figure.values, errors, strict=True)):
        top, middle = i * row + 19, i * row + 19 + thick / 2
        _add(svg, "text", x="0", y=top - 6).text = _cut(label, 30)
        spread = f" ± {number(error, figure.unit, digits=2)}" if error is not None else ""
        text = _add(svg, "text", x="100%", y=top - 6, **{"text-anchor": "end", "class": "strong"})
        text.text = texts[i] + spread if value is not None else "no result"
        _add(svg, "rect", x="0", y=top, width="100%", height=thick, **{"class": "track"})
        if value is None:
            continue
        if figure.from_zero:
            start, end = sorted((axis.share(0.0), axis.share(value)))
            bar = {"x": _percent(start), "width": _percent(end - start), "class": "s0"}
            _add(svg, "rect", y=top, height=thick, **bar)
        if error:
            low, high = _percent(axis.share(value - error)), _percent(axis.share(value + error))
            for x1, x2, half in ((low, high, 0), (low, low, 4), (high, high, 4)):
                _add(svg, "line", x1=x1, x2=x2, y1=middle - half, y2=middle + half, **{"class": "whisker"})
        if not figure.from_zero:
            _add(svg, "circle", cx=_percent(axis.share(value)), cy=middle, r="5", **{"class": "s0"})
    if not figure.from_zero:
        for tick in axis.ticks:
            anchor = {axis.low: "start", axis.high: "end"}.get(tick, "middle")
            place = {"x": _percent(axis.share(tick)), "text-anchor": anchor, "class": "small"}
            _add(svg, "text", y=row * len(figure.labels) + 8, **place).text = number(tick)
    return svg


def draw_heatmap(figure: Heatmap) -> ET.Element:
    """Coloured cells with their values where there is room, row names at the left, and the colours' legend below."""
    columns, rows = len(figure.columns), len(figure.rows)
    height = 24 if rows <= 40 else 16
    low, high = colour_range(figure)
    places = cell_decimals(figure)
    ramp = "d" if figure.signed else "q"
    upright = max(map(len, figure.columns), default=0) * CHARACTER <= 300 / max(columns, 1)
    thinned = not upright and all(name.lstrip("-").isdigit() for name in figure.columns)
    slanted = not (upright or thinned)
    longest = max(map(len, figure.columns), default=0) * CHARACTER
    top = 24 + (longest * 0.72 if slanted else 14)
    right = max(0.0, longest * 0.7 - 150 / max(columns, 1)) if slanted else 0.0
    left = min(max(map(len, [*figure.rows, figure.row_label])) * CHARACTER + 10, 170)
    svg = _svg(rows * height, "heatmap", left=left, right=right, top=top, bottom=62)
    _add(
        svg, "text", x="0", dx=-left, y=-top + 12, **{"class": "small"}
    ).text = f"{figure.row_label} ↓  {figure.column_label} →"
    every = -(-columns // 6) if thinned else 1
    for j, name in enumerate(figure.columns):
        if j % every:
            continue
        spot = _add(svg, "svg", x=_percent((j + 0.5) / columns), y=-7, **{"class": "spot"})
        turn = {"transform": "rotate(-46)"} if slanted else {"text-anchor": "middle"}
        _add(spot, "text", **turn).text = name
    cells = _add(svg, "g", **{"class": "cells"})
    every = 1 if height > 14 else 2
    for i, name in enumerate(figure.rows):
        middle = (i + 0.5) * height
        if i % every == 0:
            _add(svg, "text", x="0", dx="-8", y=middle, dy=".32em", **{"text-anchor": "end"}).text = _cut(name, 24)
        for j, value in enumerate(figure.values[i]):
            place: dict[str, str | float] = {"x": _percent(j / columns), "width": _percent(1 / columns)}
            place |= {"y": i * height, "height": height}
            if value is None:
                _add(cells, "rect", **place, **{"class": "none"})
                _add(cells, "text", x=_percent((j + 0.5) / columns), y=middle, dy=".32em", **{"class": "on"}).text = "·"
                continue
            step = colour_step(value, low, high)
            rect = _add(cells, "rect", **place, **{"class": f"{ramp}{step}"})
            if rows * columns <= 800:
                _add(rect, "title").text = f"{name}, {figure.columns[j]}: {number(value)}"
            if columns <= 8:
                text = _add(cells, "text", x=_percent((j + 0.5) / columns), y=middle, dy=".32em")
                text.set("class", f"on {ramp}{step}-ink")
                text.text = fixed(value, places)
    _legend(svg, figure, rows * height + 18, ramp, low, high)
    return svg


def _legend(svg: ET.Element, figure: Heatmap, top: float, ramp: str, low: float, high: float) -> None:
    group = _add(svg, "g", **{"class": "legend"})
    if low == high:
        _add(group, "text", x="0", y=top + 10, **{"class": "small"}).text = f"every cell: {number(low)} {figure.unit}"
        return
    for step in range(COLOUR_STEPS):
        _add(group, "rect", x=step * 16, y=top, width=16.5, height=10, **{"class": f"{ramp}{step}"})
    for x, anchor, text in ((0, "start", number(low, digits=3)), (176, "end", number(high, digits=3))):
        _add(group, "text", x=x, y=top + 25, **{"text-anchor": anchor, "class": "small"}).text = text
    _add(group, "text", x=186, y=top + 9, **{"class": "small"}).text = figure.unit


def _plot(x_label: str, y_label: str, x_axis: Axis, y_axis: Axis, right: float) -> ET.Element:
    """The frame that curves and points share: grid, ticks and the names of the axes."""
    labels = [number(tick) for tick in y_axis.ticks]
    left = max(map(len, labels)) * CHARACTER + 12
    svg = _svg(PLOT_HEIGHT, "plot", left=left, right=right, top=28, bottom=46)
    _add(svg, "text", x="0", dx=-left, y="-14", **{"class": "small"}).text = y_label
    _add(svg, "text", x="100%", y=PLOT_HEIGHT + 38, **{"text-anchor": "end", "class": "small"}).text = x_label
    for tick, label in zip(y_axis.ticks, labels, strict=True):
        y = _height(y_axis, tick)
        _add(svg, "line", x1="0", x2="100%", y1=y, y2=y, **{"class": "grid"})
        _add(svg, "text", x="0", dx="-8", y=y, dy=".32em", **{"text-anchor": "end"}).text = label
    for tick in x_axis.ticks:
        share = _percent(x_axis.share(tick))
        _add(svg, "line", x1=share, x2=share, y1=PLOT_HEIGHT, y2=PLOT_HEIGHT + 5, **{"class": "tick"})
        _add(svg, "text", x=share, y=PLOT_HEIGHT + 19, **{"text-anchor": "middle"}).text = number(tick)
    return svg


def _svg(height: float, kind: str, left: float = 0, right: float = 0, top: float = 0, bottom: float = 0) -> ET.Element:
    """The plot area; what it needs around itself is its margin, into which it draws."""
    margins = f"width:calc(100% - {left + right:.0f}px);margin:{top:.0f}px {right:.0f}px {bottom:.0f}px {left:.0f}px"
    return ET.Element("svg", {"class": f"figure {kind}", "height": f"{height:g}", "style": margins})


def _stretched(svg: ET.Element, height: float) -> ET.Element:
    """An inner picture whose own width of `STRETCH` fills the plot area."""
    box = {"viewBox": f"0 0 {STRETCH} {height:g}", "preserveAspectRatio": "none"}
    return _add(svg, "svg", width="100%", height=height, **box, **{"class": "stretched"})


def _add(parent: ET.Element, tag: str, **attributes: str | float) -> ET.Element:
    texts = {name: value if isinstance(value, str) else f"{value:.6g}" for name, value in attributes.items()}
    return ET.SubElement(parent, tag, texts)


def _percent(share: float) -> str:
    return f"{share * 100:.4g}%"


def _height(axis: Axis, value: float) -> float:
    return round((1 - axis.share(value)) * PLOT_HEIGHT, 2)


def _path(points: list[tuple[float, float | None]] | list[tuple[float, float]]) -> str:
    """The points as a path; None lifts the pen."""
    parts, drawing = [], False
    for x, y in points:
        if y is not None:
            parts.append(f"{'L' if drawing else 'M'}{x * STRETCH:.5g} {y:.5g}")
        drawing = y is not None
    return "".join(parts)


def _thinned(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most about `MAX_POINTS`: of each run of points the highest and the lowest, so that no spike is lost."""
    size = -(-len(points) // (MAX_POINTS // 2))
    if size <= 2:
        return points
    thinned: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        run = [point for point in points[start : start + size] if point[1] is not None]
        if not run:
            thinned.append(points[start])
            continue
        extremes = {min(run, key=lambda p: p[1] or 0), max(run, key=lambda p: p[1] or 0)}
        thinned += sorted(extremes)
    return thinned


def _apart(labels: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Labels moved down, then up, until no two are closer than a line of text."""
    placed: list[list[float]] = []
    ordered = sorted(labels)
    for y, _, _ in ordered:
        placed.append([max(y, placed[-1][0] + LABEL_GAP) if placed else y])
    limit = float(PLOT_HEIGHT)
    for spot in reversed(placed):
        spot[0] = min(spot[0], limit)
        limit = spot[0] - LABEL_GAP
    return [(spot[0], text, colour) for spot, (_, text, colour) in zip(placed, ordered, strict=True)]


def _free(x: float, y: float, label: str, taken: list[tuple[float, float, float]]) -> float:
    """A height above or below y at which a label around x meets no earlier one, on a phone either; remembers it."""
    width = len(label) * CHARACTER / NARROW

    def clear(height: float) -> bool:
        return all(abs(x - tx) > (width + w) / 2 or abs(height - ty) >= LABEL_GAP for tx, ty, w in taken)

    heights = [y + shift for shift in (-10, 20, -10 - LABEL_GAP, 20 + LABEL_GAP, -10 - 2 * LABEL_GAP)]
    height = next(filter(clear, heights), heights[0])
    taken.append((x, height, width))
    return height


def _room(labels: object) -> float:
    return max((len(_cut(str(label))) for label in labels), default=0) * CHARACTER + 14  # type: ignore[attr-defined]


def _cut(label: str, limit: int = 16) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"
