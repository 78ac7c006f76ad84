"""A `Report` on the terminal, with rich: the facts, a small picture of each figure, short tables."""

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.table import Table as Grid
from rich.text import Text

from loraloom.report.describe import describe, figure_table, table_texts
from loraloom.report.model import Bars, Heatmap, Lines, Report, Scatter, Section, Table
from loraloom.report.palette import LIGHT, text_on
from loraloom.report.scale import cell_decimals, colour_range, colour_step, fixed, number

LEVELS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # characters of a small picture
MAX_ROWS = 16  # a longer table is only counted
MAX_COLUMNS = 12  # of a heatmap; a wider one is put into words


def render_terminal(report: Report) -> RenderableType:
    """What `console.print` draws; without colours it still says everything."""
    facts = Grid.grid(padding=(0, 2))
    for fact in report.summary:
        facts.add_row(Text(fact.label, "dim"), Text(fact.value, "bold"), Text(fact.note, "dim"))
    parts: list[RenderableType] = [Text(report.title, "bold"), Text(report.lead), Padding(facts, (1, 0, 0, 0))]
    for section in report.sections:
        parts += [Padding(Text(section.title, "bold"), (1, 0, 0, 0)), *_section(section)]
    return Group(*(part for part in parts if not (isinstance(part, Text) and not part.plain)))


def _section(section: Section) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(section.note, "dim")] if section.note else []
    figure = section.figure
    if isinstance(figure, Lines):
        parts.append(_sparklines(figure))
    elif isinstance(figure, Heatmap):
        parts.append(_cells(figure) if len(figure.columns) <= MAX_COLUMNS else Text(describe(figure)))
    elif isinstance(figure, Bars):
        parts.append(_bars(figure))
    elif isinstance(figure, Scatter) and section.table is None:
        parts.append(_table(figure_table(figure)))
    if section.table is not None:
        parts.append(_table(section.table))
    return parts


def _sparklines(figure: Lines) -> Grid:
    """A line per series: its shape, where it begins and where it ends."""
    grid = Grid.grid(padding=(0, 2))
    for series in figure.series:
        known = [y for y in series.y if y is not None]
        if not known:
            continue
        size = -(-len(known) // WIDTH)
        means = [sum(known[i : i + size]) / len(known[i : i + size]) for i in range(0, len(known), size)]
        low, high = min(means), max(means)
        spread = (high - low) or 1.0
        shape = "".join(LEVELS[min(int((mean - low) / spread * len(LEVELS)), len(LEVELS) - 1)] for mean in means)
        grid.add_row(Text(series.name), Text(shape), Text(f"{number(known[0])} to {number(known[-1])}"))
    for name, height in figure.references.items():
        grid.add_row(Text(name, "dim"), "", Text(number(height), "dim"))
    return grid


def _bars(figure: Bars) -> Grid:
    """Bars of equal scale; values below zero have none."""
    largest = max((value for value in figure.values if value is not None), default=0.0) or 1.0
    errors = figure.errors or [None] * len(figure.values)
    grid = Grid.grid(padding=(0, 2))
    for label, value, error in zip(figure.labels, figure.values, errors, strict=True):
        bar = "█" * max(0, round((value or 0.0) / largest * WIDTH)) if largest > 0 else ""
        spread = f" ± {number(error, figure.unit, digits=2)}" if error is not None else ""
        text = "no result" if value is None else number(value, figure.unit) + spread
        grid.add_row(Text(label), Text(bar, LIGHT.series[0]), Text(text))
    return grid


def _cells(figure: Heatmap) -> Grid:
    """The matrix with its numbers on the page's colours."""
    low, high = colour_range(figure)
    colours = LIGHT.diverging if figure.signed else LIGHT.sequential
    places = cell_decimals(figure)
    grid = Grid(box=None, padding=0, header_style="dim", pad_edge=False)
    grid.add_column(figure.row_label, justify="right")
    for name in figure.columns:
        grid.add_column(Text(f" {name.replace('.', chr(10))}"), justify="right")
    for name, row in zip(figure.rows, figure.values, strict=True):
        cells = [Text(f"{name} ", "dim")]
        for value in row:
            if value is None:
                cells.append(Text(" · ", "dim"))
                continue
            back = colours[colour_step(value, low, high)]
            cells.append(Text(f" {fixed(value, places)} ", Style(color=text_on(back), bgcolor=back)))
        grid.add_row(*cells)
    return grid


def _table(table: Table) -> RenderableType:
    if len(table.rows) > MAX_ROWS:
        return Text(f"{len(table.rows)} rows of {', '.join(filter(None, table.columns))}: see report.json", "dim")
    grid = Grid(header_style="dim", caption=table.caption or None)
    for name in table.columns:
        grid.add_column(Text(name))
    for row in table_texts(table.columns, table.rows):
        grid.add_row(*(Text(cell) for cell in row))
    return grid
