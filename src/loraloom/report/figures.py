"""How each kind of figure is drawn: curves, points, bars, cells."""

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree as ET

from loraloom.report.drawing import (
    CHARACTER,
    LABEL_GAP,
    NARROW,
    PLOT_HEIGHT,
    SERIES_COLORS,
    Drawing,
    Taken,
    add,
    apart,
    cut,
    drawing,
    height_of,
    path_of,
    percent,
    stretched,
    thinned,
    width_of,
)
from loraloom.report.model import Bars, Event, Heatmap, Lines, Scatter
from loraloom.report.scale import COLOR_STEPS, Axis, cell_decimals, color_range, color_step, linear_axis, log_axis
from loraloom.text import amounts, column, fixed, number

Attributes = dict[str, Any]
BAR_ROW, BAR = 40, 14  # pixels of a bar with its name, and of the bar
FEW_POINTS = 30  # of a curve; they get a dot each
WRITTEN_ALWAYS, WRITTEN = 8, 16  # columns up to which a heatmap's cells hold numbers, on a phone too and else


def draw_lines(figure: Lines) -> Drawing:
    """Curves with their names at their ends, rings for single results, baselines dotted, events as vertical rules."""
    rings = [point for series in figure.series for point in series.points]
    xs = [x for series in figure.series for x in series.x] + [x for x, _ in rings] + [e.x for e in figure.events]
    ys = [y for series in figure.series for y in series.y if y is not None] + [y for _, y in rings]
    x_axis = log_axis(xs) if figure.log_x else _fitting(xs)
    y_axis = (log_axis if figure.log_y else linear_axis)([*ys, *figure.references.values()])
    height = float(max(PLOT_HEIGHT, LABEL_GAP * (len(figure.series) + len(figure.references))))
    ends: list[tuple[float, str, str]] = []
    for i, series in enumerate(figure.series):
        last = next((y for _, y in reversed(series.pairs) if y is not None), None)
        if last is not None:
            ends.append((height_of(y_axis, last, height), series.name, f"s{i % SERIES_COLORS}"))
    lines = [(height_of(y_axis, y, height), label, "muted") for label, y in figure.references.items()]
    if len(ends) == 1 and not lines and ends[0][1] == figure.y_label:
        ends = []  # the axis says it
    labels = [label for _, label, _ in [*ends, *lines]]
    drawn = _plot(figure.x_label, figure.y_label, x_axis, y_axis, height, labels)
    svg = drawn.svg
    for y, _, _ in lines:
        add(svg, "line", x1="0", x2="100%", y1=y, y2=y, cls="reference")
    for event in figure.events:
        at = percent(x_axis.share(event.x))
        add(svg, "line", x1=at, x2=at, y1=0, y2=height, cls="event")
    inner = stretched(svg, height)
    for i, series in enumerate(figure.series):
        color = f"s{i % SERIES_COLORS}"
        dashed = " dashed" if i >= SERIES_COLORS else ""
        pairs = zip(series.x, series.y, strict=True)
        points = [(x_axis.share(x), None if y is None else height_of(y_axis, y, height)) for x, y in pairs]
        add(inner, "path", d=path_of(thinned(points)), cls=f"curve {color}{dashed}")
        if len(points) <= FEW_POINTS:
            for share, top in points:
                if top is not None:
                    add(svg, "circle", cx=percent(share), cy=top, r=3, cls=color)
        for x, y in series.points:
            cy = height_of(y_axis, y, height)
            add(svg, "circle", cx=percent(x_axis.share(x)), cy=cy, r=3.5, cls=f"ring {color}")
    for y, label, color in apart(ends + lines, height):
        add(svg, "text", cut(label), x="100%", y=y, dx=8, dy=".32em", cls=f"label {color}")
    _event_names(svg, figure.events, x_axis, height)
    return drawn


