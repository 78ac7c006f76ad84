"""Words for people: the nearest name, numbers and sizes, modules by their place, a table of plain text."""

import difflib
import math
import re
from collections.abc import Iterable, Sequence

MINUS, MISSING = "\N{MINUS SIGN}", "\N{EN DASH}"


def nearest(name: str, candidates: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The up to `count` candidates that are most similar to `name`, of those with a similarity of `cutoff`."""
    return difflib.get_close_matches(name, list(candidates), n=count, cutoff=cutoff)


def did_you_mean(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean 'x'?` for the candidate nearest to `name`, or nothing when none has a similarity of `cutoff`."""
    near = nearest(name, candidates, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def printable(text: str, *, lines: bool = True) -> str:
    """The text with what a terminal would obey, such as escape sequences, written out; lines stay lines, or not."""
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def text_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells, the headings first, as lines of aligned columns.

    Args:
        rows: all of the same length.
        left: how many columns are set to the left; the others, of numbers, to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def slug(title: str) -> str:
    """A title as part of a file name: "Loss and metrics" gives "loss-and-metrics"."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "figure"


def place(module: str) -> tuple[str, str]:
    """The number of a module's layer, or "-" where it is in none, and its name within the layer.

    "model.layers.3.mlp.experts.7.up_proj" gives ("3", "mlp.experts.7.up_proj"): the first number counts layers.
    """
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", module)
    return (match[1], match[2]) if match else ("-", module)


def short_names(modules: Iterable[str]) -> dict[str, str]:
    """Every module's shortest ending, in whole parts of its path, that no other of them shares."""
    modules = list(dict.fromkeys(modules))
    return {module: _shortest_ending(module, modules) for module in modules}


def _shortest_ending(module: str, modules: list[str]) -> str:
    parts = module.split(".")
    endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next((e for e in endings if sum(f".{m}".endswith(f".{e}") for m in modules) == 1), module)


def readable_bytes(count: float | None) -> str:
    """`1.50 GiB`, `2.0 MiB`, `512 B`; `unknown` for None."""
    if count is None:
        return "unknown"
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if count >= 0.95 * size:  # 0.98 GiB reads better than 1001.4 MiB
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.0f} B"


def number(value: float | None, unit: str = "", digits: int = 4) -> str:
    """A value by itself, in at most `digits` significant digits, or "–" for None: `0.8853`, `1,234`, `1.5e−5`.

    Args:
        value: the amount.
        unit: follows the number; "bytes" makes it `1.10 GiB`.
        digits: trailing zeros are dropped.
    """
    if value is None:
        return MISSING
    if unit == "bytes":
        return readable_bytes(value)
    text = _plain(value, digits)
    return f"{text}{'' if unit == '%' else ' '}{unit}" if unit else text


def score(value: float) -> str:
    """A metric on a terminal: four decimals, from 10 on four digits: 0.7625, 402.4."""
    return f"{value:.4f}" if abs(value) < 10 else number(value)


def column(values: Sequence[float | None], digits: int = 4) -> list[str]:
    """Values below each other: all with the same decimals, as many as they need, unless a small one then looks zero."""
    known = [value for value in values if value]
    places = decimals(known, digits)
    if all(isinstance(value, int) for value in known) or any(abs(value) < 0.95 * 10.0**-places for value in known):
        return [number(value, digits=digits) for value in values]
    needed = max(len(fixed(value, places).rstrip("0").partition(".")[2]) for value in known) if places else 0
    return [number(value) if not value else fixed(value, needed) for value in values]


def amounts(values: Sequence[float | None], unit: str) -> list[str]:
    """`column` with a unit behind each; bytes are written each in its own multiple."""
    if unit == "bytes":
        return [number(value, unit) for value in values]
    space = "" if unit in ("", "%") else " "
    return [text if text == MISSING else f"{text}{space}{unit}" for text in column(values)]


def decimals(values: Sequence[float], digits: int) -> int:
    """Decimals with which the largest of the values has `digits` significant digits."""
    largest = max((abs(value) for value in values), default=0.0)
    return min(max(0, digits - 1 - math.floor(math.log10(largest))), 9) if largest else 0


def fixed(value: float, places: int) -> str:
    """A value with a fixed number of decimals and a typographic minus; "0" for what is exactly zero."""
    text = f"{value:,.{places}f}" if value else "0"
    return text.removeprefix("-") if not text.strip("-0.") else text.replace("-", MINUS)


def _plain(value: float, digits: int) -> str:
    size = abs(value)
    if value == 0 or (isinstance(value, int) and size < 1e15):
        return fixed(value, 0)
    if 1e-3 <= size < 1e15:
        text = fixed(value, decimals([value], digits))
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
