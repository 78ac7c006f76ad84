"""What every study shares: rows on disk as they come, finished runs skipped, equal search per arm, tables from rows.

A study file is JSON lines: first the manifest (versions, hashes of the data, settings), then a row per run. A row has a
``stage`` ("search" on development data, or "test"), what identifies the run (``arm``, ``seed``, often a ``group`` such
as the target domain), and its results. ``right`` is a string with a 1 for each test item that was answered rightly and
a 0 for each other, in the order of the test set: two arms are compared item by item.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from loraloom.provenance import installed_versions
from loraloom.training.compare.statistics import paired_test

Row = dict[str, Any]
DRAWS, LEAST_SEEDS = 4000, 5


class Store:
    """The rows of one study file. Opening it with other settings than it was made with is an error."""

    def __init__(self, path: Path, settings: Row, data: Iterable[Path]) -> None:
        self.path = path
        hashes = {f"{file.parent.name}/{file.name}": sha256(file) for file in data}
        self.rows: list[Row] = []
        if path.exists():
            first, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
            if json.loads(json.dumps(settings)) != first["settings"] or [*hashes.values()] != [*first["data"].values()]:
                raise SystemExit(f"{path} was made with other settings or data: move it away, or change them back")
            self.rows = rows
        else:
            self._append({"settings": settings, "data": hashes, "versions": installed_versions()})

    def done(self, **keys: Any) -> Row | None:
        """The row with these values, or None."""
        return next((row for row in self.rows if all(row.get(key) == value for key, value in keys.items())), None)

    def keep(self, row: Row) -> None:
        """Adds a row, on disk at once."""
        self.rows.append(row)
        self._append(row)

    def best(self, arm: str, choices: Sequence[Any], key: str = "rates") -> Any:
        """The choice with the best mean accuracy in the arm's search; the first of equals. NaN counts as 0."""
        means = []
        for choice in choices:
            values = [
                row["accuracy"] if math.isfinite(row["accuracy"]) else 0.0
                for row in self.rows
                if (row["stage"], row.get("arm"), row.get(key)) == ("search", arm, json.loads(json.dumps(choice)))
            ]
            means.append(sum(values) / len(values))
        return choices[means.index(max(means))]

    def search_then_test(
        self,
        arms: Sequence[str],
        rates: Sequence[float],
        dev_seeds: Iterable[int],
        seeds: Iterable[int],
        run: Callable[[str, str, float, int], Row],
    ) -> None:
        """Every arm with every rate on development data, then with its best rate on test data; finished runs stay.

        Args:
            arms: names.
            rates: the same for every arm.
            dev_seeds, seeds: of the two stages.
            run: of (stage, arm, rate, seed); the results of one run, "accuracy" among them.
        """

        def once(stage: str, arm: str, rate: float, seed: int) -> None:
            row = {"stage": stage, "seed": seed, "arm": arm, "rates": [rate]}
            if not self.done(**row):
                outcome = run(stage, arm, rate, seed)
                self.keep(row | outcome)
                print({**row, "accuracy": outcome["accuracy"]}, flush=True)

        for arm in arms:
            for seed in dev_seeds:
                for rate in rates:
                    once("search", arm, rate, seed)
        for seed in seeds:  # a seed of every arm before the next, so that a study cut short is balanced
            for arm in arms:
                once("test", arm, self.best(arm, [[rate] for rate in rates])[0], seed)

    def _append(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_rows(path: Path) -> list[Row]:
    """The runs of a study file, without its manifest."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def answers(logits: Tensor, truth: Tensor) -> Row:
    """``accuracy`` and ``right`` of a run. Where a logit is not finite, all answers are wrong and `failed` says so."""
    right = logits.argmax(-1) == truth
    failed = not logits.isfinite().all()
    if failed:
        right = right & False
    row: Row = {"accuracy": right.double().mean().item(), "right": "".join("01"[int(one)] for one in right)}
    return row | {"failed": True} if failed else row


@dataclass(frozen=True)
class Effect:
    """The mean of an arm, or of its paired difference to another arm."""

    mean: float
    interval: tuple[float, float] | None
    """95%: percentiles of the bootstrap that draws seeds, and in each group test items, anew. It speaks of other seeds
    and other test items, not of other groups. None below `LEAST_SEEDS` seeds where the test items are not known."""
    p: float | None
    """Of the exact sign-flip test over the pairs; None for a mean, and where there are too many pairs."""
    pairs: int
    """Runs, or pairs of runs: groups x seeds."""
    seeds: int


def effect(
    rows: Sequence[Row], arm: str, baseline: str | None = None, *, group: str = "group", key: str = "right"
) -> Effect | None:
    """The mean of `key` of an arm over groups and seeds, less that of the baseline with the same seeds and test items.

    Args:
        rows: of one table; a group without rows of both arms is left out, a seed without them in every group too.
        arm: value of the rows' ``arm``.
        baseline: that of another arm; None: the mean of `arm` itself.
        group: which of a row's values says what it was tested on.
        key: a string of 0 and 1 for the test items, or a number, then a single item.

    Returns:
        None without runs in common.
    """
    of = {name: _cells(rows, name, group, key) for name in ({arm, baseline} - {None})}
    shared = set.intersection(*(set(cells) for cells in of.values()))
    groups = sorted({name for name, _ in shared}, key=str)
    seeds = sorted(seed for seed in {seed for _, seed in shared} if all((name, seed) in shared for name in groups))
    if not seeds:
        return None
    own = [np.stack([of[arm][name, seed] for seed in seeds]) for name in groups]  # for each group (seeds, items)
    other = [np.stack([of[baseline][name, seed] for seed in seeds]) for name in groups] if baseline else None
    values = own if other is None else [x - y for x, y in zip(own, other, strict=True)]
    p = None
    if other is not None:
        x, y = (np.concatenate([part.mean(1) for part in parts]).tolist() for parts in (own, other))
        p = paired_test(x, y).p_sign_flip
    interval = None
    if len(seeds) >= LEAST_SEEDS or values[0].shape[1] > 1:
        low, high = np.quantile(_bootstrap(values), (0.025, 0.975))
        interval = float(low), float(high)
    mean = float(np.mean([part.mean() for part in values]))
    return Effect(mean, interval, p, len(groups) * len(seeds), len(seeds))


def _cells(rows: Sequence[Row], arm: str, group: str, key: str) -> dict[tuple[Any, int], np.ndarray]:
    cells = {}
    for row in rows:
        if row["arm"] == arm and key in row:
            value = row[key]
            items = [float(digit) for digit in value] if isinstance(value, str) else [value]
            cells[row.get(group), row["seed"]] = np.nan_to_num(np.array(items, float), nan=0.0)
    return cells


def _bootstrap(values: Sequence[np.ndarray]) -> np.ndarray:
    """`DRAWS` means over the groups, with seeds drawn anew (the same for all groups) and items (for each group)."""
    generator = np.random.default_rng(0)
    seeds = len(values[0])
    chosen = generator.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
    total = np.zeros(DRAWS)
    for part in values:
        items = part.shape[1]
        weights = generator.multinomial(items, np.full(items, 1 / items), DRAWS) / items
        total += ((chosen @ part) * weights).sum(1)
    return total / len(values)


def shown_mean(found: Effect | None) -> str:
    """``0.812 [0.790, 0.833]``; empty without runs."""
    if found is None:
        return ""
    return f"{found.mean:.3f}" + (" [{:.3f}, {:.3f}]".format(*found.interval) if found.interval else "")


def shown_difference(found: Effect | None) -> str:
    """``+0.012 [+0.004, +0.020], p 0.031``; empty without pairs."""
    if found is None:
        return ""
    interval = " [{:+.3f}, {:+.3f}]".format(*found.interval) if found.interval else ""
    return f"{found.mean:+.3f}{interval}" + ("" if found.p is None else f", p {found.p:.2g}")


def arm_table(
    rows: Sequence[Row],
    arms: Sequence[str],
    baselines: Sequence[str],
    *,
    group: str = "group",
    key: str = "right",
    further: Sequence[tuple[str, str]] = (),
) -> list[str]:
    """Lines of a table in Markdown: a row for each arm that has runs.

    Args:
        rows: the test rows.
        arms: in the table's order.
        baselines: arms that every other one is compared to, a column each.
        group: which of a row's values says what it was tested on; a column for each of several.
        key: what is averaged, see `effect`.
        further: (heading, key) of columns with the means of whole numbers, such as trained parameters.
    """
    groups = sorted({row.get(group) for row in rows}, key=str)
    groups = groups if len(groups) > 1 else []
    heads = ["arm", *map(str, groups), "mean, 95% interval", *(f"less {baseline}" for baseline in baselines)]
    heads += [*(heading for heading, _ in further), "seeds"]
    lines = [heads, ["---"] * len(heads)]
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        found = effect(rows, arm, group=group, key=key)
        if found is None:
            continue
        cells = [_plain_mean(rows, arm, key, group, name) for name in groups]
        cells += [shown_mean(found)]
        cells += [
            "" if arm == baseline else shown_difference(effect(rows, arm, baseline, group=group, key=key))
            for baseline in baselines
        ]
        cells += [f"{round(sum(row[name] for row in own) / len(own)):,}" for _, name in further]
        lines.append([arm, *cells, str(found.seeds)])
    return [f"| {' | '.join(line)} |" for line in lines]


def _plain_mean(rows: Sequence[Row], arm: str, key: str, group: str, name: Any) -> str:
    found = effect([row for row in rows if row.get(group) == name], arm, group=group, key=key)
    return f"{found.mean:.3f}" if found else ""
