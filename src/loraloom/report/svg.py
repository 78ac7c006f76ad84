"""The one renderer of figures. A drawing becomes an element of the page, or a picture of its own for a PNG.

There is no viewBox around a figure of the page: the plot area is as wide as the page allows, and text keeps its size on
a phone and a wide screen, without a script. The rules for colors and text are figure.css.
"""

import re
from pathlib import Path
from xml.etree import ElementTree as ET

from loraloom.report.describe import describe
from loraloom.report.drawing import PLOT_WIDTH, Drawing, add, cut
from loraloom.report.figures import draw_bars, draw_heatmap, draw_lines, draw_scatter
from loraloom.report.model import Bars, Figure, Heatmap, Lines
from loraloom.report.palette import LIGHT, variables

PADDING = 20  # pixels around a picture of its own
TITLE = 30  # pixels for its title
FONT = "DejaVu Sans Condensed"  # of pictures; it is in fonts/, the page takes the reader's own


def draw(figure: Figure) -> Drawing:
    """The figure as a plot area with margins."""
    if isinstance(figure, Lines):
        return draw_lines(figure)
    if isinstance(figure, Heatmap):
        return draw_heatmap(figure)
    return draw_bars(figure) if isinstance(figure, Bars) else draw_scatter(figure)


def inline_svg(figure: Figure, title: str, name: str) -> str:
    """The figure as an element of the page, as wide as its place.

    Args:
        figure: what to draw.
        title: its accessible name; the description is made of the numbers.
        name: an id that no other figure of the page has.
    """
    drawn = draw(figure)
    svg = drawn.svg
    margins = f"{drawn.top:.0f}px {drawn.right:.0f}px {drawn.bottom:.0f}px {drawn.left:.0f}px"
    svg.set("class", f"figure {drawn.kind}")
    svg.set("style", f"width:calc(100% - {drawn.left + drawn.right:.0f}px);margin:{margins}")
    svg.set("role", "img")
    svg.set("aria-labelledby", f"{name}-title {name}-desc")
    for place, (tag, text) in enumerate((("title", title), ("desc", describe(figure)))):
        element = ET.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        svg.insert(place, element)
    return ET.tostring(svg, encoding="unicode")


def standalone_svg(figure: Figure, title: str) -> str:
    """The figure as a picture of its own: on light paper, with its title, colors as plain values."""
    drawn = draw(figure)
    width = drawn.left + PLOT_WIDTH + drawn.right + 2 * PADDING
    height = TITLE + drawn.top + drawn.height + drawn.bottom + 2 * PADDING
    size = {"width": f"{width:.0f}", "height": f"{height:.0f}"}
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": FONT, **size})
    add(root, "style", _plain(figure_css()))
    add(root, "rect", width="100%", height="100%", fill=LIGHT.paper)
    add(root, "text", cut(title, 80), x=PADDING, y=PADDING + 10, cls="title")
    drawn.svg.set("class", f"figure {drawn.kind}")
    for key, value in (
        ("x", PADDING + drawn.left),
        ("y", PADDING + TITLE + drawn.top),
        ("width", PLOT_WIDTH),
    ):
        drawn.svg.set(key, f"{value:g}")
    drawn.svg.set("overflow", "visible")
    root.append(drawn.svg)
    return ET.tostring(root, encoding="unicode")


def figure_css() -> str:
    """The rules of every figure; one class per color: `s0` is a series' fill and stroke, `q3` a cell's fill."""
    rules = [(Path(__file__).parent / "figure.css").read_text(encoding="utf-8").rstrip()]
    for name in variables(LIGHT):
        if name[0] in "qd" and name[1].isdigit():
            rules.append(f"svg .{name} {{ fill: var(--{name}); }}")
        elif name[0] == "s" and name[1:].isdigit():
            rules.append(f"svg .{name} {{ fill: var(--{name}); }}")
            rules.append(f"svg .curve.{name}, svg .ring.{name} {{ fill: none; stroke: var(--{name}); }}")
    return "\n".join(rules)


def _plain(css: str) -> str:
    """The rules with the light palette's values in place of variables, for renderers that know none."""
    values = variables(LIGHT)
    return re.sub(r"var\(--([\w-]+)\)", lambda match: values[match[1]], css)
