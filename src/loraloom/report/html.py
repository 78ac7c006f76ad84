"""A `Report` as one HTML file: inline CSS and SVG, no script, light and dark, from a phone's width to a desk's."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from loraloom.report.describe import figure_table, table_texts
from loraloom.report.model import Bars, Cell, Heatmap, Report, Section, Table
from loraloom.report.palette import DARK, LIGHT, Palette, variables
from loraloom.report.svg import figure_css, inline_svg
from loraloom.text import MINUS, MISSING

TILES, WIDEST_TILE = 4, 14  # facts set large, and characters of their values
MAX_ROWS = 240  # of a table on the page; a longer one shows evenly spaced rows of it
COLUMNS_BESIDE = 4  # a wider table goes below its figure


@dataclass(frozen=True)
class _Shown:
    """A table as text; `numeric` are the columns of numbers."""

    columns: list[str]
    rows: list[list[str]]
    caption: str
    numeric: set[int]


@dataclass(frozen=True)
class _Part:
    """A section ready for the template."""

    name: str
    title: str
    note: str
    svg: Markup | None
    table: _Shown | None
    beside: bool
    """Figure and table share a row where the page is wide enough."""
    hidden: bool
    """The table repeats what the figure already writes out, so it opens on demand."""
    folded: _Shown | None


def render_html(report: Report) -> str:
    """The page.

    Args:
        report: with `created` and `versions` filled in.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    created = datetime.fromisoformat(report.created)
    large = [*itertools.takewhile(lambda fact: len(fact.value) <= WIDEST_TILE, report.summary[:TILES])]
    return environment.get_template("page.html.j2").render(
        report=report,
        created=f"{created:%-d %B %Y, %H:%M} UTC",
        css=Markup(_css()),
        tiles=large,
        facts=report.summary[len(large) :],
        sections=[_part(section, f"s{i}") for i, section in enumerate(report.sections, start=1)],
    )


def _css() -> str:
    light, dark = (_rules(palette) for palette in (LIGHT, DARK))
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{figure_css()}\n{style}"


def _rules(palette: Palette) -> str:
    return " ".join(f"--{name}: {color};" for name, color in variables(palette).items())


def _part(section: Section, name: str) -> _Part:
    figure = section.figure
    table = section.table or (figure_table(figure) if figure is not None else None)
    svg = None if figure is None else Markup(inline_svg(figure, section.title, f"{name}-figure"))
    hidden = isinstance(figure, Heatmap | Bars) and section.table is None
    return _Part(
        name=name,
        title=section.title,
        note=section.note,
        svg=svg,
        table=None if table is None else _shown(table),
        beside=svg is not None and table is not None and len(table.columns) <= COLUMNS_BESIDE and not hidden,
        hidden=hidden,
        folded=None if section.folded is None else _shown(section.folded),
    )


def _shown(table: Table) -> _Shown:
    numeric = {i for i in range(len(table.columns)) if _is_numeric([row[i] for row in table.rows])}
    step = -(-len(table.rows) // MAX_ROWS)
    rows, caption = table.rows, table.caption
    if step > 1:
        rows = [*table.rows[:-1:step], table.rows[-1]]
        caption = f"{caption} One row in {step}, and the last; all {len(table.rows)} are in report.json.".strip()
    return _Shown(table.columns, table_texts(table.columns, rows), caption, numeric)


def _is_numeric(cells: Sequence[Cell]) -> bool:
    """Whether a column holds numbers: also those that come as text with a unit, "1.10 GiB"."""
    known = [cell for cell in cells if cell is not None]
    return bool(known) and all(
        not isinstance(cell, str) or cell[:1] in {*"0123456789-+", MINUS, MISSING} for cell in known
    )
