"""What a run read, and what is odd about it: so that a wrong column or a label with a typo is seen before training."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loraloom.text import nearest
from loraloom.training.config import CLASSIFICATION
from loraloom.training.config import Task as TaskName
from loraloom.training.tasks.base import RunData

RARE = 0.01  # share of the training rows under which a label is looked at
SIMILAR = 0.75  # of two labels' names, above which the rarer may be a typo of the other
MEASURED = 2000  # rows whose length is measured
SHOWN = 12  # classes that the terminal shows


@dataclass(frozen=True)
class DataReport:
    """Rows, classes, lengths and what was left aside."""

    rows: dict[str, int]
    """Part -> rows."""
    classes: dict[str, int]
    """Label -> training rows (token-classification: words) that have it, the most frequent first; {} without labels."""
    majority_share: float | None
    """Share of the test rows with the label that is most frequent in training: what always answering it reaches."""
    cut_share: float | None
    """Share of the training texts longer than data.max_length, of those measured; None where rows have no tokens."""
    longest: int | None
    """Tokens of the longest of these."""
    max_length: int
    ignored_columns: list[str]
    warnings: list[str]
    sources: dict[str, int] = field(default_factory=dict)
    """With data.mix: training rows from each set."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for metrics.json."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """What the terminal shows."""
        found = [", ".join(f"{count:,} rows to {_PURPOSES[part]}" for part, count in self.rows.items())]
        if self.sources:
            found.append("trained on: " + ", ".join(f"{path} {count:,}" for path, count in self.sources.items()))
        if self.classes:
            listed = [f"{name} {count:,}" for name, count in self.classes.items()]
            more = f", and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
            found.append(f"{len(listed)} classes: {', '.join(listed[:SHOWN])}{more}")
        if self.majority_share is not None:
            found.append(f"always answering {next(iter(self.classes))!r} is right on {self.majority_share:.2%} of test")
        if self.cut_share:
            found.append(
                f"{self.cut_share:.2%} of the texts are cut at {self.max_length} tokens (longest {self.longest})"
            )
        if self.ignored_columns:
            found.append(f"columns not read: {', '.join(self.ignored_columns)}")
        return found + [f"warning: {text}" for text in self.warnings]


_PURPOSES = {"train": "train on", "validation": "validate on", "test": "test on"}


def report_on(data: RunData, task: TaskName, lengths: Iterable[int], max_length: int) -> DataReport:
    """The report on a run's rows.

    Args:
        data: the rows.
        task: its name.
        lengths: tokens of training texts before any is cut; empty where rows have no tokens.
        max_length: tokens after which they are cut.
    """
    counts = _classes(data, task)
    measured = [*lengths]
    cut = sum(length > max_length for length in measured) / len(measured) if measured else None
    majority = None
    if task in CLASSIFICATION:
        most = data.label_names.index(next(iter(counts)))
        labels = data.test["label"][:]
        majority = labels.count(most) / len(labels)
    return DataReport(
        rows={name: len(rows) for name, rows in data.parts.items()},
        classes=counts,
        majority_share=majority,
        cut_share=cut,
        longest=max(measured, default=None),
        max_length=max_length,
        ignored_columns=list(data.ignored),
        warnings=[*_odd_labels(counts), *_empty_classes(counts)],
        sources=data.sources,
    )


def _classes(data: RunData, task: TaskName) -> dict[str, int]:
    if not data.label_names:
        return {}
    labels = data.train["label"][:]
    if task == "multi-label":
        ids: Iterable[int] = (i for row in labels for i, value in enumerate(row) if value)
    else:
        ids = (i for row in labels for i in row) if task == "token-classification" else labels
    counts = Counter(ids)
    return dict(sorted(((n, counts[i]) for i, n in enumerate(data.label_names)), key=lambda item: -item[1]))


def _odd_labels(counts: dict[str, int]) -> list[str]:
    """Rare labels that look like a frequent one."""
    total = sum(counts.values())
    frequent = [name for name, count in counts.items() if count > RARE * total]
    found = []
    for name, count in counts.items():
        if 0 < count <= RARE * total and not name.isdigit():
            plain = {other.lower().strip(): other for other in frequent}
            near = nearest(name.lower().strip(), plain, cutoff=SIMILAR)
            if near:
                rows = "1 row has" if count == 1 else f"{count} rows have"
                found.append(f"{rows} label {name!r}: a typo of {plain[near[0]]!r} ({counts[plain[near[0]]]:,} rows)?")
    return found


def _empty_classes(counts: dict[str, int]) -> list[str]:
    empty = [name for name, count in counts.items() if not count]
    return [f"no training row has label {', '.join(map(repr, empty[:SHOWN]))}"] if empty else []


def outcome_warnings(report: DataReport, after: dict[str, float], predicted: Iterable[Any] | None) -> list[str]:
    """What makes the metrics of a trained classifier worth less than they seem.

    Args:
        report: on the rows.
        after: metrics on the test set.
        predicted: names of the classes that it predicts on the test set; None where it does not classify.
    """
    names = None if predicted is None else [*predicted]
    found = []
    if names is not None and len(names) == 1:
        found.append(f"the model answers {names[0]!r} to every test row: it has learned no difference")
    elif report.majority_share is not None and after.get("accuracy", 1.0) <= report.majority_share:
        found.append(
            f"accuracy {after['accuracy']:.4f} is not above {report.majority_share:.4f}, which always answering "
            f"{next(iter(report.classes))!r} reaches"
        )
    return found
