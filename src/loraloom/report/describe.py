"""Figures in words and as tables: for readers who do not see the picture, or want its numbers."""

from collections.abc import Sequence

from loraloom.report.model import Bars, Cell, Figure, Heatmap, Lines, Table
from loraloom.text import amounts, column, number


def describe(figure: Figure) -> str:
    """One line with what a glance at the picture tells: extremes, first and last values."""
    if isinstance(figure, Lines):
        return f"{figure.y_label} over {figure.x_label}. " + " ".join(
            f"{series.name}: {number(known[0])} to {number(known[-1])}, lowest {number(min(known))}, highest "
            f"{number(max(known))}."
            for series in figure.series
            if (known := [y for _, y in series.pairs if y is not None])
        )
    if isinstance(figure, Heatmap):
        cells = [
            (value, row, column)
            for row, values in zip(figure.rows, figure.values, strict=True)
            for column, value in zip(figure.columns, values, strict=True)
            if value is not None
        ]
        what = f"{figure.unit or 'Values'} by {figure.row_label} and {figure.column_label}"
        if not cells:
            return f"{what}; no values."
        ends = [f"{number(v)} at {r}, {c}" for v, r, c in (min(cells), max(cells))]
        return f"{what}: {len(cells)} values, lowest {ends[0]}, highest {ends[1]}."
    if isinstance(figure, Bars):
        pairs = zip(figure.labels, figure.values, strict=True)
        return f"{figure.value_label}. " + " ".join(f"{label}: {number(value, figure.unit)}." for label, value in pairs)
    return f"{figure.y_label} against {figure.x_label}. " + " ".join(
        f"{point.label}: {number(point.x)}, {number(point.y)}." for point in figure.points
    )


def figure_table(figure: Figure) -> Table:
    """The figure's numbers, all of them."""
    if isinstance(figure, Lines):
        by_x: dict[float, dict[str, Cell]] = {}
        for series in figure.series:
            for x, y in series.pairs:
                by_x.setdefault(x, {})[series.name] = y
        names = [series.name for series in figure.series]
        rows = [[x, *(by_x[x].get(name) for name in names)] for x in sorted(by_x)]
        return Table([figure.x_label, *names], rows)  # the axis beside it says what is measured
    if isinstance(figure, Heatmap):
        named = [[name, *values] for name, values in zip(figure.rows, figure.values, strict=True)]
        return Table([figure.row_label, *figure.columns], named, figure.unit)
    if isinstance(figure, Bars):
        columns = ["", figure.value_label, *(["±"] if figure.errors else [])]
        cells = [figure.labels, amounts(figure.values, figure.unit)]
        cells += [[number(error, figure.unit, digits=2) for error in figure.errors]] if figure.errors else []
        return Table(columns, [list(row) for row in zip(*cells, strict=True)])
    return Table(["", figure.x_label, figure.y_label], [[p.label, p.x, p.y] for p in figure.points])


def table_texts(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[list[str]]:
    """The cells as text: the numbers of a column with the same decimals."""
    texts = []
    for i in range(len(columns)):
        cells = [row[i] for row in rows]
        numbers = iter(column([cell for cell in cells if not isinstance(cell, str)]))
        texts.append([cell if isinstance(cell, str) else next(numbers) for cell in cells])
    return [list(row) for row in zip(*texts, strict=True)]
