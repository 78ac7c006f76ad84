"""Figures as PNG, for model cards and slides: the page's drawings, rendered by resvg with the fonts in fonts/."""

import os
from pathlib import Path

import resvg_py

from loraloom.report.model import Figure, Report
from loraloom.report.svg import FONT, standalone_svg
from loraloom.text import slug

ZOOM = 2  # pixels of the picture per pixel of the drawing
PREFIX = "figure-"
FONT_FILES = [str(path) for path in sorted((Path(__file__).parent / "fonts").glob("*.ttf"))]


def write_pictures(report: Report, directory: Path) -> list[Path]:
    """One file a figure, `figure-01-loss.png`, in the order of the sections; pictures of an earlier report go."""
    for old in directory.glob(f"{PREFIX}*.png"):
        old.unlink()
    written: list[Path] = []
    for section in report.sections:
        if section.figure is None:
            continue
        path = directory / f"{PREFIX}{len(written) + 1:02d}-{slug(section.title)}.png"
        temporary = path.with_name(f".{path.name}.unfinished")
        temporary.write_bytes(picture(section.figure, section.title))
        os.replace(temporary, path)
        written.append(path)
    return written


def picture(figure: Figure, title: str) -> bytes:
    """The figure as a PNG file."""
    svg = standalone_svg(figure, title)
    drawn = resvg_py.svg_to_bytes(
        svg_string=svg, zoom=ZOOM, font_files=FONT_FILES, font_family=FONT, sans_serif_family=FONT
    )
    return bytes(drawn)
