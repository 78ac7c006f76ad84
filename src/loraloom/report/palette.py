"""The colors of a report, for light and dark pages, chosen to stay apart for color-blind readers too.

Series are Okabe and Ito's hues, darkened on light paper and lightened on dark. Both ramps have equal steps of lightness
(OKLab), so they also read in grey: magnitudes from paper to ink, signed values from blue over paper to orange.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Palette:
    """One mode of the page; `sequential` and `diverging` have `scale.COLOR_STEPS` colors."""

    paper: str
    raised: str
    ink: str
    muted: str
    rule: str
    series: tuple[str, ...]
    sequential: tuple[str, ...]
    diverging: tuple[str, ...]


LIGHT = Palette(
    paper="#fcfcfa",
    raised="#f3f4f1",
    ink="#1b1f23",
    muted="#5a646d",
    rule="#dfe2e0",
    series=("#0068a3", "#c24e00", "#007f5c", "#a84a8b", "#8a6100", "#4a5560"),
    sequential=(
        *("#eef5f1", "#c5e4da", "#9dd1c8", "#77bdbf", "#4ea8b5"),
        *("#3c8fad", "#2a76a5", "#235e95", "#1e4683", "#1a3269", "#141f4d"),
    ),
    diverging=(
        *("#174a80", "#2f6ba4", "#518ec4", "#82b0d6", "#b7d2e5"),
        *("#f2f2ef", "#f1c9a9", "#e5a06f", "#d47834", "#b15b1f", "#8f3f06"),
    ),
)
DARK = Palette(
    paper="#14181b",
    raised="#1c2226",
    ink="#e6e9eb",
    muted="#98a3ac",
    rule="#2c3439",
    series=("#5bb4f0", "#ff9350", "#3ccfa0", "#e59ac6", "#e0b84a", "#a9b4c0"),
    sequential=(
        *("#1a2630", "#1d394d", "#1e4d68", "#1f637c", "#247a8a"),
        *("#32938f", "#4eaa91", "#73bf91", "#98d492", "#c5e4a5", "#f0f4b8"),
    ),
    diverging=(
        *("#a9d6ff", "#72b2e9", "#4b8dc6", "#32699b", "#294865"),
        *("#22282e", "#5c3e2b", "#945423", "#c27337", "#e69a61", "#ffc79b"),
    ),
)
DARK_TEXT, LIGHT_TEXT = "#14181b", "#ffffff"


def luminance(color: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2.2), 0 to 1."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colors (WCAG 2.2), 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def text_on(color: str) -> str:
    """The text color that reads better on `color`."""
    return max((DARK_TEXT, LIGHT_TEXT), key=lambda text: contrast(text, color))


def variables(palette: Palette) -> dict[str, str]:
    """The palette as CSS custom properties, names without their dashes; `q3-ink` is the text on `q3`."""
    named = {name: getattr(palette, name) for name in ("paper", "raised", "ink", "muted", "rule")}
    for prefix, colors in (("s", palette.series), ("q", palette.sequential), ("d", palette.diverging)):
        named |= {f"{prefix}{i}": color for i, color in enumerate(colors)}
    for prefix, colors in (("q", palette.sequential), ("d", palette.diverging)):
        named |= {f"{prefix}{i}-ink": text_on(color) for i, color in enumerate(colors)}
    return named
