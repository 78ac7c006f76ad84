"""What a report is: facts, sections, figures as data. Nothing here draws; docs/report.md describes the JSON of it.

A verb turns its result into a `Report`; `write_report` makes report.json, the page and the pictures of it. Wherever a
number may be missing it is None, never NaN, so that the JSON is one that every reader takes. A figure or table whose
sizes contradict each other raises ValueError when it is made.
"""

from dataclasses import dataclass, field

Cell = str | int | float | None


@dataclass(frozen=True)
class Fact:
    """A number worth knowing by itself. The first four of a report are set large, up to a long value."""

    label: str
    """What it is, in a few words."""
    value: str
    """As people read it, with its unit: "0.8853", "1.10 GiB"."""
    note: str = ""
    """What it compares with: "0.1277 before training"."""


@dataclass(frozen=True)
class Series:
    """One line of `Lines`; shape of x and y: (points,)."""

    name: str
    x: list[float]
    y: list[float | None]
    """None leaves a gap."""
    points: list[tuple[float, float]] = field(default_factory=list)
    """Single results that the line is the mean of, (x, y) each: one per seed."""

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"series {self.name!r} has {len(self.x)} x and {len(self.y)} y; expected as many")

    @property
    def pairs(self) -> list[tuple[float, float | None]]:
        """The points of the line; where there is no line, the single results."""
        return [*zip(self.x, self.y, strict=True)] if self.x else [*self.points]


@dataclass(frozen=True)
class Event:
    """A moment to mark on the x axis of `Lines`."""

    label: str
    """A few words: "8 adapters dropped"."""
    x: float


@dataclass(frozen=True)
class Lines:
    """Curves over one axis, such as a loss over steps."""

    x_label: str
    y_label: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = False
    """A logarithmic axis; every value on it must be above 0."""
    references: dict[str, float] = field(default_factory=dict)
    """Heights to compare with, by name: a baseline."""
    events: list[Event] = field(default_factory=list)
    kind: str = "lines"

    def __post_init__(self) -> None:
        for series in self.series:
            xs, ys = [*series.x, *(x for x, _ in series.points)], [*series.y, *(y for _, y in series.points)]
            for axis, log, values in (("x", self.log_x, xs), ("y", self.log_y, ys)):
                lowest = min((value for value in values if value is not None), default=1.0)
                if log and lowest <= 0:
                    raise ValueError(
                        f"series {series.name!r} has {lowest:g} on a logarithmic axis; set log_{axis} to false"
                    )


@dataclass(frozen=True)
class Heatmap:
    """A matrix as colors; shape of values: (rows, columns)."""

    row_label: str
    column_label: str
    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]
    """None where there is nothing, such as a module that a layer does not have."""
    unit: str = ""
    """What the colors measure: "gate", "‖ΔW‖ / ‖W‖"."""
    signed: bool = False
    """Colors on both sides of zero, for values whose sign matters."""
    low: float | None = None
    """Value of the first color; default: the smallest value (signed: minus the largest magnitude)."""
    high: float | None = None
    """Value of the last color; default: the largest value (signed: the largest magnitude)."""
    kind: str = "heatmap"

    def __post_init__(self) -> None:
        widths = sorted({len(row) for row in self.values})
        if len(self.values) != len(self.rows) or widths not in ([], [len(self.columns)]):
            raise ValueError(
                f"values have {len(self.values)} rows of {widths} values; expected {len(self.rows)} rows of "
                f"{len(self.columns)}, as there are names of rows and columns"
            )


@dataclass(frozen=True)
class Bars:
    """Amounts side by side, such as memory by method; shape of values and errors: (labels,)."""

    value_label: str
    labels: list[str]
    values: list[float | None]
    """None where there is no result; it is shown as missing."""
    errors: list[float | None] | None = None
    """Half the length of each whisker, in the unit of the values: say in the section's note what it is."""
    unit: str = ""
    """"bytes", "s", "%" or any other, shown behind each value; "bytes" is made readable."""
    from_zero: bool = True
    """False shows points on an axis around the values, for differences that bars from zero would hide."""
    whole: float | None = None
    """The value of a full bar, such as 1 for shares; None: the largest value. For bars from zero."""
    samples: list[list[float]] | None = None
    """Single results behind each value: one per seed."""
    kind: str = "bars"

    def __post_init__(self) -> None:
        for name, given in (("values", self.values), ("samples", self.samples), ("errors", self.errors)):
            if given is not None and len(given) != len(self.labels):
                raise ValueError(f"{len(self.labels)} labels and {len(given)} {name}; expected as many")


@dataclass(frozen=True)
class Point:
    """One point of `Scatter`."""

    label: str
    x: float
    y: float
    group: str = ""
    """Points of a group share a color, and a line if they are connected."""


@dataclass(frozen=True)
class Scatter:
    """Two amounts against each other, such as what is kept against what is gained."""

    x_label: str
    y_label: str
    points: list[Point]
    connected: bool = False
    """Join the points of each group in their order, where they are steps of one sweep."""
    kind: str = "scatter"


Figure = Lines | Heatmap | Bars | Scatter


@dataclass(frozen=True)
class Table:
    """Rows under headings. Numbers stay numbers: a renderer rounds and aligns them."""

    columns: list[str]
    rows: list[list[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} cells and the table {len(self.columns)} columns")


@dataclass(frozen=True)
class Section:
    """A heading with a sentence, a figure, a table, or all of them."""

    title: str
    note: str = ""
    """What is shown and how to read it."""
    figure: Figure | None = None
    table: Table | None = None
    """Default: the figure's own numbers, so that every picture has a table beside it."""
    folded: Table | None = None
    """A table that opens on demand; its caption is its heading."""


@dataclass(frozen=True)
class Report:
    """One page. `created` and `versions` are filled in where they are left empty (see `write_report`)."""

    title: str
    command: str
    """What was typed, to do it again."""
    lead: str = ""
    """The result in a sentence or two."""
    summary: list[Fact] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    created: str = ""
    """ISO 8601, UTC."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package to version."""