def draw_scatter(figure: Scatter) -> Drawing:
    """Points with their names, a color for each group, joined in their order where they are steps of one sweep."""
    groups = list(dict.fromkeys(point.group for point in figure.points))
    x_axis = _fitting([point.x for point in figure.points], tight=False)
    y_axis = linear_axis([point.y for point in figure.points])
    drawn = _plot(figure.x_label, figure.y_label, x_axis, y_axis, PLOT_HEIGHT, [])
    colors = {group: f"s{i % SERIES_COLORS}" for i, group in enumerate(groups)}
    places = [(x_axis.share(p.x), height_of(y_axis, p.y), p) for p in figure.points]
    if figure.connected:
        inner = stretched(drawn.svg, PLOT_HEIGHT)
        for group in groups:
            path = path_of([(x, y) for x, y, point in places if point.group == group])
            add(inner, "path", d=path, cls=f"curve {colors[group]}")
    taken = Taken()
    for x, y, _ in places:  # a label may not lie on a point
        taken.block(x * NARROW - 4, x * NARROW + 4, y - 4, y + 4)
    for x, y, point in places:
        color = colors[point.group]
        add(drawn.svg, "circle", cx=percent(x), cy=y, r=4.5, cls=color)
        width = width_of(point.label)
        room = width / 2 / NARROW
        anchor, start = ("start", 0.0) if x < room else ("end", -width) if x > 1 - room else ("middle", -width / 2)
        tops = [top for top in (y - 10, y + 20, y - 25, y + 35) if 8 <= top <= PLOT_HEIGHT - 2]
        top = taken.claim(x * NARROW + start, width, tops)
        if top is not None:
            add(drawn.svg, "text", point.label, x=percent(x), y=top, text_anchor=anchor, cls="label")
    if len(groups) > 1:
        legend = add(drawn.svg, "g", cls="legend")
        for i, group in enumerate(groups):
            add(legend, "circle", cx=5, cy=PLOT_HEIGHT + 58 + i * LABEL_GAP, r=4.5, cls=colors[group])
            add(legend, "text", group, x=16, y=PLOT_HEIGHT + 62 + i * LABEL_GAP, cls="small")
        return _with_bottom(drawn, drawn.bottom + 10 + LABEL_GAP * len(groups))
    return drawn


def draw_bars(figure: Bars) -> Drawing:
    """Bars from zero, or points on an axis, each under its name, the value at the right; whiskers for errors."""
    errors = figure.errors or [None] * len(figure.values)
    samples = figure.samples or [[] for _ in figure.values]
    spans = [(v - (e or 0), v + (e or 0)) for v, e in zip(figure.values, errors, strict=True) if v is not None]
    reach = [end for span in spans for end in span] + [value for row in samples for value in row]
    reach += [0.0, *([figure.whole] if figure.whole is not None else [])] if figure.from_zero else []
    axis = Axis(min(reach), max(reach), []) if figure.from_zero and min(reach) < max(reach) else linear_axis(reach)
    height = BAR_ROW * len(figure.labels)
    side = 0 if figure.from_zero else 6  # room for points at the ends of the axis
    drawn = drawing("bars", height, left=side, right=side, bottom=0 if figure.from_zero else 30)
    svg = drawn.svg
    texts = amounts(figure.values, figure.unit)
    for i, (label, value, error) in enumerate(zip(figure.labels, figure.values, errors, strict=True)):
        top = i * BAR_ROW + 19
        middle = top + BAR / 2
        add(svg, "text", cut(label, 30), x="0", y=top - 6, cls="ink")
        spread = f" ± {number(error, figure.unit, digits=2)}" if error is not None else ""
        text = texts[i] + spread if value is not None else "no result"
        add(svg, "text", text, x="100%", y=top - 6, text_anchor="end", cls="strong")
        add(svg, "rect", x="0", y=top, width="100%", height=BAR, cls="track")
        for sample in samples[i]:
            add(svg, "circle", cx=percent(axis.share(sample)), cy=middle, r=4, cls="ring s0")
        if value is None:
            continue
        if figure.from_zero:
            start, end = sorted((axis.share(0.0), axis.share(value)))
            add(svg, "rect", x=percent(start), y=top, width=percent(end - start), height=BAR, cls="s0")
        if error:
            low, high = percent(axis.share(value - error)), percent(axis.share(value + error))
            for x1, x2, half in ((low, high, 0), (low, low, 4), (high, high, 4)):
                add(svg, "line", x1=x1, x2=x2, y1=middle - half, y2=middle + half, cls="whisker")
        if not figure.from_zero:
            add(svg, "circle", cx=percent(axis.share(value)), cy=middle, r=5, cls="s0")
    if not figure.from_zero:
        for tick, label in _sparse(axis):
            anchor = {axis.low: "start", axis.high: "end"}.get(tick, "middle")
            place = {"x": percent(axis.share(tick)), "text_anchor": anchor, "cls": "small"}
            add(svg, "text", label, y=height + 8, **place)
        add(svg, "text", figure.value_label, x="100%", y=height + 24, text_anchor="end", cls="small")
    return drawn


