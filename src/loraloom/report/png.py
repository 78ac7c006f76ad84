"""Figures as PNG, for model cards and slides: matplotlib on light paper, the page's colours."""

import os
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure as Canvas

from loraloom.report.model import Bars, Figure, Heatmap, Lines, Report, Scatter
from loraloom.report.palette import LIGHT, text_on
from loraloom.report.scale import cell_decimals, colour_range, colour_step, fixed, number
from loraloom.report.write import slug

DPI = 160
PREFIX = "figure-"


def write_pictures(report: Report, directory: Path) -> list[Path]:
    """One file a figure, `figure-01-loss.png`, in the order of the sections; pictures of an earlier report go."""
    for old in directory.glob(f"{PREFIX}*.png"):
        old.unlink()
    written: list[Path] = []
    for section in report.sections:
        if section.figure is None:
            continue
        path = directory / f"{PREFIX}{len(written) + 1:02d}-{slug(section.title)}.png"
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            picture(section.figure, section.title).savefig(file, format="png", dpi=DPI)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        written.append(path)
    return written


def picture(figure: Figure, title: str) -> Canvas:
    """The figure on a canvas of its own."""
    canvas = Canvas(figsize=_size(figure), facecolor=LIGHT.paper, layout="constrained")
    axes = canvas.add_subplot(facecolor=LIGHT.paper)
    axes.set_title(title, loc="left", color=LIGHT.ink, fontweight="bold", fontsize=12, pad=12)
    axes.tick_params(colors=LIGHT.muted, labelsize=9, length=3)
    axes.spines[:].set_visible(False)
    axes.xaxis.label.set_color(LIGHT.muted)
    axes.yaxis.label.set_color(LIGHT.muted)
    if isinstance(figure, Lines):
        _lines(figure, axes)
    elif isinstance(figure, Heatmap):
        _heatmap(figure, axes, canvas)
    elif isinstance(figure, Bars):
        _bars(figure, axes)
    else:
        _scatter(figure, axes)
    return canvas


def _size(figure: Figure) -> tuple[float, float]:
    """Inches."""
    if isinstance(figure, Heatmap):
        return min(3.0 + 0.75 * len(figure.columns), 11.0), min(1.8 + 0.27 * len(figure.rows), 16.0)
    if isinstance(figure, Bars):
        return 7.0, 1.3 + 0.42 * len(figure.labels)
    return 7.0, 4.0


def _lines(figure: Lines, axes: Axes) -> None:
    _grid(axes)
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label, yscale="log" if figure.log_y else "linear")
    axes.set_xscale("log" if figure.log_x else "linear")
    for i, series in enumerate(figure.series):
        colour = LIGHT.series[i % len(LIGHT.series)]
        style: dict[str, Any] = {
            "linestyle": "-" if i < len(LIGHT.series) else "--",
            "marker": "o" if len(series.x) <= 30 else None,
        }
        y = [float("nan") if value is None else value for value in series.y]
        axes.plot(series.x, y, color=colour, linewidth=1.8, markersize=4, label=series.name, **style)
    for name, height in figure.references.items():
        axes.axhline(height, color=LIGHT.muted, linewidth=1, linestyle=":")
        axes.annotate(name, (1, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=LIGHT.muted)
    for place, event in enumerate(figure.events):
        axes.axvline(event.x, color=LIGHT.muted, linewidth=1, linestyle="--")
        spot: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "va": "top", "fontsize": 8, "color": LIGHT.muted}
        axes.annotate(f" {event.label}", (event.x, 1 - 0.06 * place), **spot)
    axes.legend(frameon=False, labelcolor="linecolor", fontsize=9)


def _heatmap(figure: Heatmap, axes: Axes, canvas: Canvas) -> None:
    low, high = colour_range(figure)
    colours = LIGHT.diverging if figure.signed else LIGHT.sequential
    cells = [[float("nan") if value is None else value for value in row] for row in figure.values]
    spread = (low, high) if low < high else (low - 0.5, high + 0.5)
    image = axes.imshow(cells, cmap=ListedColormap(colours), vmin=spread[0], vmax=spread[1], aspect="auto")
    every = -(-len(figure.columns) // 24)
    axes.set_xticks(range(0, len(figure.columns), every), figure.columns[::every], rotation=40, ha="right")
    every = -(-len(figure.rows) // 48)
    axes.set_yticks(range(0, len(figure.rows), every), figure.rows[::every])
    axes.set(xlabel=figure.column_label, ylabel=figure.row_label)
    axes.tick_params(length=0)
    if len(figure.columns) <= 8 and len(figure.rows) <= 48:
        for i, row in enumerate(figure.values):
            for j, value in enumerate(row):
                if value is not None:
                    colour = text_on(colours[colour_step(value, low, high)])
                    text = fixed(value, cell_decimals(figure))
                    axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour)
    bar = canvas.colorbar(image, ax=axes, shrink=0.8, label=figure.unit)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=LIGHT.muted, labelsize=8, length=2)
    bar.ax.yaxis.label.set_color(LIGHT.muted)


def _bars(figure: Bars, axes: Axes) -> None:
    places = range(len(figure.labels))
    known = [(i, value) for i, value in zip(places, figure.values, strict=True) if value is not None]
    errors = None if figure.errors is None else [figure.errors[i] or 0 for i, _ in known]
    heights, lengths = [i for i, _ in known], [value for _, value in known]
    if figure.from_zero:
        axes.barh(heights, lengths, xerr=errors, color=LIGHT.series[0], height=0.6, capsize=3)
    else:
        axes.errorbar(lengths, heights, xerr=errors, color=LIGHT.series[0], fmt="o", capsize=3)
    for i, value in enumerate(figure.values):
        text = "no result" if value is None else number(value, figure.unit)
        spot: dict[str, Any] = {"va": "center", "fontsize": 9, "color": LIGHT.ink}
        if value is None:
            axes.annotate(f" {text}", (0, i), xycoords=("axes fraction", "data"), **spot)
            continue
        end = value + ((figure.errors[i] or 0) if figure.errors else 0)
        axes.annotate(f"  {text}", (max(end, 0) if figure.from_zero else end, i), **spot)
    axes.set_yticks(places, figure.labels)
    axes.set_ylim(len(figure.labels) - 0.4, -0.6)
    axes.margins(x=0.18)
    axes.set(xlabel=figure.value_label)
    if figure.from_zero:
        axes.set_xticks([])
    axes.tick_params(axis="y", length=0)


def _scatter(figure: Scatter, axes: Axes) -> None:
    _grid(axes)
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
    x, y = [point.x for point in figure.points], [point.y for point in figure.points]
    axes.plot(x, y, "o-" if figure.connected else "o", color=LIGHT.series[0], linewidth=1.5, markersize=6)
    for point in figure.points:
        axes.annotate(point.label, (point.x, point.y), xytext=(7, 4), textcoords="offset points", fontsize=9)
    axes.margins(0.12)


def _grid(axes: Axes) -> None:
    axes.grid(axis="y", color=LIGHT.rule, linewidth=0.8)
    axes.set_axisbelow(True)
