"""What every study shares: rows on disk as they come, finished runs skipped, equal search per arm, tables from rows.

A study file is JSON lines: first the manifest (versions, hashes of the data, settings), then a row per run. A row has a
``stage`` ("search" on development data, or "test") and what identifies the run; its results stand beside that.
"""

import hashlib
import json
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from loraloom.provenance import installed_versions
from loraloom.training.compare.statistics import paired_test

Row = dict[str, Any]


class Store:
    """The rows of one study file. Opening it with other settings than it was made with is an error."""

    def __init__(self, path: Path, settings: Row, data: Iterable[Path]) -> None:
        self.path = path
        manifest = {"settings": settings, "data": {str(file): sha256(file) for file in data}}
        self.rows: list[Row] = []
        if path.exists():
            first, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
            old = {key: first[key] for key in manifest}
            if json.loads(json.dumps(manifest["settings"])) != old["settings"] or [*manifest["data"].values()] != [
                *old["data"].values()
            ]:
                raise SystemExit(f"{path} was made with other settings or data: move it away, or change them back")
            self.rows = rows
        else:
            self._append({**manifest, "versions": installed_versions()})

    def done(self, **keys: Any) -> Row | None:
        """The row with these values, or None."""
        return next((row for row in self.rows if all(row.get(key) == value for key, value in keys.items())), None)

    def keep(self, row: Row) -> None:
        """Adds a row, on disk at once."""
        self.rows.append(row)
        self._append(row)

    def _append(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_rows(path: Path) -> list[Row]:
    """The runs of a study file, without its manifest."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def mean_interval(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> tuple[float, float, float]:
    """The mean, and a 95% bootstrap interval of it (percentiles, resampling the values); NaN counts as 0."""
    values = [0.0 if math.isnan(value) else value for value in values]
    generator = random.Random(seed)
    means = sorted(statistics.fmean(generator.choices(values, k=len(values))) for _ in range(draws))
    return statistics.fmean(values), means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def difference(rows: Sequence[Row], arm: str, baseline: str, pair: Sequence[str], value: str = "accuracy") -> str:
    """``+0.012 [0.004, 0.020], p 0.03, n 24``: arm minus baseline over runs that agree in the keys of `pair`.

    The interval is the bootstrap's over pairs; p is the exact sign-flip test's, or above 20 pairs the paired t test's.
    """
    by = {
        name: {tuple(row[key] for key in pair): row[value] for row in rows if row["arm"] == name}
        for name in (arm, baseline)
    }
    keys = sorted(by[arm].keys() & by[baseline].keys())
    if len(keys) < 2:
        return ""
    x, y = ([by[name][key] for key in keys] for name in (arm, baseline))
    mean, low, high = mean_interval([a - b for a, b in zip(x, y, strict=True)])
    test = paired_test(x, y)
    p = test.p_t if test.p_sign_flip is None else test.p_sign_flip
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], p {p:.2g}, n {len(keys)}" if p is not None else f"{mean:+.3f}"
