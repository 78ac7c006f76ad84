"""From values to the cells and lines of a table in Markdown."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parents[2] / "docs" / "benchmarks"


def rows_of(name: str) -> Any:
    """The content of a file of rows."""
    return json.loads((ROWS / name).read_text(encoding="utf-8"))


def lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """``0.932 (0.928 to 0.936)``: mean, least and most."""
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def mib(count: float) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:.1f} MiB"


def significant(value: float, digits: int = 3) -> str:
    """With so many significant digits, and no exponent."""
    text = f"{value:.{digits}g}"
    return text if "e" not in text else f"{float(text):f}".rstrip("0").rstrip(".")
