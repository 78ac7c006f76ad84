"""What the drawings of figures share: a plot area with margins, marks placed by shares of it, labels that keep apart.

Horizontal positions are per cent of the plot area, so the same drawing fits a phone, a desk and a PNG; heights, text
and margins are pixels. Curves, whose points cannot be per cent, sit in an inner picture that stretches.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from loraloom.report.scale import Axis

PLOT_WIDTH = 640  # of the plot area in a PNG, and the inner pictures' own coordinates
PLOT_HEIGHT = 240
LABEL_GAP = 15  # pixels between the baselines of two labels
CHARACTER = 6.6  # pixels of an average character at the figures' text size
NARROW = 240  # width of the plot area on a phone
MAX_POINTS = 400  # per curve: more than a screen can show
SERIES_COLORS = 6


@dataclass(frozen=True)
class Drawing:
    """A figure as SVG: the plot area, and the room that it needs around itself for text, in pixels."""

    svg: ET.Element
    kind: str
    height: float
    left: float = 0
    right: float = 0
    top: float = 0
    bottom: float = 0


def drawing(kind: str, height: float, **margins: float) -> Drawing:
    """An empty plot area."""
    return Drawing(ET.Element("svg", {"height": f"{height:g}"}), kind, height, **margins)


def add(parent: ET.Element, tag: str, text: str = "", **attributes: str | float) -> ET.Element:
    """A child with text; `cls` is its class, and underscores in other names are dashes."""
    names = {"cls": "class", **{name: name.replace("_", "-") for name in attributes if name != "cls"}}
    values = {n: value if isinstance(value, str) else f"{value:.6g}" for n, value in attributes.items()}
    element = ET.SubElement(parent, tag, {names[name]: value for name, value in values.items()})
    element.text = text or None
    return element


def percent(share: float) -> str:
    """A share of the plot area's width."""
    return f"{share * 100:.4g}%"


def height_of(axis: Axis, value: float, height: float = PLOT_HEIGHT) -> float:
    """Pixels from the top of a plot area `height` high."""
    return round((1 - axis.share(value)) * height, 2)


def stretched(svg: ET.Element, height: float) -> ET.Element:
    """An inner picture whose own width of `PLOT_WIDTH` fills the plot area."""
    box = {"viewBox": f"0 0 {PLOT_WIDTH} {height:g}", "preserveAspectRatio": "none", "overflow": "visible"}
    return add(svg, "svg", width="100%", height=height, **box)


def path_of(points: Iterable[tuple[float, float | None]]) -> str:
    """Points (share of the width, pixels) as a path; None lifts the pen."""
    parts, drawing = [], False
    for x, y in points:
        if y is not None:
            parts.append(f"{'L' if drawing else 'M'}{x * PLOT_WIDTH:.5g} {y:.5g}")
        drawing = y is not None
    return "".join(parts)


def thinned(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most about `MAX_POINTS`: the highest and the lowest of each run of points, so that no spike is lost."""
    size = -(-len(points) // (MAX_POINTS // 2))
    if size <= 2:
        return points
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        run = [(x, y) for x, y in points[start : start + size] if y is not None]
        if not run:
            kept.append(points[start])
            continue
        kept += sorted({min(run, key=lambda point: point[1]), max(run, key=lambda point: point[1])})
    return kept


def apart(labels: list[tuple[float, str, str]], height: float) -> list[tuple[float, str, str]]:
    """(y, text, class) moved down, then up, until no two are closer than a line of text; `height` holds them all."""
    ordered = sorted(labels)
    places: list[float] = []
    for y, _, _ in ordered:
        places.append(max(y, places[-1] + LABEL_GAP) if places else y)
    limit = height
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - LABEL_GAP
    return [(place, text, color) for place, (_, text, color) in zip(places, ordered, strict=True)]


class Taken:
    """What is taken of a phone's plot area, as boxes in pixels, so that later labels can avoid it."""

    def __init__(self) -> None:
        self.boxes: list[tuple[float, float, float, float]] = []

    def block(self, left: float, right: float, top: float, bottom: float) -> None:
        """Keep labels out of a box."""
        self.boxes.append((left, right, top, bottom))

    def claim(self, left: float, width: float, baselines: Iterable[float]) -> float | None:
        """The first of the baselines at which a label of this width is free, which it then takes; None if none is."""
        for y in baselines:
            box = (left, left + width, y - LABEL_GAP + 4, y + 4)
            if not any(_overlap(box, other) for other in self.boxes):
                self.block(*box)
                return y
        return None


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


def width_of(text: str) -> float:
    """About how many pixels wide a text is."""
    return len(text) * CHARACTER


def cut(text: str, limit: int = 16) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
