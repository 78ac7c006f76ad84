"""The tables of measured numbers in docs/, made from the rows in docs/benchmarks; no number in them is typed.

A page marks where a table goes, and nothing between the marks is written by hand:

    <!-- table: NAME -->
    ...
    <!-- end of table -->

    python -m benchmarks.tables            # writes all of them
    python -m benchmarks.tables --check    # names the pages that differ, and fails if there are any
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.tables import layers, optimizers, studies

ROOT = Path(__file__).parents[2]
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
TABLES: dict[str, Callable[[], Sequence[str]]] = {**layers.TABLES, **optimizers.TABLES, **studies.TABLES}


def pages() -> list[Path]:
    """Every page that may have a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """A page with its tables as the rows make them."""

    def block(match: re.Match[str]) -> str:
        lines = "\n".join(TABLES[match[2]]()).strip("\n")
        return f"{match[1]}\n{lines}\n\n{match[3]}"

    return MARKED.sub(block, text)
