"""Reports: one `Report` as data, then report.json, one HTML page and pictures from it."""

from loraloom.report.model import (
    Bars,
    Event,
    Fact,
    Figure,
    Heatmap,
    Lines,
    Point,
    Report,
    Scatter,
    Section,
    Series,
    Table,
)
from loraloom.report.write import Written, write_report

__all__ = [
    "Bars",
    "Event",
    "Fact",
    "Figure",
    "Heatmap",
    "Lines",
    "Point",
    "Report",
    "Scatter",
    "Section",
    "Series",
    "Table",
    "Written",
    "write_report",
]
