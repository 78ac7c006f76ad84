"""What intruder analysis reports: layers, the cost of mitigating them, and the trade-off over scales."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from loraloom.intruders.find import LayerIntruders
from loraloom.text import printable


@dataclass(frozen=True)
class IntruderReport:
    """The intruders of an adapter, layer by layer, and what reducing them cost if they were reduced."""

    adapter: str
    top_k: int
    epsilon: float
    layers: list[LayerIntruders]
    scale: float | None = None
    """None for detection alone."""
    scope: str | None = None
    rank: str | int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    """By layer: what the limited rank lost of the mitigated update, relative to it."""

    @property
    def count(self) -> int:
        """Intruders in all layers."""
        return sum(len(layer.intruders) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vectors, ready for JSON."""
        return {
            "adapter": self.adapter,
            "top_k": self.top_k,
            "epsilon": self.epsilon,
            "scale": self.scale,
            "scope": self.scope,
            "rank": self.rank,
            "count": self.count,
            "layers": [layer.to_dict() | _error(self.errors, layer.name) for layer in self.layers],
        }

    def table(self) -> Table:
        """One row per layer, for a rich console: its intruders and the lowest of their cosines, and the update's size.

        Narrow, because names of modules are long.
        """
        headings = ("module", "intruders", "cosine", "eff. rank", "dW / W")
        table = Table(*headings, box=None, pad_edge=False, header_style="bold")
        table.columns[0].overflow = "fold"
        if self.errors:
            table.add_column("error")
        for layer in self.layers:
            smallest = f"{'' if layer.exact else '< '}{min(layer.cosines):.3f}" if layer.intruders else ""
            norm = "" if layer.relative_norm is None else f"{layer.relative_norm:.4f}"
            row: list[str | Text] = [
                Text(printable(layer.name)),
                f"{len(layer.intruders)} of {len(layer.cosines)}",
                smallest,
                f"{layer.effective_rank:.1f}/{layer.rank}",
                norm,
            ]
            table.add_row(*row, *([f"{self.errors[layer.name]:.2g}"] if self.errors else []))
        return table


def _error(errors: dict[str, float], name: str) -> dict[str, float]:
    return {"error": errors[name]} if name in errors else {}


@dataclass(frozen=True)
class SweepPoint:
    """One scale of a sweep."""

    scale: float
    """Of the intruders, or with `rewound` t of ``W + t dW``; at 1 both are the adapter."""
    metrics: dict[str, float]
    """What the evaluation returned."""
    error: float
    """The largest truncation error of any layer."""
    rewound: bool = False


@dataclass(frozen=True)
class SweepReport:
    """The trade-off: what each scale makes of the metrics."""

    intruders: IntruderReport
    points: list[SweepPoint]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vectors, ready for JSON."""
        return {"intruders": self.intruders.to_dict(), "points": [asdict(point) for point in self.points]}

    def table(self) -> Table:
        """One row per scale, for a rich console; with rewinding, what is scaled comes first."""
        rewinds = any(point.rewound for point in self.points)
        names = list(dict.fromkeys(name for point in self.points for name in point.metrics))
        headings = (name.replace("_", " ") for name in names)
        table = Table(
            *(["scaled"] if rewinds else []), "scale", *headings, box=None, pad_edge=False, header_style="bold"
        )
        lossy = any(point.error for point in self.points)
        if lossy:
            table.add_column("error")
        for point in self.points:
            values = (_number(point.metrics[name]) if name in point.metrics else "" for name in names)
            scaled = [scaled_words(point)] if rewinds else []
            table.add_row(*scaled, f"{point.scale:g}", *values, *([f"{point.error:.2g}"] if lossy else []))
        return table


def scaled_words(point: SweepPoint) -> str:
    """What a point's scale was applied to."""
    return "-" if point.scale == 1 else "all of dW" if point.rewound else "intruders"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