def draw_heatmap(figure: Heatmap) -> Drawing:
    """Colored cells with their values where there is room, row names at the left, and the colors' legend below."""
    columns, rows = len(figure.columns), len(figure.rows)
    height = 24 if rows <= 40 else 16
    low, high = color_range(figure)
    places = cell_decimals(figure)
    ramp = "d" if figure.signed else "q"
    names = [cut(name, 24) for name in figure.columns]
    longest = max(map(width_of, names), default=0.0)
    upright = longest <= NARROW / max(columns, 1)
    thinned_names = not upright and all(name.lstrip("-").isdigit() for name in figure.columns)
    slanted = not (upright or thinned_names)
    top = 26 + (longest * 0.72 if slanted else 14)
    right = max(0.0, longest * 0.7 - NARROW / 2 / max(columns, 1)) if slanted else longest / 2
    left = min(max(map(width_of, [*figure.rows, figure.row_label])), 24 * CHARACTER) + 10
    drawn = drawing("heatmap", rows * height, left=left, right=right, top=top, bottom=74)
    svg = drawn.svg
    corner = f"{figure.row_label} ↓  {figure.column_label} →"
    add(svg, "text", corner, x="0", dx=-left, y=-top + 12, cls="small")
    every = -(-columns // 6) if thinned_names else 1
    for j, name in enumerate(names[::every]):
        spot = add(svg, "svg", x=percent((j * every + 0.5) / columns), y=-7, overflow="visible")
        turn = {"transform": "rotate(-46)"} if slanted else {"text_anchor": "middle"}
        add(spot, "text", name, **turn)
    cells = add(svg, "g", cls="cells" if columns <= WRITTEN_ALWAYS else "cells dense")
    every = 1 if height > 14 else 2
    for i, name in enumerate(figure.rows):
        middle = (i + 0.5) * height
        if i % every == 0:
            add(svg, "text", cut(name, 24), x="0", dx=-8, y=middle, dy=".32em", text_anchor="end")
        for j, value in enumerate(figure.values[i]):
            place: Attributes = {"x": percent(j / columns), "width": percent(1 / columns)}
            place |= {"y": i * height, "height": height}
            written: Attributes = {"x": percent((j + 0.5) / columns), "y": middle, "dy": ".32em"}
            if value is None:
                add(cells, "rect", **place, cls="cell none")
                add(cells, "text", "·", **written, cls="on")
                continue
            step = color_step(value, low, high)
            rect = add(cells, "rect", **place, cls=f"cell {ramp}{step}")
            if rows * columns <= 800:
                add(rect, "title", f"{name}, {figure.columns[j]}: {number(value)}")
            if columns <= WRITTEN:
                add(cells, "text", fixed(value, places), **written, cls=f"on {ramp}{step}-ink")
    _legend(svg, figure, rows * height + 16, ramp, low, high)
    return drawn


def _legend(svg: ET.Element, figure: Heatmap, top: float, ramp: str, low: float, high: float) -> None:
    group = add(svg, "g", cls="legend")
    if low == high:
        add(group, "text", f"every cell: {number(low)} {figure.unit}", x="0", y=top + 10, cls="small")
        return
    add(group, "text", figure.unit, x="0", y=top + 8, cls="small")
    for step in range(COLOR_STEPS):
        add(group, "rect", x=step * 16, y=top + 16, width=16.5, height=10, cls=f"{ramp}{step}")
    for x, anchor, text in ((0, "start", number(low, digits=3)), (176, "end", number(high, digits=3))):
        add(group, "text", text, x=x, y=top + 41, text_anchor=anchor, cls="small")


def _event_names(svg: ET.Element, events: Sequence[Event], axis: Axis, height: float) -> None:
    """The names of the events near the top, above the curves; a name that finds no room stays out."""
    taken = Taken()
    for event in events:
        share, text = axis.share(event.x), cut(event.label, 20)
        start = share * NARROW - (width_of(text) + 5 if share > 0.5 else -5)
        top = taken.claim(start, width_of(text), [12 + row * LABEL_GAP for row in range(int(height / 3 / LABEL_GAP))])
        if top is not None:
            side: Attributes = {"text_anchor": "end", "dx": -5} if share > 0.5 else {"dx": 5}
            add(svg, "text", text, x=percent(share), y=top, cls="small halo", **side)


def _plot(
    x_label: str, y_label: str, x_axis: Axis, y_axis: Axis, height: float, right_labels: Sequence[str]
) -> Drawing:
    """The frame that curves and points share: grid, ticks and the names of the axes."""
    labels, x_labels = _tick_labels(y_axis), _tick_labels(x_axis)
    left = max(map(width_of, labels)) + 12
    right = max([width_of(cut(label)) + 14 for label in right_labels] + [width_of(x_labels[-1]) / 2 + 4])
    drawn = drawing("plot", height, left=left, right=right, top=28, bottom=46)
    svg = drawn.svg
    add(svg, "text", cut(y_label, 40), x="0", dx=-left, y=-14, cls="small")
    add(svg, "text", cut(x_label, 40), x="100%", y=height + 38, text_anchor="end", cls="small")
    for tick, label in zip(y_axis.ticks, labels, strict=True):
        y = height_of(y_axis, tick, height)
        add(svg, "line", x1="0", x2="100%", y1=y, y2=y, cls="grid")
        add(svg, "text", label, x="0", dx=-8, y=y, dy=".32em", text_anchor="end")
    for tick, label in zip(x_axis.ticks, x_labels, strict=True):
        share = percent(x_axis.share(tick))
        add(svg, "line", x1=share, x2=share, y1=height, y2=height + 5, cls="tick")
        add(svg, "text", label, x=share, y=height + 19, text_anchor="middle")
    return drawn


def _fitting(values: Sequence[float], tight: bool = True) -> Axis:
    """A linear x axis with as many ticks as a phone has room to name."""
    for count in (5, 4, 3, 2):
        axis = linear_axis(values, tight=tight, count=count)
        if sum(width_of(label) + CHARACTER for label in _tick_labels(axis)) <= NARROW:
            break
    return axis


def _sparse(axis: Axis) -> Sequence[tuple[float, str]]:
    """Every tick and its label, or every second one, whichever a phone has room to name."""
    labels = _tick_labels(axis)
    named = [*zip(axis.ticks, labels, strict=True)]
    return named if sum(width_of(label) + CHARACTER for label in labels) <= NARROW else named[::2]


def _tick_labels(axis: Axis) -> list[str]:
    """The numbers at an axis; on a linear one all have the same decimals."""
    return [number(tick) for tick in axis.ticks] if axis.log else column(axis.ticks)


def _with_bottom(drawn: Drawing, bottom: float) -> Drawing:
    return Drawing(drawn.svg, drawn.kind, drawn.height, drawn.left, drawn.right, drawn.top, bottom)
