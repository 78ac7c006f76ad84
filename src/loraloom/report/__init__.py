"""Reports: one `Report` as data, then report.json, one HTML page, pictures and the terminal from it."""

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
from loraloom.report.schema import SCHEMA_VERSION, from_dict, load_report, to_dict
from loraloom.report.terminal import render_terminal
from loraloom.report.write import Written, write_report

__all__ = [
    "SCHEMA_VERSION",
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
    "from_dict",
    "load_report",
    "render_terminal",
    "to_dict",
    "write_report",
]
