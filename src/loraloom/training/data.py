"""Rows to train, validate and test on, brought to the columns that a task needs.

Test and validation are the data set's own splits, or files, or shares of the training rows chosen by a hash of each
row: a row keeps its side when others are added, and equal rows are never on two sides.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from loraloom.errors import InputError
from loraloom.training.config import DataSection
from loraloom.training.config import Task as TaskName
from loraloom.training.mixing import joined, mixed
from loraloom.training.sources import read_parts
from loraloom.training.stdlib_docstrings import text_hash
from loraloom.training.tasks import get_task
from loraloom.training.tasks.base import RunData
from loraloom.training.tasks.labels import labels_are_hidden

BUCKETS = 10_000  # a share is rounded to one in so many


def load_data(section: DataSection, task: TaskName) -> RunData:
    """Read the rows that `section` names and bring them to the columns of `task`.

    Raises:
        InputError: a file or data set that cannot be read, a missing column, no rows, a text or label that is missing
            or of the wrong kind, a single label, or a label in test that train does not have.
    """
    kind = get_task(task)
    images = task == "image-classification"
    source = read_parts(section, images)
    others = {path: read_parts(DataSection(path=path), images)["train"] for path in section.mix}
    columns = source["train"].column_names
    label = section.label_column or next((name for name in ("label", "labels") if name in columns), "")
    if "test" in source and label and not section.test_path and labels_are_hidden(source["test"], label):
        del source["test"]  # as in many public data sets, whose validation set then is what can be tested on
    if "test" not in source and "validation" in source and not section.validation_path:
        source["test"] = source.pop("validation")
    own = len(source["train"])
    if others:
        source["train"] = joined(source["train"], others)
    rows = kind.rows(section, source)
    parts = rows.parts
    train, validation, test = (parts.get(name) for name in ("train", "validation", "test"))
    assert train is not None
    more = None
    if others:
        train, more = train.select(range(own)), train.skip(own)
    if test is None:
        train, test = _divide(train, section.test_fraction)
    if validation is None and section.validation_fraction:
        rest, validation = _divide(train, section.validation_fraction, salt="validation")
        train, validation = (rest, validation) if len(rest) else (train, None)
    source_of: list[int] = []
    if more is not None:
        train, source_of = _mixed(
            section, train, more, {path: len(one) for path, one in others.items()}, validation, test
        )
    kept = _kept(train, section.max_train)
    counts = Counter(source_of[i] for i in kept if source_of)
    train, test = train.select(kept), _subsample(test, section.max_test)
    validation = None if validation is None or not len(validation) else _subsample(validation, section.max_test)
    for part, name in ((train, "train"), (test, "test")):
        if not len(part):
            raise InputError(
                f"data.path {section.path!r}: the {name} set is empty; give more rows or data.test_path",
                code="empty-set",
            )
    ignored = tuple(name for name in columns if name not in rows.read)
    sources = {path: counts[i] for i, path in enumerate((section.path, *others)) if counts}
    data = RunData(train, test, rows.label_names, validation, ignored, sources)
    kind.check(section, data)
    return data


def _mixed(
    section: DataSection, own: Dataset, more: Dataset, sizes: dict[str, int], *held_out: Dataset | None
) -> tuple[Dataset, list[int]]:
    """The training rows of `data.path` with those of `data.mix`, and the number of the set that each is from."""
    held = {row_hash(row) for rows in held_out if rows is not None for row in rows}
    sets, start = [own], 0
    for size in sizes.values():
        sets.append(more.select([i for i in range(start, start + size) if row_hash(more[i]) not in held]))
        start += size
    for path, rows in zip((section.path, *sizes), sets, strict=True):
        if not len(rows):
            raise InputError(f"data.mix: no row of {path!r} is left to train on", code="empty-set")
    shares = [float(share) for share in section.mix.values()]
    return mixed(sets, [1 - sum(shares), *shares], section.mix_until)


def row_hash(row: dict[str, Any]) -> int:
    """A number that depends on the row's content alone."""
    alone = "text" in row and "text_pair" not in row
    return text_hash(row["text"] if alone else json.dumps(row, sort_keys=True, default=_plain))


def data_sha256(data: RunData) -> str:
    """A hash of every row that is trained, validated or tested on, in order, and of the labels' names."""
    digest = hashlib.sha256(json.dumps(data.label_names).encode())
    for rows in data.parts.values():
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _divide(rows: Dataset, share: float, salt: str = "") -> tuple[Dataset, Dataset]:
    """(rest, share) of the rows; another salt chooses independently of the first choice."""
    cut = round(share * BUCKETS)
    chosen = [(text_hash(f"{salt}{row_hash(row)}") if salt else row_hash(row)) % BUCKETS < cut for row in rows]
    return (
        rows.select([i for i, one in enumerate(chosen) if not one]),
        rows.select([i for i, one in enumerate(chosen) if one]),
    )


def _subsample(rows: Dataset, limit: int | None) -> Dataset:
    """The `limit` rows with the smallest hashes, in their old order."""
    return rows.select(_kept(rows, limit))


def _kept(rows: Dataset, limit: int | None) -> Sequence[int]:
    """Which these rows are."""
    if limit is None or limit >= len(rows):
        return range(len(rows))
    hashes = [row_hash(row) for row in rows]
    return sorted(sorted(range(len(rows)), key=hashes.__getitem__)[:limit])
